"""``convert-report``: what conversion would do to a model."""

from __future__ import annotations

import argparse

import torch

from ..conversion import conversion_report
from . import Commands
from .network import add_model_argument, network_of


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "convert-report",
        help="list what effdense.convert would make linear in a model, what not, and why",
        description="Build a model on the meta device and list what effdense.convert would make "
        "linear in it, what it would leave and why. "
        "For example: python -m effdense convert-report torchvision.models:densenet121",
    )
    add_model_argument(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    with torch.device("meta"):
        model = network_of(options).naive()
    print(conversion_report(model))
