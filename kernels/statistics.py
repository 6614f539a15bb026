"""Per-channel mean and biased variance of a column range of a strided matrix.

Two stages. A program walks its range of rows tile by tile, every lane with Welford's
update (1962), and combines its lanes by the formula of Chan, Golub and LeVeque (1979),
so no square of a mean is ever subtracted. A second kernel combines the partial results
of all ranges by the same formula in a fixed order.

Workspace: 8 * ranges * c bytes, ranges <= programs / tiles of channels.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from effdense.kernels.launch import Launch, alignment, cdiv, empty, jit, matrices


def statistics_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the rows of x (P, c), in x's own type."""
    mean = x.mean(0)
    return mean, (x - mean).square().mean(0)


@jit
def statistics_fwd_kernel(
    p_x, s_x, p_mean, p_m2, P, C, rows, ALIGN: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):
    s_x = s_x * ALIGN
    C = C * ALIGN
    i_c = tl.program_id(0)
    i_s = tl.program_id(1).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    o_r = tl.arange(0, BP)
    m_c = o_c < C
    # every lane keeps Welford's running mean and M2 of its own rows: nothing crosses
    # lanes until the range is done
    b_mean = tl.full([BP, BC], 0.0, tl.float32)
    b_m2 = tl.full([BP, BC], 0.0, tl.float32)
    first = i_s * rows
    last = tl.minimum(first + rows, P)
    for start in range(first, last, BP):
        o_p = (start + o_r).to(tl.int64)
        m_x = (o_p < last)[:, None] & m_c[None, :]
        b_x = tl.load(p_x + o_p[:, None] * s_x + o_c[None, :], m_x, 0.0).to(tl.float32)  # [BP, BC]
        per_step = 1.0 / ((start - first) // BP + 1).to(tl.float32)
        b_delta = tl.where(m_x, b_x - b_mean, 0.0)
        b_mean += b_delta * per_step
        b_m2 += b_delta * (b_x - b_mean)
    # rows seen by each lane; its mean is 0 where there were none
    b_n = ((last - first - o_r + (BP - 1)) // BP).to(tl.float32)[:, None]  # [BP, 1]
    b_n = tl.maximum(b_n, 0.0)
    n_rows = (last - first).to(tl.float32)
    b_first = tl.sum(tl.where((o_r == 0)[:, None], b_mean, 0.0), 0)  # [BC]
    b_all = b_first + tl.sum(b_n * (b_mean - b_first[None, :]), 0) / n_rows
    b_dev = b_mean - b_all[None, :]
    o_part = i_s * C + o_c
    tl.store(p_mean + o_part, b_all, m_c)
    tl.store(p_m2 + o_part, tl.sum(b_m2 + b_n * b_dev * b_dev, 0), m_c)


@jit
def statistics_combine_kernel(
    p_mean,
    p_m2,
    p_out_mean,
    p_out_var,
    P,
    C,
    n_parts,
    rows,
    ALIGN: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    C = C * ALIGN
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_mean = tl.full([BC], 0.0, tl.float32)
    b_m2 = tl.full([BC], 0.0, tl.float32)
    n_before = tl.full([BC], 0.0, tl.float32)
    for start in range(0, n_parts, BT):
        o_t = start + tl.arange(0, BT)
        m_t = (o_t < n_parts)[:, None] & m_c[None, :]
        o_part = o_t.to(tl.int64)[:, None] * C + o_c[None, :]
        b_means = tl.load(p_mean + o_part, m_t, 0.0)  # [BT, BC]
        b_m2s = tl.load(p_m2 + o_part, m_t, 0.0)
        # the rows that each range holds; the last may be short, those past it are empty
        n_rows = tl.minimum(P - o_t.to(tl.int64) * rows, rows)
        b_n = tl.where(m_t, tl.maximum(n_rows, 0).to(tl.float32)[:, None], 0.0)
        n_tile = tl.sum(b_n, 0)  # [BC]
        n_tile_safe = tl.maximum(n_tile, 1.0)
        # means of one channel are close to each other: sum their distances to the first
        b_shift = tl.sum(tl.where((o_t == start)[:, None], b_means, 0.0), 0)
        b_tile = b_shift + tl.sum(b_n * (b_means - b_shift[None, :]), 0) / n_tile_safe
        b_dev = b_means - b_tile[None, :]
        b_delta = b_tile - b_mean
        n_tile_share = n_tile / tl.maximum(n_before + n_tile, 1.0)
        b_mean += b_delta * n_tile_share
        b_m2 += tl.sum(b_m2s + b_n * b_dev * b_dev, 0)
        b_m2 += b_delta * b_delta * n_before * n_tile_share
        n_before += n_tile
    tl.store(p_out_mean + o_c, b_mean, m_c)
    tl.store(p_out_var + o_c, b_m2 / tl.maximum(n_before, 1.0), m_c)


def statistics(x: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the rows of x (P, c), each (c,) float32.

    Reads P c elements of x once.
    """
    matrices(x)
    P, C = x.shape
    if P == 0:
        nothing = empty(x, C).fill_(float("nan"))
        return nothing, nothing.clone()
    n_c = cdiv(C, launch.block_c)
    rows, splits = launch.split_rows(P, n_c)
    mean, m2 = empty(x, splits, C), empty(x, splits, C)
    align = alignment(x.stride(0), C)
    args = (x, x.stride(0) // align, mean, m2, P, C // align, rows)
    tile = {"BP": launch.block_p, "BC": launch.block_c}
    launch.start(statistics_fwd_kernel, (n_c, splits), *args, ALIGN=align, **tile)
    return combine_statistics(mean, m2, P, rows, launch)


def combine_statistics(
    means: Tensor, m2s: Tensor, count: int, rows: int, launch: Launch
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all rows; means, m2s (ranges, c) are those of ``rows`` each."""
    n_parts, C = means.shape
    mean, var = empty(means, C), empty(means, C)
    align = alignment(C)
    args = (means, m2s, mean, var, count, C // align, n_parts, rows)
    tile = {"BT": 64, "BC": 32, "num_warps": 4, "num_stages": 1}
    launch.start(statistics_combine_kernel, (cdiv(C, 32),), *args, ALIGN=align, **tile)
    return mean, var
