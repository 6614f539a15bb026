"""Which modules the fused path can honour, read afresh at every forward.

The fused path never calls a layer's children: it reads their parameters. Anything a
child would do beyond its published mathematics (hooks, parametrisations, another
type, a bias) would be lost without a word, so each of these sends the block to the
plain path instead, with one warning that names it.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import Tensor, nn

from ..norms.sync_batch_norm import SyncBatchNorm

SYNC_BATCH_NORMS = (nn.SyncBatchNorm, SyncBatchNorm)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *SYNC_BATCH_NORMS)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)

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


def warn_once(module: nn.Module, reason: str) -> None:
    """Say once per module and reason that the plain path is taken."""
    if reason.endswith(" holds a FakeTensor"):
        return  # torch 2.7 exports so, which takes no memory
    seen = _warned.setdefault(module, set())
    if reason not in seen:
        seen.add(reason)
        warnings.warn(
            f"effdense: a {type(module).__name__} runs layer by layer, in quadratic memory: "
            f"{reason}",
            stacklevel=3,
        )


def norm_objection(name: str, norm: nn.Module | None) -> str | None:
    """Why one batch norm can't be fused, or None."""
    if type(norm) not in BATCH_NORMS:
        return f"{name} is a {type(norm).__name__}, not a batch norm"
    assert norm is not None
    objection, parameters = module_objection(name, norm), norm._parameters
    if objection is None and (parameters["weight"] is None or parameters["bias"] is None):
        return f"{name} has no weight and bias (affine=False)"
    return objection


def conv_objection(name: str, conv: nn.Module | None, kernel: int) -> str | None:
    """Why one convolution can't be fused, or None; of 1-wide ones a bias is in the way."""
    if type(conv) not in CONVOLUTIONS:
        return f"{name} is a {type(conv).__name__}, not a convolution"
    assert isinstance(conv, nn.modules.conv._ConvNd)
    ones = (1,) * len(conv.kernel_size)
    if (
        conv.kernel_size != (kernel,) * len(ones)
        or conv.stride != ones
        or conv.dilation != ones
        or conv.padding != (kernel // 2,) * len(ones)
        or conv.groups != 1
        or conv.padding_mode != "zeros"
        or (kernel == 1 and conv._parameters.get("bias") is not None)
    ):
        without = " without bias" if kernel == 1 else ""
        return f"{name} is {conv}, not a {kernel}-wide convolution of stride 1{without}"
    return module_objection(name, conv)


def pool_objection(name: str, pool: Any) -> str | None:
    """Why an average pooling isn't a transition's, or None."""
    if not isinstance(pool, AVERAGE_POOLS):
        return f"{name} is a {type(pool).__name__}, not a plain average pooling without hooks"
    if (
        {_scalar(pool.kernel_size), _scalar(pool.stride)} != {2}
        or _scalar(pool.padding) != 0
        or pool.ceil_mode
        or getattr(pool, "divisor_override", None) is not None
    ):
        return f"{name} is {pool}, not an average over windows of 2"
    return None


def module_objection(name: str, module: nn.Module) -> str | None:
    """What makes calling a module more than its type's mathematics, or None."""
    if has_hooks(module):
        return f"{name} has hooks (or a weight computed by one)"
    # is_parametrized, but asking a module for what it hasn't got is slow
    if "parametrizations" in module._modules:
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
