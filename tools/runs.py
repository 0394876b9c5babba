"""All models on one kind of data, with one network and one budget:

  python tools/runs.py OUT --data cifar10 --words "CIFAR-10" --hardware "one H200" --tag h200 --minutes 20 --device cuda
  python tools/runs.py OUT --data folder:PATH --words "..." --hardware "one core" --tag cpu -- --steps 1800 --width 32

For each method: train in OUT/METHOD (a run that is there is continued, a complete one is left alone), measure it
(tools/results.py run: book/results/cifar10_METHOD_TAG.json and pictures), keep its curve for ``compare`` and export its
weights to OUT/METHOD.safetensors. Words after ``--`` go to the trainer (of pfgm, ``--batch`` would be the crowd of
charges). A method that fails is named at the end; the others go on. Run it again after an interruption.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("ddpm", "pfgm", "ncsn", "dpm", "pfgmpp")
ROWS = {"ncsn": ["ddim:10", "ddim:20", "ddim:50"]}
USUAL = ["ddim:10", "ddim:20", "ddim:50", "heun:10"]


def run(*words):
    """One command.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    words = [sys.executable, *map(str, words)]
    print("+", *words[1:], flush=True)
    subprocess.run(words, cwd=ROOT, check=True)


def one(method, a, more):
    """All that is done for one method."""
    place, usual = a.out.resolve() / method, ["--data", a.data, "--device", a.device, "--snapshots", 5]
    if (place / "checkpoint.safetensors").exists():
        run("-m", "minigen", "train", method, "--out", place, "--resume", *usual)
    else:
        budget = ["--minutes", a.minutes] if a.minutes else []
        run("-m", "minigen", "train", method, "--out", place, "--recipe", "fast", *usual, *budget, *more)
    if a.train_only:
        return
    name, sampling = f"cifar10_{method}_{a.tag}", ["--device", a.device, "--precision", a.precision]
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
    ap.epilog = "Words after -- go to the trainer."
    dashes = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    a, more = ap.parse_args(sys.argv[1:dashes]), sys.argv[dashes + 1 :]
    failed = []
    for method in a.methods:
        try:
            one(method, a, more)
        except subprocess.CalledProcessError:
            failed.append(method)
    if failed:
        sys.exit(f"failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
