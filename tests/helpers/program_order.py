"""The interpreter runs a launch's programs one after the other, in order. A device does not."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

Index = tuple[int, int, int]


@contextlib.contextmanager
def programs_in(order: Callable[[list[Index]], list[Index]]) -> Iterator[list[int]]:
    """Inside, every launch runs its programs in ``order`` of their indices.

    Yields a list that holds, per launch, how many programs it had.
    """
    grids: list[int] = []
    remaining: Iterator[Index] = iter(())
    set_dim, set_index = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx

    def dim(x: int, y: int, z: int) -> None:
        nonlocal remaining
        programs = list(itertools.product(range(x), range(y), range(z)))
        ordered = order(programs)
        assert sorted(ordered) == programs
        grids.append(len(programs))
        remaining = iter(ordered)
        set_dim(x, y, z)

    def index(*_: int) -> None:
        set_index(*next(remaining))

    with (
        mock.patch.object(interpreter_builder, "set_grid_dim", dim),
        mock.patch.object(interpreter_builder, "set_grid_idx", index),
    ):
        yield grids


def shuffled(seed: int) -> Callable[[list[Index]], list[Index]]:
    return lambda programs: random.Random(seed).sample(programs, len(programs))


ORDERS: dict[str, Callable[[list[Index]], list[Index]]] = {
    "reversed": lambda programs: programs[::-1],
    "shuffled": shuffled(1),
}


def in_every_order(run: Callable[[], Any]) -> None:
    """``run`` makes the same bits, whatever the order of programs; it returns tensors."""
    expected = _tensors(run())
    for name, order in ORDERS.items():
        with programs_in(order) as grids:
            found = _tensors(run())
        assert max(grids) >= 3, "no launch has programs enough to be put in another order"
        for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(ours, theirs), f"tensor {i} differs, programs {name}"


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [] if found is None else [t for item in found for t in _tensors(item)]
