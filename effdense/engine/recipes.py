"""The defaults of each data set."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass
from typing import Any

from ..choices import AugmentName, NetworkName, ScheduleName
from ..machine.tables import columns

FILES = ("imagefolder", "webdataset", "csv")
"""The data sets of image files."""
OWN = "own"
"""The name of data that were given in Python, of which no command line knows."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The defaults of one data set; each field is the option of the same name."""

    arch: NetworkName | None
    depth: int | None
    growth_rate: int | None
    drop_rate: float | None
    epochs: int
    batch_size: int
    lr: float
    schedule: ScheduleName
    milestones: tuple[float, ...]
    weight_decay: float
    augment: AugmentName
    image_size: int


# Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, section 4.2.
_CIFAR = Recipe(
    arch="densenet_bc",
    depth=100,
    growth_rate=12,
    drop_rate=0.0,
    epochs=300,
    batch_size=64,
    lr=0.1,
    schedule="multistep",
    milestones=(0.5, 0.75),
    weight_decay=1e-4,
    augment="paper",
    image_size=32,
)
# Section 4.2: dropout of 0.2 on the data that are not augmented.
UNAUGMENTED_DROP_RATE = 0.2

_IMAGENET = dataclasses.replace(
    _CIFAR,
    arch="densenet121",
    epochs=90,
    batch_size=256,
    milestones=(1 / 3, 2 / 3),
    image_size=224,
)

RECIPES: dict[str, Recipe] = {
    # Sized for 8x8 images: under 3 % test error after a minute on two processor cores.
    "digits": dataclasses.replace(_CIFAR, depth=22, epochs=12, schedule="cosine", image_size=8),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "svhn": dataclasses.replace(_CIFAR, epochs=40, augment="none", drop_rate=UNAUGMENTED_DROP_RATE),
    "imagefolder": _IMAGENET,
    "webdataset": _IMAGENET,
    "csv": _IMAGENET,
    "fake": dataclasses.replace(_CIFAR, depth=22, epochs=2, augment="none"),
}
# With --spatial-dims 3.
VOLUMES = {"batch_size": 8, "image_size": 64}
# SGD's rate comes from the recipe; these are the usual ones of the adaptive methods.
ADAPTIVE_LR = 1e-3


def recipe_table() -> str:
    """The defaults that depend on the data set, one option a row, for the help text."""
    names = [field.name for field in dataclasses.fields(Recipe)]
    rows = [["", *RECIPES]]
    for name in names:
        values = [
            "-" if name in ("depth", "growth_rate") and recipe.arch != "densenet_bc" else value
            for recipe in RECIPES.values()
            for value in [getattr(recipe, name)]
        ]
        rows.append([f"--{name.replace('_', '-')}", *map(_show, values)])
    return textwrap.indent(columns(rows), "  ")


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{item:.2g}" for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
