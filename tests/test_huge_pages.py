"""Large buffers on huge pages, where the system grants them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from effdense import huge_pages
from effdense.huge_pages import on_huge_pages

SMAPS = Path("/proc/self/smaps")


def is_wished_for(buffer: torch.Tensor) -> bool:
    """Whether the mapping in the middle of a buffer bears the system's mark of the wish."""
    middle, inside = buffer.data_ptr() + buffer.nbytes // 2, False
    for line in SMAPS.read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= middle < end
        elif inside and first == "VmFlags:":
            return "hg" in rest
    raise AssertionError(f"no mapping holds {middle:x}")


@pytest.mark.skipif(
    not SMAPS.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="the system has no huge pages for the asking",
)
def test_the_system_takes_note_of_the_wish() -> None:
    # whether it grants it is its affair: memory may be in too small pieces
    assert not is_wished_for(torch.empty(64 << 20, dtype=torch.uint8))
    assert is_wished_for(on_huge_pages(torch.empty(64 << 20, dtype=torch.uint8)))


@pytest.mark.parametrize("size", [0, 1000, 3 << 20, (4 << 20) + 1])
def test_the_wish_stays_within_the_buffer(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *wish: asked.append(wish))
    buffer = torch.empty(size, dtype=torch.uint8)
    assert on_huge_pages(buffer) is buffer
    assert len(asked) == (size > 4 << 20)
    for address, nbytes, _ in asked:
        assert address % (2 << 20) == nbytes % (2 << 20) == 0
        assert buffer.data_ptr() <= address < address + nbytes <= buffer.data_ptr() + size


def test_a_system_without_them_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    buffer = torch.zeros(8 << 20, dtype=torch.uint8)
    assert on_huge_pages(buffer) is buffer
    assert on_huge_pages(torch.empty(8 << 20, device="meta")).is_meta
