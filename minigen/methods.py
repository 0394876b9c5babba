"""The methods by name, as the command line and the checkpoints know them."""

from __future__ import annotations

from .core import Method
from .ddpm import DDPM
from .dpm import DPM
from .ncsn import NCSN
from .pfgm import PFGM
from .pfgmpp import PFGMPP

METHODS: dict[str, type[Method]] = {cls.__name__.lower(): cls for cls in (DPM, NCSN, DDPM, PFGM, PFGMPP)}
"""A checkpoint stores the name; the fields of the dataclass are the options of ``python -m minigen train NAME``."""
