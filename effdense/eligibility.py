"""Which modules the fused path can honour, read afresh at every forward.

The fused path never calls a layer's children: it reads their parameters. Anything a
child would do beyond its published mathematics (hooks, parametrisations, another
type, a bias) would be lost without a word, so each of these sends the block to the
plain path instead, with one warning that names it.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .reference import DenseLayer

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)

_warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its type's forward.

    Hooks registered for all modules don't count: they see blocks and transitions, and
    nothing inside a fused one.
    """
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def refuse_replica(module: nn.Module) -> None:
    """Raise in a copy made by ``nn.DataParallel``."""
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            "effdense does not run under nn.DataParallel; use one process per device with "
            "torch.nn.parallel.DistributedDataParallel (DDP)"
        )


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


def warn_once(module: nn.Module, reason: str) -> None:
    """Say once per module and reason that the plain path is taken."""
    seen = _warned.setdefault(module, set())
    if reason not in seen:
        seen.add(reason)
        warnings.warn(
            f"effdense: a {type(module).__name__} runs layer by layer, in quadratic memory: "
            f"{reason}",
            stacklevel=3,
        )


def block_objection(layers: Sequence[Any]) -> str | None:
    """Why a block of these layers can't be fused, or None; they must all grow alike."""
    if not layers:
        return None
    first = layers[0]._modules
    width = getattr(first.get("norm1"), "num_features", 0)
    growth_rate = getattr(first.get("conv2", first.get("conv1")), "out_channels", 0)
    for i, layer in enumerate(layers):
        objection = _layer_objection(layer, width + i * growth_rate, growth_rate)
        if objection is not None:
            return objection
    return None


def _layer_objection(layer: nn.Module, width: int, growth_rate: int) -> str | None:
    """Why a dense layer can't be fused, or None.

    Expects norm1, relu1, conv1 and, where there is a bottleneck, norm2, relu2, conv2,
    from ``width`` channels to ``growth_rate`` new ones.
    """
    if type(layer).forward is not DenseLayer.forward:
        return f"a dense layer is a {type(layer).__name__} with a forward of its own"
    if has_hooks(layer):
        return "a dense layer has hooks"
    children: dict[str, Any] = layer._modules
    plain = "norm2" not in children
    expected = {"norm1", "relu1", "conv1"} | (set() if plain else {"norm2", "relu2", "conv2"})
    if set(children) != expected:
        return f"a dense layer's children are {sorted(children)}, not {sorted(expected)}"
    kernels = {"conv1": 3} if plain else {"conv1": 1, "conv2": 3}
    for name, kernel in kernels.items():
        objection = _conv_objection(name, children[name], kernel)
        if objection:
            return objection
    objection = _norm_and_relu_objection(children, ["1"] if plain else ["1", "2"])
    if objection:
        return objection
    widths = [width, growth_rate] if plain else [width, children["conv1"].out_channels, growth_rate]
    found = [(children[name].in_channels, children[name].out_channels) for name in kernels]
    norms = [children[name.replace("conv", "norm")].num_features for name in kernels]
    if found != list(pairwise(widths)) or norms != widths[:-1]:
        return (
            f"a layer's convolutions have {found} channels and its norms {norms}, "
            f"for {width} features and {growth_rate} new ones"
        )
    return None


def transition_objection(transition: nn.Module) -> str | None:
    """Why a transition (norm, relu, conv, pool) can't be fused, or None."""
    children = transition._modules
    if list(children) != ["norm", "relu", "conv", "pool"]:
        return f"a transition's children are {list(children)}, not norm, relu, conv, pool"
    pool = children["pool"]
    if not isinstance(pool, _POOLS) or has_hooks(pool):
        return f"pool is a {type(pool).__name__}, not a plain average pooling without hooks"
    if (
        {_scalar(pool.kernel_size), _scalar(pool.stride)} != {2}
        or _scalar(pool.padding) != 0
        or pool.ceil_mode
        or getattr(pool, "divisor_override", None) is not None
    ):
        return f"pool is {pool}, not an average over windows of 2"
    return _conv_objection("conv", children["conv"], 1) or _norm_and_relu_objection(children, [""])


def norm_objection(name: str, norm: nn.Module | None) -> str | None:
    """Why one batch norm can't be fused, or None."""
    if type(norm) not in _NORMS:
        return f"{name} is a {type(norm).__name__}, not a batch norm"
    assert norm is not None
    if norm.weight is None or norm.bias is None:
        return f"{name} has no weight and bias (affine=False)"
    return _module_objection(name, norm)


def _norm_and_relu_objection(
    children: dict[str, nn.Module | None], suffixes: list[str]
) -> str | None:
    for suffix in suffixes:
        relu = children["relu" + suffix]
        if type(relu) is not nn.ReLU:
            return f"relu{suffix} is a {type(relu).__name__}"
        objection = norm_objection("norm" + suffix, children["norm" + suffix])
        objection = objection or _module_objection("relu" + suffix, relu)
        if objection:
            return objection
    return None


def _conv_objection(name: str, conv: nn.Module | None, kernel: int) -> str | None:
    if type(conv) not in _CONVS:
        return f"{name} is a {type(conv).__name__}, not a convolution"
    assert isinstance(conv, nn.modules.conv._ConvNd)
    if (
        set(conv.kernel_size) != {kernel}
        or set(conv.stride) != {1}
        or set(conv.dilation) != {1}
        or isinstance(conv.padding, str)
        or set(conv.padding) != {kernel // 2}
        or conv.groups != 1
        or conv.padding_mode != "zeros"
        or conv.bias is not None
    ):
        return f"{name} is {conv}, not a {kernel}-wide convolution of stride 1 without bias"
    return _module_objection(name, conv)


def _module_objection(name: str, module: nn.Module) -> str | None:
    if has_hooks(module):
        return f"{name} has hooks (or a weight computed by one)"
    if parametrize.is_parametrized(module):
        return f"{name} is parametrised"
    for parameter in module._parameters.values():
        if parameter is not None and type(parameter) not in (nn.Parameter, Tensor):
            return f"{name} holds a {type(parameter).__name__}"
    return None


def _scalar(size: object) -> object:
    """2 for 2, (2,) and (2, 2); the size itself where its entries differ."""
    if isinstance(size, tuple) and len(set(size)) == 1:
        return size[0]
    return size
