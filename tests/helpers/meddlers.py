"""What goes wrong inside a process of a run; called with its rank before the run begins."""

from __future__ import annotations

import itertools
import os
import random
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from effdense import errors
from effdense.engine.data.images import InMemory
from effdense.engine.distributed import joined_world
from effdense.engine.trainer import Trainer
from tests.helpers import workers

_batches = InMemory.batches


def small_files(rank: int) -> None:
    """No file may grow beyond 16 KiB: what a full disk or a quota does to a checkpoint."""
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, 16 << 10))


def small_files_of_another(rank: int) -> None:
    """Rank 1's disk takes no more than 16 KiB; rank 0's is well."""
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, 16 << 10))


def _in_backward(rank: int, step: int, happens: Callable[[], None]) -> None:
    """In the middle of a step's backward, between the buckets that DDP reduces, on rank 1 alone.

    Steps count over epochs, from 1. No process waits long for others to speak first.
    """
    errors._GRACE_SECONDS = 2.0
    if rank != 1:
        return
    made = Trainer.__init__
    began = Trainer.step
    steps = itertools.count(1)

    def step_begins(self: Trainer, *arguments: Any, **options: Any) -> Any:
        self.at_step = next(steps)  # type: ignore[attr-defined]
        return began(self, *arguments, **options)

    def initialised(self: Trainer, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        middle = list(self.network.parameters())[len(list(self.network.parameters())) // 2]

        def after(_: torch.Tensor) -> None:
            if getattr(self, "at_step", 0) == step:
                happens()

        middle.register_post_accumulate_grad_hook(after)

    Trainer.__init__ = initialised  # type: ignore[method-assign]
    Trainer.step = step_begins  # type: ignore[method-assign]


def killed_before_step(rank: int, step: int) -> None:
    """Every process is killed before a step, counted over epochs from 1."""
    began = Trainer.step
    steps = itertools.count(1)

    def step_begins(self: Trainer, *arguments: Any, **options: Any) -> Any:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return began(self, *arguments, **options)

    Trainer.step = step_begins  # type: ignore[method-assign]


def wrong_clocks(rank: int) -> None:
    """Each rank's clock is an hour before the one's before it, and jumps to and fro by a day.

    That is the clock of the day; what measures durations never goes back.
    """
    right, jumps = time.time, random.Random(rank)

    def wrong() -> float:
        return right() + 3600 * rank + jumps.uniform(-86400, 86400)

    time.time = wrong
    time.time_ns = lambda: int(wrong() * 1e9)


def failing_collective(rank: int) -> None:
    """The reduction of gradients raises in backward of step 8, on rank 1 alone."""

    def fails() -> None:
        raise torch.distributed.DistBackendError("NCCL error: unhandled system error (injected)")

    _in_backward(rank, 8, fails)


def late(rank: int) -> None:
    """Rank 1 is late for the reduction of gradients in step 8, by two seconds."""
    _in_backward(rank, 8, lambda: time.sleep(2))


def broken_pipe(rank: int) -> None:
    """In backward of step 8 rank 1's connections to one other rank break."""

    def breaks() -> None:
        sockets: dict[Any, list[socket.socket]] = {}
        for entry in os.listdir("/proc/self/fd"):
            try:
                found = socket.socket(fileno=os.dup(int(entry)))
                sockets.setdefault(found.getpeername(), []).append(found)
            except OSError:
                continue
        # to rank 0 goes the store's too: what gloo holds is met under the port of the other's
        # listener or under ours, and the store's port is known
        store = int(os.environ["MASTER_PORT"])
        pairs = [each for peer, each in sockets.items() if peer[1:2] != (store,)]
        pairs[-1][0].shutdown(socket.SHUT_RDWR)

    _in_backward(rank, 8, breaks)


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
