"""Make a run small enough to ship:  python tools/ship.py RUN minigen/assets/NAME.safetensors

Keeps the averaged weights, in half precision, and the description of the run. Sampling needs nothing else; training
cannot be continued from such a file.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minigen import checkpoint  # noqa: E402


def main(run, file):
    tensors, info = checkpoint.read(run)
    checkpoint.write(file, {k: v.half() for k, v in tensors.items() if k.startswith("ema.")}, info)
    print(f"wrote {file}, {Path(file).stat().st_size // 1024} KB, step {info['step']}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
