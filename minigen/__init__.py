"""minigen: the companion package of a book on how physics took over image generation.

One file per paper, each a frozen dataclass of that paper's hyper-parameters::

    from minigen import DDPM, sample
    method = DDPM()
    loss = method.loss(net, x).mean()          # any net(x, u)
    images = sample(method, net, (64, 3, 32, 32))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .core import sample, seeded
from .ddpm import DDPM
from .dpm import DPM
from .ncsn import NCSN
from .pfgm import PFGM
from .pfgmpp import PFGMPP

if TYPE_CHECKING:
    from .checkpoint import Run

__all__ = ["DDPM", "DPM", "NCSN", "PFGM", "PFGMPP", "load", "sample", "seeded"]
__version__ = "0.1.0"


def load(path: str | Path, device: str = "cpu") -> Run:
    """A trained model from a run's folder or a checkpoint file: its method, its network, what it was trained on.

    Args:
        path: the folder or the file.
        device: where to put the network; ``auto`` is a CUDA device if there is one.

    Raises:
        CheckpointError: if there is none, or it cannot be used.
    """
    from . import checkpoint, methods, processes

    return checkpoint.load(path, methods.METHODS, processes.pick_device(device) if device == "auto" else device)
