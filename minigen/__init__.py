"""minigen: the companion package of a book on how physics took over image generation.

One file per paper, each a frozen dataclass of that paper's hyper-parameters::

    from minigen import DDPM, sample
    method = DDPM()
    loss = method.loss(net, x).mean()          # any net(x, u)
    images = sample(method, net, (64, 3, 32, 32))
"""

from __future__ import annotations

from .core import sample, seeded
from .ddpm import DDPM

__all__ = ["DDPM", "sample", "seeded"]
__version__ = "0.1.0"
