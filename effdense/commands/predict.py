"""``predict``: a run's network, asked about images."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..errors import UserError
from . import front_end


@dataclass(frozen=True)
class Options:
    """Classify images with the network of a finished run: CSV on standard output, with the most
    probable class of each image.
    """

    work_dir: Annotated[Positional[Path], arg(metavar="WORKDIR")]
    """Folder of the run."""
    images: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="PATH [PATH ...]", help_behavior_hint="(required)"),
    ]
    """Images, and folders of images."""
    batch_size: int = 64
    """Images."""

    def __post_init__(self) -> None:
        if not self.images:
            raise UserError("PATH must be an image or a folder of images")
        front_end.check_positive(batch_size=self.batch_size)


def run(options: Options) -> None:
    from ..engine.export import images_in, predictions, trained

    model = trained(options.work_dir)
    paths = images_in(options.images)
    writer = csv.writer(sys.stdout)
    writer.writerow(["image", "class", "probability"])
    for path, probabilities in predictions(model, paths, options.batch_size):
        best = int(probabilities.argmax())
        writer.writerow([path, model.classes[best], f"{float(probabilities[best]):.4f}"])
