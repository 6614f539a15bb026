"""torch's operations as a capture sees them: those of a DenseNet, and that others only compute."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from .source import Unreadable
from .symbols import Raised, Symbol, Unknown, scalar

_TORCH = os.path.dirname(torch.__file__) + os.sep


def is_torchs(function: Any) -> bool:
    return isinstance(function, types.FunctionType) and function.__code__.co_filename.startswith(
        _TORCH
    )


@functools.cache
def operations() -> frozenset[Any]:
    """torch's functions of tensors: all they do is compute."""
    found = [
        function
        for name, function in vars(F).items()
        if not name.startswith("_") and callable(function) and not isinstance(function, type)
    ]
    for name in dir(torch._C._VariableFunctions):
        if not name.startswith("_") and name not in NO_FUNCTIONS:
            found.append(getattr(torch, name, None))
            found.append(getattr(torch._C._VariableFunctions, name))
    for part in (torch.special, torch.linalg, torch.fft):
        found += [f for n, f in vars(part).items() if not n.startswith("_") and callable(f)]
    found += [f for f in vars(torch.functional).values() if is_torchs(f)]
    found += [f for f in vars(torch).values() if getattr(f, "__module__", "") == "torch.functional"]
    for function in (torch.is_grad_enabled, torch.is_autocast_enabled, torch.get_autocast_dtype):
        found.append(function)
    return frozenset(f for f in found if f is not None and getattr(f, "__hash__", None))


def operations_or_none(value: Any) -> Any:
    try:
        return operations() | CONTEXTS if hash(value) else ()
    except TypeError:
        return ()


@functools.cache
def same_as_false() -> frozenset[Any]:
    """Questions whose answer is no wherever a converted module runs at all."""
    return frozenset(
        {
            torch.jit.is_scripting,
            torch.jit.is_tracing,
            torch.compiler.is_exporting,
            torch._C._get_tracing_state,
        }
    )


@functools.cache
def module_methods() -> frozenset[Any]:
    """Methods of torch's modules that only say what they hold."""
    return frozenset(
        {
            nn.Module.children,
            nn.Module.named_children,
            nn.Module.modules,
            nn.ModuleDict.items,
            nn.ModuleDict.values,
            nn.ModuleDict.keys,
            nn.ModuleDict.__len__,
            nn.ModuleList.__len__,
            nn.Sequential.__len__,
        }
    )


def _handle_relu(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    bound = dict(zip(("input", "inplace"), args, strict=False)) | kwargs
    if not isinstance(bound.get("input"), Symbol) or bound.keys() - {"input", "inplace"}:
        raise Unreadable("relu of something else than a tensor")
    return capture._relu(bound["input"], bound.get("inplace", False) is not False)


def _handle_relu_(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return _handle_relu(capture, args, kwargs | {"inplace": True})


def _handle_cat(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    bound = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
    dim = bound.pop("dim", bound.pop("axis", 0))
    tensors = bound.pop("tensors", None)
    if bound or not isinstance(tensors, (list, tuple)) or not tensors:
        raise Unreadable("cat of something else than a list of tensors")
    if not all(isinstance(x, Symbol) for x in tensors):
        raise Unreadable("cat of something else than tensors")
    if len(tensors) == 1 and capture._contexts:
        return capture._operation("cat", [tuple(tensors), dim], {})
    rank = next((x.rank for x in tensors if x.rank is not None), None)
    if isinstance(dim, int) and rank is not None and (dim == 1 or dim == 1 - rank):
        return Symbol(capture.cat([x.node for x in tensors]), rank)
    return capture._operation("cat", [tuple(tensors), dim], {})


def _handle_dropout(name: str, channels: bool) -> Any:
    def handle(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        names = ("input", "p", "training", "inplace")
        bound = dict(zip(names, args, strict=False)) | kwargs
        x, rate = bound.get("input"), bound.get("p", 0.5)
        if bound.get("inplace", False) is not False and isinstance(x, Symbol):
            return capture._operation(f"{name}_", [x, rate, bound.get("training", True)], {})
        if not isinstance(x, Symbol) or not isinstance(rate, (int, float)):
            return capture._operation(name, args, kwargs)
        return capture._dropout(x, rate, bound.get("training", True), channels)

    return handle


def _handle_avg_pool(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    names = ("input", "kernel_size", "stride", "padding")
    bound = dict(zip(names, args, strict=False)) | kwargs
    x, size = bound.pop("input", None), bound.pop("kernel_size", None)
    stride, padding = bound.pop("stride", None), bound.pop("padding", 0)
    windows = {2} == {scalar(size), scalar(size if stride is None else stride)}
    if isinstance(x, Symbol) and not bound and len(args) <= 4 and windows and scalar(padding) == 0:
        return Symbol(capture.node("avg_pool", x.node), x.rank)
    return capture._operation("avg_pool", args, kwargs)


def _handle_batch_norm(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    names = (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("training", "momentum", "eps"),
    )
    bound = dict(zip(names, args, strict=False)) | kwargs
    x = bound.get("input")
    if not capture._norms or not isinstance(x, Symbol):
        return _uncertain_batch_norm(capture, bound, x)
    norm = capture._norms[-1]
    mode = dict(capture._paths[-1].decisions).get(("training", norm))
    tracked = norm.running_mean is not None and norm.running_var is not None
    if isinstance(bound.get("training"), Unknown):
        return _uncertain_batch_norm(capture, bound, x)
    if bound.get("training", False) != (mode is True or not tracked) or (mode is None and tracked):
        return _uncertain_batch_norm(capture, bound, x)
    expected = {
        "running_mean": norm.running_mean if mode is not True or norm.track_running_stats else None,
        "running_var": norm.running_var if mode is not True or norm.track_running_stats else None,
        "weight": norm.weight,
        "bias": norm.bias,
    }
    for name, tensor in expected.items():
        symbol = bound.get(name)
        if (symbol is None) != (tensor is None):
            return _uncertain_batch_norm(capture, bound, x)
        if tensor is not None and symbol is not capture._tensor(tensor):
            return _uncertain_batch_norm(capture, bound, x)
    if bound.get("eps", 1e-5) != norm.eps:
        return _uncertain_batch_norm(capture, bound, x)
    # in eval mode momentum is not used
    if mode is True and tracked and bound.get("momentum", 0.1) != norm.momentum:
        return _uncertain_batch_norm(capture, bound, x)
    return Symbol(capture.node("norm", norm, x.node), x.rank)


def _handle_is_grad_enabled(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return Unknown(("is_grad_enabled", capture._contexts))


def _uncertain_batch_norm(capture: Any, bound: dict[str, Any], x: Any) -> Any:
    capture.used(bound)
    for name in ("running_mean", "running_var"):
        if isinstance(bound.get(name), Symbol):
            capture._in_place(bound[name], capture.unknown())
    return capture._operation("batch_norm", [x], {})


def _handle_checkpoint(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``checkpoint(f, *args)``: what f computes."""
    own = {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"}
    if "context_fn" in kwargs:
        raise Unreadable("it checkpoints in contexts of its own")
    return capture.call(args[0], args[1:], {n: v for n, v in kwargs.items() if n not in own})


def _handle_assert(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if not capture._truth(args[0]):
        raise Raised


@functools.cache
def handlers() -> dict[Any, Any]:
    return {
        F.relu: _handle_relu,
        torch.relu: _handle_relu,
        F.relu_: _handle_relu_,
        torch.relu_: _handle_relu_,
        torch.cat: _handle_cat,
        torch.concat: _handle_cat,
        torch.concatenate: _handle_cat,
        DROPOUT: _handle_dropout("dropout", False),
        F.dropout1d: _handle_dropout("dropout1d", True),
        F.dropout2d: _handle_dropout("dropout2d", True),
        F.dropout3d: _handle_dropout("dropout3d", True),
        F.avg_pool1d: _handle_avg_pool,
        F.avg_pool2d: _handle_avg_pool,
        F.avg_pool3d: _handle_avg_pool,
        F.batch_norm: _handle_batch_norm,
        torch.utils.checkpoint.checkpoint: _handle_checkpoint,
        torch._assert: _handle_assert,
        torch.is_grad_enabled: _handle_is_grad_enabled,
    }


CONTEXTS: frozenset[Any] = frozenset(
    {torch.no_grad, torch.enable_grad, torch.autocast, torch.amp.autocast}
)


DROPOUT = F.dropout


DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


# Tensors' methods and torch's functions that do more, or other things, than compute.
NO_FUNCTIONS = frozenset(
    {
        *("register_hook", "register_post_accumulate_grad_hook", "backward", "retain_grad"),
        *("requires_grad_", "set_", "share_memory_", "resize_", "resize_as_", "detach_", "apply_"),
        *("map_", "numpy", "data_ptr", "storage", "untyped_storage", "as_subclass", "module_load"),
        *("from_numpy", "from_file", "set_data", "manual_seed", "seed", "swap_tensors"),
        *("rename_", "pin_memory", "record_stream"),
    }
)


# Operations whose result is never a view of what they are given.
ELEMENTWISE = frozenset(
    {
        *(
            "add",
            "sub",
            "mult",
            "mul",
            "div",
            "pow",
            "matmult",
            "usub",
            "exp",
            "log",
            "sqrt",
            "rsqrt",
        ),
        *("tanh", "sigmoid", "gelu", "silu", "mish", "elu", "leaky_relu", "hardtanh", "abs", "neg"),
        *("softplus", "celu", "selu", "hardswish", "hardsigmoid", "relu6", "clamp", "bernoulli"),
        *("batch_norm", "layer_norm", "group_norm", "instance_norm", "mod", "floordiv"),
    }
)


FRESH = ELEMENTWISE | {
    *(
        "mean",
        "sum",
        "var",
        "var_mean",
        "std",
        "new_empty",
        "new_zeros",
        "new_ones",
        "zeros",
        "ones",
    ),
    *("empty_like", "zeros_like", "ones_like", "rand_like", "randn_like", "rand", "randn", "cat"),
    *("stack", "conv1d", "conv2d", "conv3d", "linear", "matmul", "bmm", "clone", "softmax"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool", "interpolate", "einsum"),
    *("gt", "lt", "gte", "lte", "eq", "noteq"),
}


FRESH_MODULES = frozenset(
    f"torch.nn.modules.{name}"
    for name in ("conv", "batchnorm", "instancenorm", "normalization", "activation", "linear")
)
