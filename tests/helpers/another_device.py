"""A device that isn't the CPU, where there is no GPU: it computes as the CPU does, but its
tensors and the CPU's do not go together. What was made in the wrong place shows on it.

Its tensors hold a CPU's, and torch takes it for a device of its own, in autograd too.
"""

from __future__ import annotations

import atexit
import functools
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "another"

# what may have tensors of both: copies, and numbers that torch itself wraps
_COPIES = {"_to_copy", "copy_"}


class _Module:
    """What torch asks a device's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class Elsewhere(Tensor):
    """A tensor of that device; ``held`` is the CPU's."""

    held: Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made: Any = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def set_(self, source: Any) -> Any:  # type: ignore[override]
        # a wrapper's sizes are for good, and so another one takes its place
        return Elsewhere(source.held)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _is_ours(device: Any) -> bool:
    return isinstance(device, torch.device) and device.type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, Elsewhere)]
    name = func.overloadpacket.__name__
    if ours and name not in _COPIES:
        # numbers (0-dim CPU tensors) may go with any device, as on a GPU
        strangers = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim() > 0]
        if strangers:
            raise RuntimeError(
                f"{func}: tensors on {NAME}:0 and on {strangers[0].device} do not go together"
            )
    given: dict[int, Elsewhere] = {id(x.held): x for x in ours}

    def unwrap(x: Any) -> Any:
        if isinstance(x, Elsewhere):
            return x.held
        return torch.device("cpu") if _is_ours(x) else x

    found = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    leaves = name == "_to_copy" and not _is_ours(kwargs.get("device", torch.device(NAME)))
    if leaves or (name == "copy_" and not isinstance(args[0], Elsewhere)):
        return found

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return given[id(x)] if id(x) in given else Elsewhere(x)

    # in inference mode too a view of a tensor with a version has one
    versioned = func.is_view and not any(x.is_inference() for x in ours)
    with torch.inference_mode(False) if versioned else nullcontext():
        return tree_map(wrap, found)


@functools.cache
def register() -> None:
    """Once for a process."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    # kept for good: a library's operations go when it does
    register.library = library = torch.library.Library("_", "IMPL")  # type: ignore[attr-defined]
    library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    # autograd's thread may still be letting go of a backward's tensors, which needs Python
    atexit.register(time.sleep, 0.5)
