"""``predict``: a run's network, asked about images."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from . import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "predict",
        help="classify images with a run's network",
        description="Classify images with the network of a finished run: CSV on standard output, "
        "with the most probable class of each image.",
    )
    parser.add_argument("work_dir", metavar="WORKDIR", type=Path, help="folder of the run")
    parser.add_argument(
        "images", metavar="PATH", nargs="+", type=Path, help="image, or folder of images"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images (default 64)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..engine.export import images_in, predictions, trained

    model = trained(options.work_dir)
    paths = images_in(options.images)
    writer = csv.writer(sys.stdout)
    writer.writerow(["image", "class", "probability"])
    for path, probabilities in predictions(model, paths, options.batch_size):
        best = int(probabilities.argmax())
        writer.writerow([path, model.classes[best], f"{float(probabilities[best]):.4f}"])
