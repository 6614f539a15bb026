"""Per-channel mean and biased variance of a column range of a strided matrix.

Two stages. A program walks its range of rows tile by tile, every lane with Welford's
update (1962), and combines its lanes by the formula of Chan, Golub and LeVeque (1979),
so no square of a mean is ever subtracted. A second kernel combines the partial results
of all ranges by the same formula in a fixed order.

Workspace: 8 * ranges * c bytes, ranges <= programs / tiles of channels.
"""

from __future__ import annotations

from collections.abc import Callable

import triton.language as tl
from torch import Tensor

from effdense.backends.base import Statistics
from effdense.kernels.launch import Launcher, jit
from effdense.kernels.launch_table import Launch
from effdense.kernels.layouts import cdiv, empty, layouts, matrices, pad
from effdense.kernels.tiles import columns_loaded

RANGES, COLUMNS = 256, 16
COMBINE = Launch(num_warps=8, num_stages=1)


def statistics_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the rows of x (P, c), in x's own type."""
    mean = x.mean(0)
    return mean, (x - mean).square().mean(0)


@jit(ALIGN=("s_x",), ALIGN_C=("C",))
def statistics_fwd_kernel(
    p_x,
    p_part,
    s_x,
    P,
    C,
    rows,
    PAD: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    s_x, C = s_x * ALIGN, C * ALIGN_C
    i_c = tl.program_id(0)
    i_s = tl.program_id(1).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    o_r = tl.arange(0, BP)
    m_c = o_c < C
    m_load = columns_loaded(o_c, C, PAD)
    # every lane keeps Welford's running mean and M2 of its own rows: nothing crosses
    # lanes until the range is done
    b_mean = tl.full([BP, BC], 0.0, tl.float32)
    b_m2 = tl.full([BP, BC], 0.0, tl.float32)
    first = i_s * rows
    last = tl.minimum(first + rows, P)
    for start in range(first, last, BP):
        o_p = (start + o_r).to(tl.int64)
        m_x = (o_p < last)[:, None] & m_load[None, :]
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
    p_part += i_s * C + o_c
    tl.store(p_part, b_all, m_c)
    n_s = tl.num_programs(1).to(tl.int64)
    tl.store(p_part + n_s * C, tl.sum(b_m2 + b_n * b_dev * b_dev, 0), m_c)


@jit(ALIGN=("C",))
def statistics_combine_kernel(
    p_part,
    p_mean,
    p_var,
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
    o_t = tl.arange(0, BT)
    m_c = o_c < C
    # every lane combines ranges of its own, so that no load waits for a sum over lanes
    b_mean = tl.full([BT, BC], 0.0, tl.float32)
    b_m2 = tl.full([BT, BC], 0.0, tl.float32)
    b_n = tl.full([BT, 1], 0.0, tl.float32)
    for start in range(0, n_parts, BT):
        o_r = (start + o_t).to(tl.int64)
        m_t = (o_r < n_parts)[:, None] & m_c[None, :]
        o_part = o_r[:, None] * C + o_c[None, :]
        b_means = tl.load(p_part + o_part, m_t, 0.0)  # [BT, BC]
        b_m2s = tl.load(p_part + n_parts.to(tl.int64) * C + o_part, m_t, 0.0)
        # the rows that each range holds; the last may be short, those past it are empty
        n_rows = tl.maximum(tl.minimum(P - o_r * rows, rows), 0).to(tl.float32)[:, None]
        b_share = n_rows / tl.maximum(b_n + n_rows, 1.0)
        b_delta = b_means - b_mean
        b_mean += b_delta * b_share
        b_m2 += b_m2s + b_delta * b_delta * (b_n * b_share)
        b_n += n_rows
    n_all = tl.sum(b_n, 0)  # [1]
    # means of one channel are close to each other: sum their distances to the first
    b_first = tl.sum(tl.where((o_t == 0)[:, None], b_mean, 0.0), 0)  # [BC]
    b_all = b_first + tl.sum(b_n * (b_mean - b_first[None, :]), 0) / n_all
    b_dev = b_mean - b_all[None, :]
    tl.store(p_mean + o_c, b_all, m_c)
    tl.store(p_var + o_c, tl.sum(b_m2 + b_n * b_dev * b_dev, 0) / n_all, m_c)


def statistics(x: Tensor, out: Statistics, launcher: Launcher) -> None:
    """Mean and biased variance over the rows of x (P, c), into ``out``, each (c,) float32.

    Reads P c elements of x once.
    """
    key = statistics, *layouts(x)
    found = launcher.prepared.get(key)
    if found is None:
        matrices(x)
        P, C = x.shape
        launch = launcher.launch("reduce", x, C)
        n_c = cdiv(C, launch.block_c)
        rows, ranges = launch.split_rows(P, n_c)
        sizes = {"P": P, "C": C, "rows": rows, "s_x": x.stride(0)}
        grid = (n_c, ranges)
        start = launcher.prepare(statistics_fwd_kernel, launch, grid, sizes, PAD=pad(x))
        found = start, (2, ranges, C), prepare_combination(launcher, ranges, C, P, rows)
        launcher.keep(key, found)
    start, shape, combine = found
    part = empty(out.mean, *shape)
    start((x, part))
    combine((part, *out))


def prepare_combination(
    launcher: Launcher, ranges: int, C: int, P: int, rows: int
) -> Callable[..., None]:
    """The launch that makes mean and variance of P rows of the partial results of ranges.

    To be called with (part, mean, var): part (2, ranges, c) float32, the means and the sums of
    squared deviations of ``rows`` each (the last range may be shorter), mean and var (c,).
    """
    sizes = {"P": P, "C": C, "n_parts": ranges, "rows": rows}
    grid = (cdiv(C, COLUMNS),)
    return launcher.prepare(statistics_combine_kernel, COMBINE, grid, sizes, BT=RANGES, BC=COLUMNS)
