"""The deferred correction: what BN's input gradient still lacks when a channel is finished.

All layers that read a channel share its mean, so their corrections are two numbers a
channel, s and t, applied once (see the dense block).
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from effdense.kernels.launch import Launcher, jit
from effdense.kernels.layouts import cdiv, layouts, matrices, pad, written
from effdense.kernels.tiles import columns_loaded, store_columns


def finish_gradient_reference(
    d: Tensor, x: Tensor, mean: Tensor, s: Tensor, t: Tensor, count: float
) -> Tensor:
    """D - (s + t * (x - mean)) / count, all (P, c)."""
    return d - (s + t * (x - mean)) / count


@jit(ALIGN=("s_d", "s_x"), ALIGN_C=("s_out", "C"))
def finish_gradient_fwd_kernel(
    p_d,
    p_x,
    p_mean,
    p_s,
    p_t,
    p_out,
    per_count,
    s_d,
    s_x,
    s_out,
    P,
    C,
    n_c,
    PAD: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    s_d, s_x, s_out, C = s_d * ALIGN, s_x * ALIGN, s_out * ALIGN_C, C * ALIGN_C
    i_p, i_c = tl.program_id(0) // n_c, tl.program_id(0) % n_c
    o_p = i_p.to(tl.int64) * BP + tl.arange(0, BP)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    m_p = o_p < P
    m_x = m_p[:, None] & columns_loaded(o_c, C, PAD)[None, :]
    b_x = tl.load(p_x + o_p[:, None] * s_x + o_c[None, :], m_x, 0.0).to(tl.float32)  # [BP, BC]
    b_d = tl.load(p_d + o_p[:, None] * s_d + o_c[None, :], m_x, 0.0).to(tl.float32)
    b_mean = tl.load(p_mean + o_c, m_c, 0.0)
    b_s = tl.load(p_s + o_c, m_c, 0.0) * per_count
    b_t = tl.load(p_t + o_c, m_c, 0.0) * per_count
    b_out = b_d - (b_s[None, :] + b_t[None, :] * (b_x - b_mean[None, :]))
    store_columns(p_out + o_p[:, None] * s_out + o_c[None, :], b_out, m_p, o_c, C)


def finish_gradient(
    d: Tensor,
    x: Tensor,
    mean: Tensor,
    s: Tensor,
    t: Tensor,
    count: float,
    out: Tensor,
    launcher: Launcher,
) -> None:
    """``out = d - (s + t * (x - mean)) / count``; matrices (P, c), out may be d.

    Reads 2 P c elements, writes P c: once per channel and block, not per layer.
    """
    key = finish_gradient, *layouts(d, x, out)
    start = launcher.prepared.get(key)
    if start is None:
        matrices(d, x, out)
        P, C = x.shape
        launch = launcher.launch("map", x, C)
        n_c = cdiv(C, launch.block_c)
        sizes = {"P": P, "C": C, "n_c": n_c}
        sizes |= {"s_d": d.stride(0), "s_x": x.stride(0), "s_out": out.stride(0)}
        grid = (cdiv(P, launch.block_p) * n_c,)
        padded = min(pad(d), pad(x))
        start = launcher.prepare(finish_gradient_fwd_kernel, launch, grid, sizes, PAD=padded)
        launcher.keep(key, start)
    start((d, x, mean, s, t, out), (1.0 / count,))
    written(out)
