"""What a CPU's libraries take beside tensors: memory inside operations, and compiled code."""

from __future__ import annotations

import bisect
import functools
import math
from typing import Any

import torch
from torch import Tensor

from .meta import stands_for

_CONVOLUTIONS = (
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
)
_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.mm.out,
    torch.ops.aten.addmm.default,
    torch.ops.aten.addmm_.default,
)
# oneDNN compiles a product of 16-bit matrices anew for every shape, and keeps the code:
# measured, so much of each, and of so many (its documented capacity).
_CODE_BYTES, _COMPILED_PRODUCTS = 512 << 10, 1024


class Workspaces:
    """Of one step on meta tensors that stand for a CPU's; of any other, nothing."""

    def __init__(self) -> None:
        self._seen = stands_for() == "cpu"
        # by when
        self._scratch: dict[int, int] = {}
        # by what a product was compiled for: when, in order
        self._compiled: dict[tuple[Any, ...], int] = {}

    def see(self, when: int, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """An operation that has run at some time, none before the last."""
        if not self._seen:
            return
        if func in _CONVOLUTIONS and args[0].is_meta:
            nbytes = _columns_bytes(func, args, out)
            self._scratch[when] = max(nbytes, self._scratch.get(when, 0))
        if func in _PRODUCTS and out.is_meta and is_compiled_for(out.dtype):
            shapes = [(t.shape, t.stride()) for t in (*args, out) if isinstance(t, Tensor)]
            self._compiled.setdefault((out.dtype, *shapes), when)

    def at(self, when: int) -> int:
        """Bytes taken at some time of the step, all of which has been seen."""
        code = bisect.bisect_right(self._times, when) * _CODE_BYTES
        return self._scratch.get(when, 0) + code

    @functools.cached_property
    def _times(self) -> list[int]:
        return list(self._compiled.values())[:_COMPILED_PRODUCTS]


def is_compiled_for(dtype: torch.dtype) -> bool:
    """Whether matrix products of this type are oneDNN's on this machine's CPU."""
    return dtype.itemsize == 2 and _is_onednn_s(dtype)


def _columns_bytes(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """What a convolution on a CPU takes inside, where oneDNN doesn't have the type.

    torch then lays out each output position's window as a column (im2col) of the whole batch.
    Measured: one such matrix, three in backward in 3-D; none for 1x1.
    """
    forward = func is _CONVOLUTIONS[0]
    (x, weight), y = (args[:2], out) if forward else (args[1:3], args[0])
    taps = math.prod(weight.shape[2:])
    if taps == 1 or _is_onednn_s(x.dtype):
        return 0
    columns = x.shape[1] * taps * y.shape[0] * math.prod(y.shape[2:]) * x.element_size()
    return columns * (1 if forward or weight.dim() < 5 else 3)


@functools.cache
def _is_onednn_s(dtype: torch.dtype) -> bool:
    """Whether torch computes convolutions of this type by oneDNN, on this machine's CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32
