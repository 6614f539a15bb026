"""Backwards that can't be differentiated again, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., Any]


class Anchor:
    """What a Function's input depends on, without the input.

    A Function that is not to be differentiated twice is given one and keeps it as
    ``ctx.anchor``; see :func:`first_order`.
    """

    def __init__(self, x: Tensor) -> None:
        connected = torch.is_grad_enabled() and x.requires_grad
        self.tensor = _Dependence.apply(x) if connected else None


def first_order(backward: Backward) -> Backward:
    """A Function's backward without second derivatives; asking for one raises RuntimeError.

    torch's ``once_differentiable`` ties gradients to such an error only where the gradient
    that came in can be differentiated itself, and only to what that depends on. Behind a loss
    that is linear in the output, or beside another path, what the node would add to a second
    derivative is left out in silence. Here gradients depend on all that the node's inputs do.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor | None) -> Any:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        # somebody keeps the graph of this backward
        inputs = [ctx.anchor.tensor, *ctx.saved_tensors, *gradients]
        inputs = [t for t in inputs if t is not None and t.requires_grad]
        there = [gradient for gradient in found if gradient is not None]
        tied = iter(_Tied.apply(len(inputs), *inputs, *there))
        return tuple(None if gradient is None else next(tied) for gradient in found)

    return wrapped


class _Dependence(torch.autograd.Function):
    """Nothing, that depends on x but keeps nothing of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        # only _Tied depends on it
        raise AssertionError


class _Tied(torch.autograd.Function):
    """Gradients as they are, whose own derivative is an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.detach() for gradient in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "effdense: no second derivatives through what runs in linear memory; for them set "
            'save="all", or undo effdense.convert by effdense.revert'
        )
