"""Autocast's state by kind of device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

# By the names that command lines use.
AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# What stands for autocast's dtype on devices where torch has none (see memory/meta.py).
_elsewhere: ContextVar[torch.dtype | None] = ContextVar("_elsewhere", default=None)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on this kind of device, None where it is off."""
    if not torch.amp.is_autocast_available(device.type):
        return _elsewhere.get()
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """``torch.autocast`` to ``dtype``, None for no autocast; nothing where torch has none."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which every operation computes in its inputs' type."""
    if not torch.amp.is_autocast_available(device.type):
        return computing_in(None)
    return torch.autocast(device.type, enabled=False)


@contextmanager
def computing_in(dtype: torch.dtype | None) -> Iterator[None]:
    """What stands for autocast where torch has none."""
    token = _elsewhere.set(dtype)
    try:
        yield
    finally:
        _elsewhere.reset(token)
