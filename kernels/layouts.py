"""How the matrices of kernels lie: alignment, padding, and what is asked of all of them.

NOTE [ Aligned integers ]
Triton vectorises a memory access only as far as it can prove the alignment of every
stride and bound in it, and it proves divisibility by 16 or nothing. Launchers therefore pass
each integer divided by the largest power of two (up to 16) that divides all integers of its
group, and that power as the compile-time constant ALIGN; the kernel multiplies them
back, and the divisor is known to the compiler. Integers are excluded from Triton's own
specialisation, so that the layers of a block, each of another width, share one binary.

Prefixes of a feature buffer are C0 + l k channels wide: 516 or 750 or 108, multiples of 2 or
4. The rows of X and D are therefore padded to a multiple of PADDING elements, and kernels
load up to the multiple behind the prefix (it is in the row) and put zeros behind c by a
select: what lies there are other layers' channels, or nothing, and a NaN must not survive.
Alignment is then that of the row stride alone, PAD the constant that says so. A matrix that
does not begin at such a multiple, or whose rows are not padded, is loaded up to c.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

STORAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PADDING = 16
"""Elements that the row strides of X and D are a multiple of; see NOTE [ Aligned integers ]."""


def layouts(*matrices: Tensor) -> list[tuple[Any, ...]]:
    """All of each matrix that a prepared launch depends on, but the alignment of its address."""
    return [(x.shape, x.stride(), x.storage_offset() % PADDING, x.dtype) for x in matrices]


def pad(x: Tensor) -> int:
    """The constant PAD of a matrix; see NOTE [ Aligned integers ]."""
    padded = x.stride(0) % PADDING == 0 and x.storage_offset() % PADDING == 0
    return PADDING if padded else 1


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least ``n``, within [low, high]."""
    return min(high, max(low, 1 << max(0, n - 1).bit_length()))


def alignment(*integers: int) -> int:
    """The largest power of two up to 16 that divides all ``integers``."""
    return math.gcd(16, *integers)


def matrices(*tensors: Tensor) -> None:
    """Check what every operation asks of its (P, c) arguments when it is prepared.

    Raises:
        ValueError: for a type without kernels.
    """
    for t in tensors:
        if t.dtype not in STORAGE_DTYPES:
            raise ValueError(
                f"the Triton kernels store float16, bfloat16 or float32, got {t.dtype}; "
                'use backend="torch"'
            )
        assert t.dim() == 2, t.shape
        assert t.stride(1) == 1 or t.shape[1] == 1, t.stride()


def written(*tensors: Tensor) -> None:
    """Tell autograd that a kernel wrote ``tensors``: Triton's stores are invisible to it."""
    if not tensors[0].is_inference():
        torch.autograd.graph.increment_version(tensors)


def empty(like: Tensor, *shape: int) -> Tensor:
    """A float32 workspace or result on the device of ``like``."""
    if like.dtype == torch.float32:
        # half of what torch.empty costs the host
        return like.new_empty(*shape)
    return torch.empty(shape, dtype=torch.float32, device=like.device)
