"""Blocks, transitions and sequences under torch.fx and TorchScript.

NOTE [ leaves ]
A traced model keeps memory and bits where its graph calls a module instead of what is in it.
So a block, a transition or a whole sequence of them is one node, unless something within is
asked for: then its code is traced through, and what nobody asks for is a node again.
torch.fx is asked for nothing. torchvision's ``create_feature_extractor`` knows the names, but
hands them to nobody: they are read where it keeps them. Where it only lists what there is
(``get_graph_node_names``), it is shown blocks and transitions.

NOTE [ what TorchScript compiles ]
The original's forward, as if this package weren't there: it reads the source of the
function behind ``__wrapped__``, and looks names up in the globals of the function itself.
So each class has a forward made with its original's globals, and the mixins' forwards,
whose code it runs, use no global name.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..recognition.objections import warn_once
from ..tracing import is_traced


def leaf_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A node that calls ``module``, or None: nothing traces, or what is in it is asked for."""
    # a list: torch.export of torch 2.7 cannot follow next() of a generator
    proxies: list[Any] = [x for x in (*args, *kwargs.values()) if is_traced(x)]
    if not proxies:
        return None
    tracer = proxies[0].tracer
    path = tracer.path_of_module(module)
    if not path:
        # the module itself is traced through
        return None
    within = [name for name in _asked_for() or () if name.startswith(f"{path}.")]
    if within:
        warn_once(module, f"{', '.join(within)} of it is asked for")
        return None
    return tracer.create_proxy("call_module", path, args, kwargs)


def sequence_call(features: Any, x: Any, pool: bool) -> Any:
    """Nodes that run a sequence of modules on a traced x, as few as what is asked for allows.

    Args:
        features: a :class:`SequentialForward`.
        x: what stands for its input.
        pool: whether ReLU and global average pooling follow.

    Returns:
        What stands for the output; None where it is to be traced through, or can't be pooled
        because the features themselves are asked for.
    """
    tracer = x.tracer
    path = tracer.path_of_module(features)
    asked = _asked_for() if hasattr(tracer, "node_to_qualname") else ()
    if not path or asked is None:
        return None
    named = [(f"{path}.{n}", module) for n, module in features._modules.items() if module]
    pieces = _pieces([any(_is_in(one, name) for one in asked) for name, _ in named])
    if pool and (path in asked or pieces[-1][2]):
        return None
    if not pool and pieces == [(0, len(named), False)]:
        return tracer.create_proxy("call_module", path, (x,), {})
    held = tracer.create_proxy("get_attr", path, (), {})
    for start, stop, single in pieces:
        if single:
            x = named[start][1](x)
        else:
            last = pool and stop == len(named)
            x = tracer.create_proxy("call_method", "part", (held, x, start, stop, last), {})
    return x


def over(mixin: Any, original: type[nn.Module]) -> Any:
    """``mixin``'s forward for a class over ``original``; NOTE [ what TorchScript compiles ]."""
    forward, plain = mixin.forward, original.forward
    if not isinstance(plain, types.FunctionType):
        return forward
    made = types.FunctionType(
        forward.__code__, plain.__globals__, plain.__name__, None, forward.__closure__
    )
    return functools.update_wrapper(made, plain)


def _pieces(asked: Sequence[bool]) -> list[tuple[int, int, bool]]:
    """Runs of modules that nobody asks for, (start, stop, False), and single ones between them."""
    found: list[tuple[int, int, bool]] = []
    for i, single in enumerate(asked):
        if found and not single and not found[-1][2]:
            found[-1] = (found[-1][0], i + 1, False)
        else:
            found.append((i, i + 1, single))
    return found


def _is_in(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _asked_for() -> list[str] | None:
    """The names of nodes that torchvision's create_feature_extractor, which traces, looks for."""
    frame = sys._getframe()
    while frame is not None:
        if (
            frame.f_code.co_name == "create_feature_extractor"
            and frame.f_globals.get("__name__") == "torchvision.models.feature_extraction"
        ):
            names = frame.f_locals.get("mode_return_nodes", {})
            return [*names.get(frame.f_locals.get("mode"), ())]
        frame = frame.f_back  # type: ignore[assignment]
    return None
