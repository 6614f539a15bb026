"""Large buffers on huge pages, where the system grants them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from effdense import huge_pages
from effdense.huge_pages import on_huge_pages

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(buffer: torch.Tensor) -> int:
    """Bytes of a buffer's mapping that stand on huge pages."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    inside, found = False, 0
    for line in lines:
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start < buffer.data_ptr() + buffer.nbytes and buffer.data_ptr() < end
        elif inside and first == "AnonHugePages:":
            found += int(line.split()[1]) << 10
    return found


@pytest.mark.skipif(
    not ENABLED.exists() or "[madvise]" not in ENABLED.read_text(),
    reason="the system doesn't give huge pages for the asking",
)
def test_what_is_asked_for_is_granted() -> None:
    plain = torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    assert huge_bytes(plain) == 0
    wished = on_huge_pages(torch.empty(64 << 20, dtype=torch.uint8))
    assert huge_bytes(wished) == 0
    wished.fill_(1)
    # fragmented memory may refuse some
    assert huge_bytes(wished) > 16 << 20


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
