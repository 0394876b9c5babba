"""The command line: ``python -m minigen train | sample | evaluate | compare | export | plot``.

Whatever goes wrong is said in one line on stderr, with exit code 2; the variable MINIGEN_DEBUG=1 shows the traceback.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from itertools import takewhile
from typing import Any

USAGE = """\
usage: python -m minigen COMMAND ... (COMMAND --help shows all options)

  train METHOD --data DATA --out RUN   train; DATA: cifar10, digits, folder:PATH, swiss_roll, heart, ...
  train classifier --data DATA --out NAME.safetensors   features to compare images by
  sample RUN --n 64 --out grid.png     draw from a trained model
  evaluate RUN --n 1000                compare samples with test data
  compare RUN                          is the loss on track? beside that of a run that worked
  export RUN NAME.safetensors          the averaged weights alone, in half precision, to share
  plot RUN                             draw the log to RUN/loss.png
"""
EXTRA = ("accelerate", "filelock", "safetensors", "torchmetrics", "tqdm", "tyro")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``python -m minigen``; default: those of the process.

    Returns:
        The exit code: 0, 2 after bad input, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    os.environ.setdefault("MPLBACKEND", "Agg")  # pictures go to files
    try:
        return _dispatch(words)
    except ModuleNotFoundError as e:
        if e.name not in EXTRA:
            raise
        return _fail(f"{e.name} is missing: pip install 'minigen[train]'")
    except KeyboardInterrupt:
        _fail("interrupted")
        return 130
    except (ValueError, OSError, ArithmeticError, RuntimeError) as e:
        if os.environ.get("MINIGEN_DEBUG", "0") not in ("", "0"):
            raise
        return _fail(f"{e}" or type(e).__name__)


def _dispatch(words: list[str]) -> int:
    command, rest = words[0], words[1:]
    if command not in ("train", "sample", "evaluate", "compare", "export", "plot"):
        raise ValueError(f"unknown command {command!r}: use train, sample, evaluate, compare, export or plot")
    from . import options

    if words[:2] == ["train", "classifier"]:
        chosen = _parse(options.Classifier, "train classifier", rest[1:])
    elif command == "train":
        from .methods import METHODS

        if rest[:1] in (["-h"], ["--help"]):
            rest = [next(iter(METHODS)), *rest]  # the options of one method say what all have in common
        if not rest or rest[0] not in METHODS:
            what = f"unknown method {rest[0]!r}" if rest and not rest[0].startswith("-") else "which method?"
            raise ValueError(f"{what}: use python -m minigen train {'|'.join(METHODS)} --data DATA --out RUN")
        chosen = _parse(options.Train[METHODS[rest[0]]], f"train {rest[0]}", rest[1:])
        if not isinstance(chosen, int):
            named = (word.split("=")[0] for word in rest if word.startswith("--"))
            chosen = replace(chosen, given=frozenset(name[2:].replace("-", "_") for name in named))
    else:
        forms = {
            "sample": options.Sample, "evaluate": options.Evaluate, "compare": options.Compare,
            "export": options.Export, "plot": options.Plot,
        }  # fmt: skip
        chosen = _parse(forms[command], command, rest)
    if isinstance(chosen, int):
        return chosen
    from . import commands, measure

    run = {
        "train": commands.train, "sample": commands.sample, "evaluate": measure.measure, "compare": commands.compare,
        "export": commands.export, "plot": commands.plot,
    }  # fmt: skip
    if isinstance(chosen, options.Classifier):
        return commands.train_classifier(chosen)
    return run[command](chosen)


def _parse(form: Any, name: str, words: list[str]) -> Any:
    """The options as an instance of ``form``, or 0 after ``--help``; tyro's boxed message becomes one line."""
    import tyro

    text = io.StringIO()
    try:
        with redirect_stderr(text):
            return tyro.cli(form, prog=f"python -m minigen {name}", args=words, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as e:
        if not e.code:
            return 0
    inside = [line.strip("│ ") for line in text.getvalue().splitlines() if line.startswith("│")]
    reason = takewhile(lambda line: not line.startswith("─"), inside)  # under the rule stands the help
    message = " ".join(" ".join(reason).split()) or " ".join(text.getvalue().split())
    raise ValueError(f"{message} (see python -m minigen {name} --help)") from None


def _fail(message: str) -> int:
    """One line on stderr; returns 2."""
    print("minigen:", " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
