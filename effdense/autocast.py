"""Autocast's state by device, and what stands for it on meta, where torch has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What a step on meta tensors computes in; None outside autocast, and where it is switched off.
_on_meta: ContextVar[torch.dtype | None] = ContextVar("_on_meta", default=None)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on this kind of device, None where it is off."""
    if device.type == "meta":
        return _on_meta.get()
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast(
    device: torch.device, dtype: torch.dtype | None, meta_stands_for: str = "cpu"
) -> AbstractContextManager[Any]:
    """``torch.autocast`` to ``dtype``, on meta too; None for no autocast.

    On meta, where ``meta_stands_for`` is "cpu" or "cuda", the rules are kept for the
    operations that a DenseNet, or another convolutional network, is made of.
    """
    if device.type != "meta":
        return torch.autocast(device.type, dtype, enabled=dtype is not None)
    return nullcontext() if dtype is None else _Rules(dtype, meta_stands_for)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which every operation computes in its inputs' type."""
    if device.type == "meta":
        return _computing_in(None)
    return torch.autocast(device.type, enabled=False)


@contextmanager
def _computing_in(dtype: torch.dtype | None) -> Iterator[None]:
    token = _on_meta.set(dtype)
    try:
        yield
    finally:
        _on_meta.reset(token)


_NARROW: set[Any] = {
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    F.linear,
    torch.matmul,
    torch.mm,
    torch.addmm,
}
_WIDE: dict[str, set[Any]] = {"cpu": {F.avg_pool3d, F.cross_entropy}, "cuda": {F.cross_entropy}}


class _Rules(TorchFunctionMode):
    """Casts as torch.autocast does: parameters once per context, all else at every use."""

    def __init__(self, dtype: torch.dtype, stands_for: str) -> None:
        super().__init__()
        self._dtype, self._wide = dtype, _WIDE[stands_for]
        self._cast: dict[nn.Parameter, Tensor] = {}

    def __enter__(self) -> _Rules:
        self._token = _on_meta.set(self._dtype)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _on_meta.reset(self._token)
        self._cast.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _on_meta.get() is not None:
            target = self._dtype if func in _NARROW else None
            target = torch.float32 if func in self._wide else target
            if target is not None:
                args = [self._to(value, target) for value in args]
                kwargs = {name: self._to(value, target) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _to(self, value: Any, dtype: torch.dtype) -> Any:
        # autocast leaves double alone
        if not isinstance(value, Tensor) or value.dtype in (dtype, torch.float64):
            return value
        if not value.is_floating_point():
            return value
        if not isinstance(value, nn.Parameter) or not torch.is_grad_enabled():
            return value.to(dtype)
        if value not in self._cast:
            self._cast[value] = value.to(dtype)
        return self._cast[value]
