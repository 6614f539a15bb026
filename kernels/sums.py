"""The second stage of every sum over rows: partial sums added in a fixed order.

One launch adds all that a backward pass over rows left: a weight's gradient, S and T. Where
the norm takes the batch's statistics, the same launch moves the deferred correction by them:
s += scale S, t += scale rstd T (see the dense block, NOTE [ deferred correction ]). Atomic
additions would make two runs differ in their last bits; this makes them equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from effdense.backends.base import Deferred, Normalization
from effdense.kernels.launch import Launcher, jit
from effdense.kernels.launch_table import Launch
from effdense.kernels.layouts import cdiv, empty

COLUMNS = 64
SUMS = Launch(num_warps=4, num_stages=1)


def sums_reference(
    part: Tensor, norm: Normalization, deferred: Deferred | None
) -> tuple[Tensor, Tensor, Tensor]:
    """DW (B, c), S and T (c,) from part (ranges, B + 2, c), and the deferred correction moved."""
    total = part.sum(0)
    s, t = total[-2], total[-1]
    if deferred is not None:
        deferred.s.add_(norm.scale * s)
        deferred.t.add_(norm.scale * norm.rstd * t)
    return total[:-2], s, t


@jit(ALIGN=("M", "C"))
def sums_kernel(
    p_part,
    p_out,
    p_var,
    p_gamma,
    p_s,
    p_t,
    eps,
    n_parts,
    M,
    C,
    n_m,
    DEFER: tl.constexpr,
    ALIGN: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
):
    M, C = M * ALIGN, C * ALIGN
    i = tl.program_id(0).to(tl.int64)
    # of the M + 2 C sums: programs below n_m take the weight's, the others S and T
    row = M + 2 * C
    o_t = tl.arange(0, BT)
    if i < n_m:
        o_m = i * BM + tl.arange(0, BM)
        m_m = o_m < M
        b_sum = tl.full([BM], 0.0, tl.float32)
        for start in range(0, n_parts, BT):
            o_r = (start + o_t).to(tl.int64)
            m_t = (o_r < n_parts)[:, None] & m_m[None, :]
            b_sum += tl.sum(tl.load(p_part + o_r[:, None] * row + o_m[None, :], m_t, 0.0), 0)
        tl.store(p_out + o_m, b_sum, m_m)
    else:
        o_c = (i - n_m) * BM + tl.arange(0, BM)
        m_c = o_c < C
        p_s_part = p_part + M + o_c
        b_s = tl.full([BM], 0.0, tl.float32)
        b_t = tl.full([BM], 0.0, tl.float32)
        for start in range(0, n_parts, BT):
            o_r = (start + o_t).to(tl.int64)
            m_t = (o_r < n_parts)[:, None] & m_c[None, :]
            p_tile = p_s_part[None, :] + o_r[:, None] * row
            b_s += tl.sum(tl.load(p_tile, m_t, 0.0), 0)
            b_t += tl.sum(tl.load(p_tile + C, m_t, 0.0), 0)
        tl.store(p_out + M + o_c, b_s, m_c)
        tl.store(p_out + M + C + o_c, b_t, m_c)
        if DEFER:
            b_rstd = tl.rsqrt(tl.load(p_var + o_c, m_c, 1.0) + eps)
            b_scale = tl.load(p_gamma + o_c, m_c, 0.0).to(tl.float32) * b_rstd
            b_ds = tl.load(p_s + o_c, m_c, 0.0) + b_scale * b_s
            tl.store(p_s + o_c, b_ds, m_c)
            b_dt = tl.load(p_t + o_c, m_c, 0.0) + b_scale * b_rstd * b_t
            tl.store(p_t + o_c, b_dt, m_c)


class PreparedSums(NamedTuple):
    """The launch of the sums of ``weights`` rows of c, S and T."""

    start: Callable[..., None]
    weights: int
    columns: int


def prepare_sums(
    launcher: Launcher, ranges: int, weights: int, columns: int, defer: bool
) -> PreparedSums:
    """Of partial results (ranges, weights + 2, columns)."""
    n_m = cdiv(weights * columns, COLUMNS)
    sizes = {"n_parts": ranges, "M": weights * columns, "C": columns, "n_m": n_m}
    grid = (n_m + cdiv(columns, COLUMNS),)
    start = launcher.prepare(sums_kernel, SUMS, grid, sizes, DEFER=defer, BT=32, BM=COLUMNS)
    return PreparedSums(start, weights, columns)


def add_sums(
    sums: PreparedSums, part: Tensor, norm: Normalization, deferred: Deferred | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """DW (weights, c) or None without any, S and T (c,), float32; part (ranges, weights + 2, c).

    Reads 4 ranges (weights + 2) c bytes. ``deferred`` must be given exactly where the launch
    was prepared for it.
    """
    start, weights, columns = sums
    out = empty(part, (weights + 2) * columns)
    s, t = (norm.mean, norm.mean) if deferred is None else deferred
    start((part, out, norm.var, norm.gamma, s, t), (norm.eps,))
    dw, s, t = out.split_with_sizes((weights * columns, columns, columns))
    return dw.view(weights, columns) if weights else None, s, t
