"""A training of a network in a process of its own, for its memory and time.

Run as ``python -m effdense.commands.measure REQUEST`` by :func:`measured`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import effdense

from .. import reference
from ..machine.measurement import answer, ask_fresh_process, cuda_peak, resident_peak, timed
from ..memory.estimation import AMP_DTYPES, OPTIMIZERS
from ..memory.timeline import Training
from .network import Network


@dataclass(frozen=True)
class Job:
    """One training: of the naive network (``save`` None) or ours, in float32 or under autocast.

    ``classes`` is the output's shape without its channels: the shape of the target.
    """

    network: Network
    save: str | None
    shape: tuple[int, ...]
    target: tuple[int, ...]
    num_classes: int
    device: str = "cpu"
    amp: str = "none"
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
            OPTIMIZERS["sgd-momentum"](list(model.parameters())),
            torch.randn(shape, device=self.device).to(memory_format=layout),
            torch.randint(classes, target, device=self.device),
            AMP_DTYPES[self.amp],
        )


def measured(job: Job, threads: int, samples: int) -> dict[str, Any]:
    """``peak`` bytes over ``baseline``, ``seconds`` of steps; or ``error``, ``out_of_memory``."""
    request = {**vars(job), "network": job.network.request()}
    request |= {"threads": threads, "samples": samples}
    return ask_fresh_process("effdense.commands.measure", request, threads)


def _measure(request: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(request.pop("threads"))
    samples = request.pop("samples")
    network = Network(**request.pop("network"))
    # JSON has no tuples
    lists = {name: tuple(value) for name, value in request.items() if isinstance(value, list)}
    job = Job(network, **{**request, **lists})
    on_gpu = job.device.startswith("cuda")
    trainings: list[Training] = []

    def train() -> None:
        training = job.training()
        trainings.append(training)
        # as in every step but a training's first
        training.make_optimizer_state()
        training.step()

    if on_gpu:
        found = cuda_peak(train, job.warm_up, job.device)
    else:
        found = resident_peak(train, job.warm_up)
    step = trainings[0].step
    # on a GPU a step may be shorter than its start
    steps = max(1, int(0.2 / max(timed(step, 1, on_gpu), 1e-3))) if on_gpu else 1
    seconds: Sequence[float] = [timed(step, steps, on_gpu) / steps for _ in range(samples)]
    return {**found._asdict(), "seconds": seconds}


if __name__ == "__main__":
    answer(_measure)
