"""``convert-report``: what conversion would do to a model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..conversion import conversion_report
from .network import Network


@dataclass(frozen=True)
class Options:
    """List what effdense.convert would make linear in a model, what not, and why.

    For example: effdense convert-report torchvision.models:densenet121
    """

    network: Network = field(default_factory=Network)


def run(options: Options) -> None:
    with torch.device("meta"):
        model = options.network.naive()
    print(conversion_report(model))
