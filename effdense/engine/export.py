"""A run's network with its weights, used on images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..weights import read_safetensors
from .data.image_files import Preparation, image_preparation
from .networks import build
from .records import read_config


@dataclass(frozen=True)
class Trained:
    """The network of a finished run, in eval mode, and what it takes and says."""

    network: nn.Module
    prepare: Preparation
    classes: Sequence[str]


def trained(work_dir: Path) -> Trained:
    """Build the network of a run with its final weights.

    Raises:
        UserError: if there is no finished run in ``work_dir``.
    """
    recorded = read_config(work_dir)
    options, classes = recorded["options"], recorded["classes"]
    prepare = image_preparation(options["data"], options["image_size"])
    network = build(options, len(classes), prepare.channels)
    network.load_state_dict(read_safetensors(work_dir / "model.safetensors"))
    return Trained(network.eval(), prepare, classes)


def images_in(paths: Sequence[Path]) -> list[Path]:
    """The image files among ``paths`` and in the folders among them, in order.

    Raises:
        UserError: if there are none.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found = []
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [p for p in inside if p.suffix.lower() in IMG_EXTENSIONS and p.is_file()]
    if not found:
        raise UserError(f"there is no image in {', '.join(map(str, paths))}")
    return found


@torch.no_grad()
def predictions(
    model: Trained, paths: Sequence[Path], batch_size: int = 64
) -> Iterator[tuple[Path, Tensor]]:
    """Each image's class probabilities (classes,).

    Raises:
        UserError: for a file that cannot be read as an image.
    """
    for begin in range(0, len(paths), batch_size):
        some = paths[begin : begin + batch_size]
        images = torch.stack([model.prepare(path) for path in some])
        yield from zip(some, model.network(images).softmax(1), strict=True)


def evaluated(model: Trained, folder: Path, batch_size: int = 64) -> tuple[float, float, int]:
    """Mean loss, error in per cent and number of the images in ``folder``/CLASS/.

    Raises:
        UserError: where a folder is not named after one of the run's classes.
    """
    numbers = {name: number for number, name in enumerate(model.classes)}
    paths = images_in([folder])
    for path in paths:
        name = path.relative_to(folder).parts[0]
        if name not in numbers or path.parent == folder:
            raise UserError(
                f"{path} is not in a folder of {folder} that is named after one of the run's "
                f"classes, {', '.join(list(numbers)[:5])}{', ...' if len(numbers) > 5 else ''}"
            )
    loss = wrong = 0.0
    for path, probabilities in predictions(model, paths, batch_size):
        label = numbers[path.relative_to(folder).parts[0]]
        loss -= float(probabilities[label].clamp_min(1e-30).log())
        wrong += int(probabilities.argmax()) != label
    return loss / len(paths), 100 * wrong / len(paths), len(paths)
