"""What compilers and exporters may look into, and what autograd recorded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def graph_is_recorded() -> bool:
    """Whether a tracer wants to see plain operations (export, tracing, scripting)."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.jit.is_scripting()


def outside_graphs(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``torch.compiler.disable`` that imports torch's compiler only once something is compiled."""
    disabled: Callable[_Arguments, _Result] | None = None

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        nonlocal disabled
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return call


def nodes_behind(*outputs: Tensor) -> list[Any]:
    """The nodes of autograd's graph behind some tensors, each once and after what it reads."""
    order: list[Any] = []
    seen = set()
    waiting = [(output.grad_fn, False) for output in outputs]
    while waiting:
        node, done = waiting.pop()
        if done:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            waiting.append((node, True))
            waiting += [(parent, False) for parent, _ in node.next_functions]
    return order
