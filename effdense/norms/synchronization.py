"""Whose positions a norm's batch statistics are taken over.

NOTE [ synchronised batch norm ]
Norms that synchronise take their statistics over the positions of every process of a group.
Each process reduces its own share and the shares are merged: (mean, variance) by their
counts, so uneven ones weigh as they should and one without images is there with weight 0,
in every collective. Backward needs the sums S and T over all positions, but only where they
correct a gradient; gamma's and beta's gradients stay sums over the process's own share,
which DistributedDataParallel averages, as with torch's SyncBatchNorm.

What goes through the collectives follows from the shared statistics and the deferred
correction (dense_block.py): a dense layer merges the statistics of its k new channels and of
its bottleneck in forward, and sums two vectors of each of these in backward, whatever the
width that it reads. Every process makes the same collectives in the same order, as they
depend on the modules alone; backward makes none of forward's again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..backends.base import Statistics
from ..tracing import recorded_constants

_alone: ContextVar[bool] = ContextVar("alone", default=False)
_images: ContextVar[tuple[int, ...] | None] = ContextVar("images", default=None)


class Batch:
    """The positions that statistics are taken over: ``count`` of them, all this process's."""

    def __init__(self, count: int) -> None:
        self.count = count

    def merge(self, statistics: Statistics) -> None:
        """Make this process's mean (c,) and biased variance (c,) those over all positions."""

    def sum(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Two sums (c,) over all positions, from those over this process's."""
        return s, t


class SharedBatch(Batch):
    """The positions of all processes of ``group``, ``counts`` of each.

    Every method is a collective.
    """

    def __init__(self, group: Any, counts: tuple[int, ...]) -> None:
        super().__init__(sum(counts))
        self._group, self._counts = group, counts

    @classmethod
    def of(cls, group: Any, images: int, per_image: int, device: torch.device) -> SharedBatch:
        """Of this process's ``images``; a collective, unless all know how many each has."""
        known = _known(group)
        if known is None:
            own = torch.tensor([images * per_image], device=device)
            # every process waits here for its device, and for the others
            return cls(group, tuple(_gathered(own, group).flatten().tolist()))
        if known[dist.get_rank(group)] != images:
            raise RuntimeError(
                f"effdense: this process said it had {known[dist.get_rank(group)]} images and "
                f"has {images}"
            )
        return cls(group, tuple(n * per_image for n in known))

    def merge(self, statistics: Statistics) -> None:
        # Chan, Golub, LeVeque 1979; by the same operations everywhere, so with the same bits
        means, variances = _gathered(torch.stack(statistics), self._group).unbind(1)
        weights = _weights(self._counts, means.device, means.dtype)
        constants = recorded_constants.get()
        if constants is not None:
            constants.append(weights)
        mean = (weights * means).sum(0)
        between = (means - mean).square_()
        statistics.mean.copy_(mean)
        statistics.var.copy_((weights * (variances + between)).sum(0))

    def sum(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        together = torch.stack([s, t])
        dist.all_reduce(together, group=self._group)
        return together[0], together[1]


def _gathered(own: Tensor, group: Any) -> Tensor:
    """``own`` of all processes: (N, *shape)."""
    # into one tensor would spare a copy, but not every backend can
    all_processes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_processes, own, group=group)
    return torch.stack(all_processes)


@functools.lru_cache(maxsize=64)
def _weights(counts: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Each process's share of all positions, (N, 1)."""
    return torch.tensor(counts, dtype=dtype, device=device).unsqueeze(1) / sum(counts)


@contextlib.contextmanager
def known_images(images: Sequence[int]) -> Iterator[None]:
    """Inside, every process has so many images, in the order of ranks, and need not ask.

    The same in all processes. Norms of smaller groups ask all the same. Without it every forward
    waits for its device once for each block, and :func:`effdense.cuda_graphs` leaves norms that
    synchronise out.
    """
    token = _images.set(tuple(images))
    try:
        yield
    finally:
        _images.reset(token)


def process_group(norm: nn.Module) -> Any:
    """The group over which a norm takes its batch statistics now; None for this process alone.

    As torch's SyncBatchNorm: in training, in an initialised group of more than one process.
    """
    # in its own attributes: asking a module for what it hasn't got is slow
    if "process_group" not in vars(norm) or not norm.training or _alone.get():
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group: Any = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def sharing(norm: nn.Module) -> tuple[Any, tuple[int, ...] | None]:
    """The group over which a norm takes its batch statistics now, and the images of each process.

    These are None where each process must be asked; both are where the norm does not synchronise.
    """
    group = process_group(norm)
    return group, None if group is None else _known(group)


def _known(group: Any) -> tuple[int, ...] | None:
    """The images of each of a group's processes, where they have been said."""
    known = _images.get()
    return None if known is None or len(known) != dist.get_world_size(group) else known


def agreed(holds: bool, group: Any, device: torch.device) -> bool:
    """Whether ``holds`` in every process of ``group``; a collective, which is waited for."""
    found = torch.tensor([int(holds)], dtype=torch.int32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=group)
    return bool(found.item())


def synchronises(module: nn.Module) -> bool:
    """Whether a norm in ``module`` shares its batch statistics now."""
    return any(process_group(each) is not None for each in module.modules())


def process_groups(module: nn.Module) -> dict[int, Any]:
    """The groups that norms in ``module`` name, by id: a ``memo`` for copies, which keep them."""
    groups = (getattr(each, "process_group", None) for each in module.modules())
    return {id(group): group for group in groups if group is not None}


@contextlib.contextmanager
def unsynchronised() -> Iterator[None]:
    """Inside, no norm waits for another process: every one takes this process's statistics."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)
