"""A training of a network in a process of its own, for its memory and time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import effdense

from .. import reference
from ..autocast import AUTOCAST_DTYPES
from ..choices import DtypeName
from ..machine.measurement import in_fresh_process, measure_training
from ..memory.optimizers import make_optimizer
from ..memory.timeline import Training
from .network import Network


@dataclass(frozen=True)
class Job:
    """One training, with float32 parameters."""

    network: Network
    save: str | None
    """What ours saves; None for the naive network."""
    shape: tuple[int, ...]
    """Of the input."""
    target: tuple[int, ...]
    """Its shape: the output's without channels."""
    num_classes: int
    device: str = "cpu"
    dtype: DtypeName = "float32"
    channels_last: bool = False

    def training(self) -> Training:
        """Ready to be taken steps of."""
        with torch.device(self.device):
            model = self.network.naive() if self.save is None else self.network.ours(self.save)
        return self._training(model.float().train(), self.shape, self.target, self.num_classes)

    def warm_up(self) -> None:
        """A step of a tiny network of the same kind; the model's imports are done then too."""
        with torch.device("meta"):
            self.network.naive()
        model: nn.Module = reference.densenet_bc(10, 4)
        if self.save is not None:
            model = effdense.densenet_bc(10, 4)
        self._training(model.to(self.device), (2, 3, 8, 8), (2,), 10).step()

    def _training(
        self, model: nn.Module, shape: tuple[int, ...], target: tuple[int, ...], classes: int
    ) -> Training:
        layout = torch.contiguous_format
        if self.channels_last:
            layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        model = model.to(memory_format=layout)
        return Training(
            model,
            make_optimizer("sgd", model.parameters()),
            torch.randn(shape, device=self.device).to(memory_format=layout),
            torch.randint(classes, target, device=self.device),
            AUTOCAST_DTYPES.get(self.dtype),
        )


def measured(job: Job, threads: int, samples: int) -> dict[str, Any]:
    """``peak`` bytes over ``baseline``, ``seconds`` of steps; or ``error``, ``out_of_memory``."""
    values = {**vars(job), "network": vars(job.network)}
    return in_fresh_process(_measured, threads, job=values, samples=samples)


def _measured(job: dict[str, Any], samples: int) -> dict[str, Any]:
    # JSON has no tuples
    own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in job.items()}
    found = Job(**own | {"network": Network(**job["network"])})
    return measure_training(found.training, found.warm_up, device=found.device, samples=samples)
