"""What goes wrong inside a process of a run; called with its rank before the run begins."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from effdense.engine.data.images import InMemory
from effdense.engine.distributed import joined_world
from tests.helpers import workers

_batches = InMemory.batches


def small_files(rank: int) -> None:
    """No file may grow beyond 16 KiB: what a full disk or a quota does to a checkpoint."""
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, 16 << 10))


def record_indices(rank: int) -> None:
    """Write what this process trains on to asked-RANK.pt: a list of batches per epoch."""
    epochs = []

    def recorded(self: InMemory, indices: Sequence[Any], epoch: int | None, device: Any) -> Any:
        if epoch is not None:
            epochs.append([chosen.tolist() for chosen in indices])
            torch.save(epochs, f"asked-{rank}.pt")
        return _batches(self, indices, epoch, device)

    InMemory.batches = recorded  # type: ignore[method-assign]


def _at_fifth_batch(rank: int, change: Any) -> None:
    def changed(self: InMemory, indices: Any, epoch: int | None, device: Any) -> Iterator[Any]:
        for number, (images, labels) in enumerate(_batches(self, indices, epoch, device), 1):
            if epoch is not None and number == 5:
                images = change(images)
            yield images, labels

    if rank == 1:
        InMemory.batches = changed  # type: ignore[method-assign]


def nan_images(rank: int) -> None:
    """The fifth batch of each epoch holds a NaN, on rank 1 alone."""
    _at_fifth_batch(rank, lambda images: images * float("nan"))


def stuck_reader(rank: int) -> None:
    """Reading the fifth batch takes for ever, on rank 1 alone."""
    _at_fifth_batch(rank, lambda images: time.sleep(1000))


def accumulated_steps(rank: int) -> None:
    """Instead of a run: frozen_steps in three parts each, saved as steps-RANK.pt."""
    with joined_world("cpu", threads=1) as world:
        torch.save(
            workers.frozen_steps(world, accumulate=3, channels_last=True), f"steps-{rank}.pt"
        )
    os._exit(0)
