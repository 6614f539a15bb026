"""Keeping what backward needs outside the device's memory: slower, and smaller still.

Through autograd's saved-tensor hooks: results are the same bit for bit, for what comes back
is what went out. Tensors on a GPU go to pinned host memory, by a stream of their own, so
that the copy runs beside the computation that follows; tensors on a CPU go to a file.

Known limitations: a block's tensors come back together when its backward begins, which then
waits for them; nothing is fetched ahead. So with save="features", "bottlenecks" or "input" a
step needs no less than the largest block does by itself, and where that is the first block,
whose backward comes last, nothing is gained; save="all" comes back layer by layer. The
allocator can give a tensor's memory to others only once its copy has been made. On a CPU, a
folder in memory (a tmpfs) saves nothing, and under a control group's limit the file's cached
pages count until the kernel writes them back. Never run on a GPU yet: tests cover the file,
and the choice of what goes out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

# Smaller tensors are statistics and vectors, which cost more to move than they take.
MIN_BYTES = 1 << 20

_copy_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextmanager
def offload(folder: str | Path | None = None, *, min_bytes: int | None = None) -> Iterator[None]:
    """Tensors that forward saves for backward inside this context are kept elsewhere.

    Args:
        folder: where tensors on a CPU are written, each to a file without a name that
            vanishes with the tensor; None for the system's folder for temporary files.
        min_bytes: smaller tensors stay (None: smaller than 1 MiB); parameters always do.

    Raises:
        OSError: in forward, where a file can't be written.
    """
    least = MIN_BYTES if min_bytes is None else min_bytes

    def pack(tensor: Tensor) -> Any:
        return _send(tensor, folder) if _goes_out(tensor, least) else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, _fetch):
        yield


class _Layout(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Holder(Protocol):
    """Keeps a tensor's bytes, in the order of memory."""

    def read(self, flat: Tensor) -> None:
        """Put them into a tensor of as many elements."""
        ...


class _Away(NamedTuple):
    """A tensor that is elsewhere, and what it was."""

    layout: _Layout
    holder: Holder


class _File:
    """A tensor's bytes in a file without a name."""

    def __init__(self, flat: Tensor, folder: str | Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        view: Any = flat.view(torch.uint8).numpy()
        written = 0
        while written < len(view):
            written += self._file.write(view[written:])

    def read(self, flat: Tensor) -> None:
        view: Any = flat.view(torch.uint8).numpy()
        self._file.seek(0)
        read = 0
        while read < len(view):
            count = self._file.readinto(view[read:])
            if not count:
                raise RuntimeError("an offloaded tensor's file was cut off while it was away")
            read += count

    def __del__(self) -> None:
        # there is none where it couldn't be made
        if hasattr(self, "_file"):
            self._file.close()


class _Pinned:
    """A GPU tensor's bytes in pinned host memory."""

    def __init__(self, flat: Tensor, folder: str | Path | None) -> None:
        stream = _stream(flat.device)
        self._held = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(flat.device))
        with torch.cuda.stream(stream):
            self._held.copy_(flat, non_blocking=True)
            self._copied = stream.record_event()
        flat.record_stream(stream)

    def read(self, flat: Tensor) -> None:
        torch.cuda.current_stream(flat.device).wait_event(self._copied)
        flat.copy_(self._held, non_blocking=True)


HOLDERS: dict[str, Callable[[Tensor, str | Path | None], Holder]] = {
    "cpu": _File,
    "cuda": _Pinned,
}
"""By kind of device; tensors on any other stay where they are."""


def _goes_out(tensor: Tensor, min_bytes: int) -> bool:
    if isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad):
        return False
    if tensor.layout != torch.strided or tensor.nbytes < min_bytes:
        return False
    return _is_dense(tensor)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _send(tensor: Tensor, folder: str | Path | None) -> Any:
    tensor = tensor.detach()
    holder = HOLDERS.get(tensor.device.type)
    if holder is None:
        return tensor
    layout = _Layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    return _Away(layout, holder(tensor.as_strided((tensor.numel(),), (1,)), folder))


def _fetch(kept: Any) -> Any:
    if not isinstance(kept, _Away):
        return kept
    layout = kept.layout
    tensor = torch.empty_strided(
        layout.size, layout.stride, dtype=layout.dtype, device=layout.device
    )
    kept.holder.read(tensor.as_strided((tensor.numel(),), (1,)))
    return tensor


def _stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)
    return _copy_streams[device]
