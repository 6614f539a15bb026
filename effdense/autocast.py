"""Autocast's state by device; there is none on meta."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on this kind of device, None where it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which every operation computes in its inputs' type."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
