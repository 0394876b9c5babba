"""All models on one kind of data, with one network and one budget:

  python tools/runs.py OUT --data cifar10 --words "CIFAR-10" --hardware "one H200" --tag h200 --minutes 20 --device cuda
  python tools/runs.py OUT --data folder:PATH --words "..." --hardware "one core" --tag cpu -- --steps 1800 --width 32

For each method: train in OUT/METHOD (a run that is there is continued, a complete one is left alone), measure it
(tools/results.py run: book/results/cifar10_METHOD_TAG.json and pictures), keep its curve for ``compare`` and export its
weights to OUT/METHOD.safetensors. Words after ``--`` go to the trainer (of pfgm, ``--batch`` would be the crowd of
charges). A method that fails is named at the end; the others go on. Run it again after an interruption.

A card waits for the processor where the network is small: ``--together`` trains all methods at once. Each run needs a
processor core of its own; start nothing else beside them.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("ddpm", "pfgm", "ncsn", "dpm", "pfgmpp")
ROWS = {"ncsn": ["ddim:10", "ddim:20", "ddim:50"]}
USUAL = ["ddim:10", "ddim:20", "ddim:50", "heun:10"]


def start(*words):
    """One command, in a process of its own."""
    words = [sys.executable, *map(str, words)]
    print("+", *words[1:], flush=True)
    return subprocess.Popen(words, cwd=ROOT)


def run(*words):
    """One command, to its end.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    if code := start(*words).wait():
        raise subprocess.CalledProcessError(code, words)


def train(method, a, more):
    """The training of one method, begun or continued."""
    place, usual = a.out.resolve() / method, ["--data", a.data, "--device", a.device, "--snapshots", 5]
    if (place / "checkpoint.safetensors").exists():
        return start("-m", "minigen", "train", method, "--out", place, "--resume", *usual)
    budget = ["--minutes", a.minutes] if a.minutes else []
    return start("-m", "minigen", "train", method, "--out", place, "--recipe", "fast", *usual, *budget, *more)


def keep(method, a):
    """All that follows the training of one method."""
    place, name = a.out.resolve() / method, f"cifar10_{method}_{a.tag}"
    sampling = ["--device", a.device, "--precision", a.precision]
    what = ["--hardware", a.hardware, "--data", a.words, "--n", a.n, "--bits", a.bits]
    rows = ["--rows", *ROWS.get(method, USUAL), "--memory", *a.memory]
    run("tools/results.py", "run", place, name, *what, *rows, *sampling)
    run("tools/results.py", "curve", place, name)
    weights = a.out.resolve() / f"{method}.safetensors"
    weights.unlink(missing_ok=True)
    run("-m", "minigen", "export", place, weights)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out", type=Path)
    ap.add_argument("--data", required=True)
    ap.add_argument("--words", required=True, help="what the data are, in words")
    ap.add_argument("--hardware", required=True)
    ap.add_argument("--tag", required=True)
    ap.add_argument("--minutes", type=float, help="of training for each method")
    ap.add_argument("--n", type=int, default=1000, help="samples to measure")
    ap.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    ap.add_argument("--memory", nargs="*", type=int, default=[8, 32, 128])
    ap.add_argument("--bits", type=int, default=0)
    ap.add_argument("--precision", default="bf16", choices=["fp32", "bf16"], help="of the network while sampling")
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--train-only", action="store_true")
    ap.add_argument("--together", action="store_true", help="train all methods at once, then measure one by one")
    ap.epilog = "Words after -- go to the trainer."
    dashes = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    a, more = ap.parse_args(sys.argv[1:dashes]), sys.argv[dashes + 1 :]
    failed, begun = [], {m: train(m, a, more) for m in a.methods} if a.together else {}
    ended = {m: process.wait() for m, process in begun.items()}
    for method in a.methods:
        try:
            code = ended[method] if a.together else train(method, a, more).wait()
            if code:
                failed.append(method)
            elif not a.train_only:
                keep(method, a)
        except subprocess.CalledProcessError:
            failed.append(method)
    if failed:
        sys.exit(f"failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
