"""``evaluate``: a run's network, tested on images."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="test a run's network on a folder of images",
        description="Test the network of a finished run on the images in FOLDER/CLASS/.",
    )
    parser.add_argument("work_dir", metavar="WORKDIR", type=Path, help="folder of the run")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="one folder per class in it")
    parser.add_argument("--batch-size", type=int, default=64, help="images (default 64)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..engine.export import evaluated, trained

    loss, error, images = evaluated(trained(options.work_dir), options.folder, options.batch_size)
    print(f"error {error:.2f} %, loss {loss:.4f} on {images:,} images")
