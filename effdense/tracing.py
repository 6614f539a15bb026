"""What compilers, exporters and subclasses of Tensor have a say in; what autograd recorded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
import torch.fx
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# Inside a recording (block/recording.py): what recorded operations read and nobody else keeps.
# No random state may be asked for there.
recorded_constants: ContextVar[list[Any] | None] = ContextVar("recorded_constants", default=None)


def graph_is_recorded() -> bool:
    """Whether a tracer wants to see plain operations (export, tracing, scripting)."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.jit.is_scripting()


def is_traced(x: Any) -> bool:
    """Whether x stands for a tensor in torch.fx's symbolic tracing."""
    return isinstance(x, torch.fx.Proxy)


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


def torch_function(
    position: int,
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """A function of a tensor, its argument at ``position``, as one of torch's own.

    Where the tensor is of a subclass, its ``__torch_function__`` says what is made of the
    result; inside, it is a plain tensor.
    """

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @functools.wraps(function)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            x: Any = args[position]
            if type(x) is Tensor:
                return function(*args, **kwargs)
            if has_torch_function((x,)):
                return handle_torch_function(call, (x,), *args, **kwargs)
            if _wraps_plainly(type(x)):
                given: Any = list(args)
                given[position] = x.as_subclass(Tensor)
                return function(*given, **kwargs)
            return function(*args, **kwargs)

        return call

    return decorate


def _wraps_plainly(kind: type) -> bool:
    """Whether a subclass of Tensor is one with more attributes, whose data is its own."""
    dispatch = getattr(kind, "__torch_dispatch__", None)
    return dispatch is torch._C._disabled_torch_dispatch_impl
