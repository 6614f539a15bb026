"""Short cuts for torch's rules of shapes, of the operations that a DenseNet's step is made of.

On meta tensors torch works out every operation's result in Python, at up to milliseconds
each. The rules here are the same results in microseconds; where one isn't certain, torch's
is asked. Tests hold an estimate with them equal to one without.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Rule = Callable[[tuple[Any, ...], dict[str, Any]], Any]

_aten = torch.ops.aten


def meta_result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``func`` returns, or NotImplemented where torch must be asked."""
    rule = _RULES.get(func)
    if rule is None or not (args and isinstance(args[0], Tensor) and args[0].is_meta):
        return NotImplemented
    return rule(args, kwargs)


def _written_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0]


def _out_argument(name: str) -> Rule:
    def rule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # an empty one would be resized
        return kwargs[name] if kwargs[name].numel() else NotImplemented

    return rule


def _pointwise(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tensors of one type in row-major order, of one shape or vectors along its last dimension."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    shape, dtype = max((t.shape for t in tensors), key=len), tensors[0].dtype
    if not dtype.is_floating_point or kwargs:
        return NotImplemented
    for t in tensors:
        if t.dtype != dtype or t.shape not in (shape, shape[-1:]) or not _is_row_major(t):
            return NotImplemented
    if not all(isinstance(value, (Tensor, int, float)) for value in args):
        return NotImplemented
    return _empty(shape, dtype)


def _new(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """new_empty and new_zeros: (tensor, size)."""
    x, size = args
    if kwargs.keys() - {"dtype", "pin_memory"}:
        return NotImplemented
    return _empty(size, kwargs.get("dtype") or x.dtype)


def _like(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (x,) = args
    if kwargs.keys() - {"dtype", "pin_memory"} or not x.is_contiguous():
        return NotImplemented
    return _empty(x.shape, kwargs.get("dtype") or x.dtype)


def _empty(size: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _is_row_major(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
    return 0 not in strides and all(a >= b for a, b in pairwise(strides))


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, _, _, _, training = args[:6]
    if not training or weight is None:
        return NotImplemented
    size = (x.shape[1],)
    return torch.empty_like(x), _empty(size, weight.dtype), _empty(size, weight.dtype)


def _batch_norm_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _, x, weight, _, _, _, _, _, _, wanted = args
    if weight is None:
        return NotImplemented
    like = (x, weight, weight)
    return tuple(
        torch.empty_like(t) if want else None for t, want in zip(like, wanted, strict=True)
    )


_RULES: dict[Any, Rule] = {
    _aten.native_batch_norm.default: _batch_norm,
    _aten.native_batch_norm_backward.default: _batch_norm_backward,
    _aten.new_empty.default: _new,
    _aten.new_zeros.default: _new,
    _aten.empty_like.default: _like,
    _aten.zeros_like.default: _like,
    _aten.threshold_backward.grad_input: _out_argument("grad_input"),
}
for _op in (
    _aten.add_.Tensor,
    _aten.mul_.Tensor,
    _aten.sub_.Tensor,
    _aten.div_.Tensor,
    _aten.div_.Scalar,
    _aten.addcmul_.default,
    _aten.addcdiv_.default,
    _aten.addmm_.default,
    _aten.pow_.Scalar,
    _aten.sqrt_.default,
    _aten.relu_.default,
    _aten.zero_.default,
    _aten.fill_.Scalar,
    _aten.copy_.default,
    _aten.lerp_.Scalar,
):
    _RULES[_op] = _written_argument
for _op in (
    _aten.add.out,
    _aten.sub.out,
    _aten.mul.out,
    _aten.addcmul.out,
    _aten.mm.out,
    _aten.mean.out,
    _aten.sum.IntList_out,
):
    _RULES[_op] = _out_argument("out")
for _op in (
    _aten.add.Tensor,
    _aten.sub.Tensor,
    _aten.mul.Tensor,
    _aten.div.Tensor,
    _aten.addcmul.default,
    _aten.rsqrt.default,
    _aten.threshold_backward.default,
):
    _RULES[_op] = _pointwise
