"""Where a test's networks and images are: a CPU, or in turn each other device that there is.

The fixtures ``device`` and ``each_place`` (conftest.py) say where; what helpers make is put
there, and what a test makes itself goes through ``placed``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn

from effdense.backends.precision import float32_products
from effdense.recognition import objections

_place: ContextVar[torch.device | None] = ContextVar("_place", default=None)
_Placed = TypeVar("_Placed", bound=Tensor | nn.Module)


def place() -> torch.device:
    """Where the present test computes."""
    return _place.get() or torch.device("cpu")


def placed(made: _Placed) -> _Placed:
    """A tensor or module where the present test computes."""
    moved: Any = made.to(place())
    return moved


def generator() -> torch.Generator:
    """Of random numbers there."""
    kind = place().type
    # one that only pretends to be another has the CPU's
    return torch.Generator(kind if kind == "cuda" else "cpu")


@contextmanager
def at(kind: str) -> Iterator[torch.device]:
    """Inside, tests compute there: elsewhere than on a CPU float32 products exactly, and in the
    order that torch calls deterministic.
    """
    with ExitStack() as stack:
        if kind == "another":
            from tests.helpers import another_device

            # its tensors are of a class of their own, which elsewhere means that they are not plain
            stack.enter_context(mock.patch.object(objections, "Tensor", another_device.Elsewhere))
        device = torch.device(kind)
        before = _place.set(device)
        stack.callback(_place.reset, before)
        if kind != "cpu":
            stack.enter_context(float32_products(False))
            # some poolings have no such order, which is only said
            torch.use_deterministic_algorithms(True, warn_only=True)
            stack.callback(torch.use_deterministic_algorithms, False)
        yield device
