"""The second stage of every sum over rows: partial sums added in a fixed order.

Atomic additions would make two runs differ in their last bits; this makes them equal.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from effdense.kernels.launch import Launch, alignment, cdiv, empty, jit


def sum_partials_reference(parts: Tensor) -> Tensor:
    """Sum over the first dimension."""
    return parts.sum(0)


@jit
def sum_partials_fwd_kernel(
    p_parts, p_out, n_parts, M, ALIGN: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr
):
    M = M * ALIGN
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_m = o_m < M
    b_sum = tl.full([BM], 0.0, tl.float32)
    for start in range(0, n_parts, BT):
        o_t = (start + tl.arange(0, BT)).to(tl.int64)
        m_t = (o_t < n_parts)[:, None] & m_m[None, :]
        b_sum += tl.sum(tl.load(p_parts + o_t[:, None] * M + o_m[None, :], m_t, 0.0), 0)
    tl.store(p_out + o_m, b_sum, m_m)


def sum_partials(parts: Tensor, launch: Launch) -> Tensor:
    """Sum over the first dimension of a dense float32 tensor (parts, ...).

    Reads 4 * parts * M bytes and writes 4 * M, M the number of sums.
    """
    if parts.shape[0] == 1:
        return parts[0]
    out = empty(parts, *parts.shape[1:])
    M = out.numel()
    # long rows of sums (dW) occupy the device by themselves; for short ones (S, T) a
    # program reads many partial results at once
    block_m, block_t = (256, 8) if M > 8192 else (32, 64)
    align = alignment(M)
    args = (parts, out, parts.shape[0], M // align)
    tile = {"BT": block_t, "BM": block_m, "num_warps": 4, "num_stages": 1}
    launch.start(sum_partials_fwd_kernel, (cdiv(M, block_m),), *args, ALIGN=align, **tile)
    return out
