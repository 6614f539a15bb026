"""What is returned to users, who may write it, though backward still reads the same memory."""

from __future__ import annotations

import torch
from torch import Tensor


def copy_on_write(x: Tensor) -> Tensor:
    """``x``'s values as a tensor of its own, which shares ``x``'s memory until one is written.

    torch copies for whoever writes, and for nobody else: operations that only read take the
    memory as it is, and so does :func:`address`.
    """
    # meta tensors have no memory, and what nobody writes takes none
    return as_base(x) if x.is_meta else torch._lazy_clone(x)


def as_base(x: Tensor) -> Tensor:
    """``x``, which may be a view, as a tensor in the same memory that is no view of another.

    Autograd refuses writes to a Function's output that is a view.
    """
    return x.new_empty(0).set_(x)  # type: ignore[call-overload]


def is_shared(x: Tensor) -> bool:
    """Whether ``x`` shares its memory until somebody writes it: ``data_ptr()`` would copy it."""
    return bool(torch._C._is_cow_tensor(x))  # type: ignore[attr-defined]


def address(x: Tensor) -> int:
    """Of ``x``'s first element, for reading. ``data_ptr()`` would copy what is shared."""
    start: int = torch._C._data_address(x)  # type: ignore[attr-defined]
    return start + int(x.storage_offset()) * x.element_size()
