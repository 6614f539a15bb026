from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.helpers.kernel_arena import CANARY, GUARD

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit(f"the tests in {__name__.rpartition('.')[0]} need TRITON_INTERPRET=1", returncode=4)

# torch notes once which functions a default device is for: torch.empty itself, not what replaces it
with torch.device("meta"):
    torch.empty(())


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torch.empty and new_empty give is full of NaN and stands between guards."""
    real = torch.empty
    allocated: list[torch.Tensor] = []

    def poisoned(*size: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        on_meta = str(options.get("device", "")) == "meta"
        if on_meta or not (dtype or torch.get_default_dtype()).is_floating_point:
            return real(*size, dtype=dtype, **options)
        shape = torch.Size(size[0] if size and not isinstance(size[0], int) else size)
        flat = real(shape.numel() + 2 * GUARD, dtype=dtype, **options).fill_(CANARY)
        if not flat.is_meta:
            allocated.append(flat)
        return flat[GUARD : GUARD + shape.numel()].view(shape).fill_(float("nan"))

    def like(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        given: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        # None is as good as nothing, as torch has it
        given |= {name: value for name, value in options.items() if value is not None}
        return poisoned(*size, **given)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch.Tensor, "new_empty", like)
    yield
    for flat in allocated:
        assert (flat[:GUARD] == CANARY).all(), "a workspace's guard was overwritten"
        assert (flat[-GUARD:] == CANARY).all(), "a workspace's guard was overwritten"
