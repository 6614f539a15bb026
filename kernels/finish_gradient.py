"""The deferred correction: what BN's input gradient still lacks when a channel is finished.

All layers that read a channel share its mean, so their corrections are two numbers a
channel, s and t, applied once (see the dense block).
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from effdense.kernels.launch import Launch, alignment, cdiv, jit, matrices, written


def finish_gradient_reference(
    d: Tensor, x: Tensor, mean: Tensor, s: Tensor, t: Tensor, count: float
) -> Tensor:
    """D - (s + t * (x - mean)) / count, all (P, c)."""
    return d - (s + t * (x - mean)) / count


@jit
def finish_gradient_fwd_kernel(
    p_d,
    s_d,
    p_x,
    s_x,
    p_mean,
    p_s,
    p_t,
    per_count,
    p_out,
    s_out,
    P,
    C,
    n_c,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    s_d, s_x, s_out, C = s_d * ALIGN, s_x * ALIGN, s_out * ALIGN, C * ALIGN
    i_p, i_c = tl.program_id(0) // n_c, tl.program_id(0) % n_c
    o_p = i_p.to(tl.int64) * BP + tl.arange(0, BP)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    m_x = (o_p < P)[:, None] & m_c[None, :]
    b_x = tl.load(p_x + o_p[:, None] * s_x + o_c[None, :], m_x, 0.0).to(tl.float32)  # [BP, BC]
    b_d = tl.load(p_d + o_p[:, None] * s_d + o_c[None, :], m_x, 0.0).to(tl.float32)
    b_mean = tl.load(p_mean + o_c, m_c, 0.0)
    b_s = tl.load(p_s + o_c, m_c, 0.0) * per_count
    b_t = tl.load(p_t + o_c, m_c, 0.0) * per_count
    b_out = b_d - (b_s[None, :] + b_t[None, :] * (b_x - b_mean[None, :]))
    tl.store(p_out + o_p[:, None] * s_out + o_c[None, :], b_out.to(p_out.dtype.element_ty), m_x)


def finish_gradient(
    d: Tensor,
    x: Tensor,
    mean: Tensor,
    s: Tensor,
    t: Tensor,
    count: float,
    out: Tensor,
    launch: Launch,
) -> None:
    """``out = d - (s + t * (x - mean)) / count``; matrices (P, c), out may be d.

    Reads 2 P c elements, writes P c: once per channel and block, not per layer.
    """
    matrices(d, x, out)
    P, C = x.shape
    n_c = cdiv(C, launch.block_c)
    align = alignment(d.stride(0), x.stride(0), out.stride(0), C)
    args = (d, d.stride(0) // align, x, x.stride(0) // align, mean, s, t, 1.0 / count)
    args += (out, out.stride(0) // align, P, C // align, n_c)
    tile = {"BP": launch.block_p, "BC": launch.block_c}
    grid = (cdiv(P, launch.block_p) * n_c,)
    launch.start(finish_gradient_fwd_kernel, grid, *args, ALIGN=align, **tile)
    written(out)
