"""effdense: DenseNets in linear memory, exact, and faster than the naive network."""

from .dense_block import SAVE_MODES, Save
from .models import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet_bc,
)
from .modules import DenseBlock, Transition
from .version import __version__

__all__ = [
    "SAVE_MODES",
    "DenseBlock",
    "DenseNet",
    "Save",
    "Transition",
    "__version__",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet_bc",
]
