"""BN-ReLU with average pooling: windows of two, and whole images.

A transition's 1x1 convolution commutes with its pooling, so only the pooled rectified
features are stored, and the product after it is a plain matrix product on a quarter (in
two dimensions) of the rows.

The backward walks windows, not rows: a window's gradient is read once for all of its
positions, and the pooled features can be rebuilt in the same pass. Odd last lines make
windows that lie partly outside the image; their positions get a zero gradient.

Workspace of the sums: 8 * ranges * c bytes, ranges <= programs / tiles of channels.
"""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from effdense.backends.base import Normalization
from effdense.kernels.bn_relu import bn_relu_reference
from effdense.kernels.launch import Launch, alignment, cdiv, empty, jit, matrices, written
from effdense.kernels.sum_partials import sum_partials


def bn_relu_avg_pool_reference(x: Tensor, norm: Normalization, shape: tuple[int, ...]) -> Tensor:
    """Average of relu(norm(x)) over windows of 2; shape (n, *spatial), result (n * windows, c)."""
    z = bn_relu_reference(x, norm).view(*shape, x.shape[1])
    for dim in range(1, len(shape)):
        windows = shape[dim] // 2
        even = torch.arange(windows, device=x.device) * 2
        z = (z.index_select(dim, even) + z.index_select(dim, even + 1)) / 2
    return z.reshape(-1, x.shape[1])


def bn_relu_global_pool_reference(x: Tensor, norm: Normalization, images: int) -> Tensor:
    """Mean of relu(norm(x)) over the positions of each image, (images, c)."""
    return bn_relu_reference(x, norm).view(images, -1, x.shape[1]).mean(1)


@jit
def bn_relu_avg_pool_fwd_kernel(
    p_x,
    s_x,
    p_scale,
    p_shift,
    p_out,
    s_out,
    n_w,
    S0,
    S1,
    S2,
    C,
    n_c,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    s_x, s_out, C = s_x * ALIGN, s_out * ALIGN, C * ALIGN
    i_p, i_c = tl.program_id(0) // n_c, tl.program_id(0) % n_c
    o_p = i_p.to(tl.int64) * BP + tl.arange(0, BP)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    m_x = (o_p < n_w)[:, None] & m_c[None, :]
    b_scale = tl.load(p_scale + o_c, m_c, 0.0)
    b_shift = tl.load(p_shift + o_c, m_c, 0.0)
    # the window's indices, last dimension first, and its first position
    n2, n1, n0 = S2 // W2, S1 // W1, S0 // W0
    o_2, o_rest = (o_p % n2) * W2, o_p // n2
    o_1, o_rest = (o_rest % n1) * W1, o_rest // n1
    o_0, o_n = (o_rest % n0) * W0, o_rest // n0
    o_row = ((o_n * S0 + o_0) * S1 + o_1) * S2 + o_2
    b_sum = tl.full([BP, BC], 0.0, tl.float32)
    for i in tl.range(0, W0 * W1 * W2, loop_unroll_factor=1):
        i_0, i_1, i_2 = i // (W1 * W2), i // W2 % W1, i % W2
        o_x = o_row + ((i_0 * S1 + i_1) * S2 + i_2)
        b_x = tl.load(p_x + o_x[:, None] * s_x + o_c[None, :], m_x, 0.0).to(tl.float32)  # [BP, BC]
        b_y = b_x * b_scale[None, :] + b_shift[None, :]
        b_sum += tl.where(b_y <= 0, 0.0, b_y)
    b_out = (b_sum * (1.0 / (W0 * W1 * W2))).to(p_out.dtype.element_ty)
    tl.store(p_out + o_p[:, None] * s_out + o_c[None, :], b_out, m_x)


@jit
def bn_relu_avg_pool_bwd_kernel(
    p_x,
    s_x,
    p_mean,
    p_rstd,
    p_scale,
    p_shift,
    p_dpooled,
    s_dy,
    p_d,
    s_d,
    p_pooled,
    s_pooled,
    p_sums,
    n_w,
    S0,
    S1,
    S2,
    C,
    rows,
    REBUILD: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    s_x, s_dy, s_d = s_x * ALIGN, s_dy * ALIGN, s_d * ALIGN
    s_pooled, C = s_pooled * ALIGN, C * ALIGN
    i_c = tl.program_id(0)
    i_s = tl.program_id(1).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_mean = tl.load(p_mean + o_c, m_c, 0.0)
    b_rstd = tl.load(p_rstd + o_c, m_c, 0.0)
    b_scale = tl.load(p_scale + o_c, m_c, 0.0)
    b_shift = tl.load(p_shift + o_c, m_c, 0.0)
    # summed over lanes once, after the loop
    b_s = tl.full([BP, BC], 0.0, tl.float32)
    b_t = tl.full([BP, BC], 0.0, tl.float32)
    # windows that touch the image, and those of them that lie inside
    n2, n1, n0 = (S2 + W2 - 1) // W2, (S1 + W1 - 1) // W1, (S0 + W0 - 1) // W0
    f2, f1, f0 = S2 // W2, S1 // W1, S0 // W0
    first = i_s * rows
    last = tl.minimum(first + rows, n_w)
    for start in range(first, last, BP):
        o_p = (start + tl.arange(0, BP)).to(tl.int64)
        o_2, o_rest = o_p % n2, o_p // n2
        o_1, o_rest = o_rest % n1, o_rest // n1
        o_0, o_n = o_rest % n0, o_rest // n0
        m_p = o_p < last
        m_full = m_p & (o_0 < f0) & (o_1 < f1) & (o_2 < f2)
        m_pooled = m_full[:, None] & m_c[None, :]
        o_pooled = ((o_n * f0 + o_0) * f1 + o_1) * f2 + o_2
        o_row = ((o_n * S0 + o_0 * W0) * S1 + o_1 * W1) * S2 + o_2 * W2
        p_tile = p_dpooled + o_pooled[:, None] * s_dy + o_c[None, :]
        b_dz = tl.load(p_tile, m_pooled, 0.0).to(tl.float32) * (1.0 / (W0 * W1 * W2))  # [BP, BC]
        b_sum = tl.full([BP, BC], 0.0, tl.float32)
        for i in tl.range(0, W0 * W1 * W2, loop_unroll_factor=1):
            i_0, i_1, i_2 = i // (W1 * W2), i // W2 % W1, i % W2
            m_in = m_p & (o_0 * W0 + i_0 < S0) & (o_1 * W1 + i_1 < S1) & (o_2 * W2 + i_2 < S2)
            m_x = m_in[:, None] & m_c[None, :]
            o_x = o_row + ((i_0 * S1 + i_1) * S2 + i_2)
            p_xw = p_x + o_x[:, None] * s_x + o_c[None, :]
            b_x = tl.load(p_xw, m_x, 0.0).to(tl.float32)  # [BP, BC]
            b_y = b_x * b_scale[None, :] + b_shift[None, :]
            b_g = tl.where(b_y <= 0, 0.0, b_dz)
            b_s += b_g
            b_t += b_g * ((b_x - b_mean[None, :]) * b_rstd[None, :])
            p_dw = p_d + o_x[:, None] * s_d + o_c[None, :]
            tl.store(p_dw, (b_scale[None, :] * b_g).to(p_d.dtype.element_ty), m_x)
            if REBUILD:
                b_sum += tl.where(b_y <= 0, 0.0, b_y)
        if REBUILD:
            b_sum = (b_sum * (1.0 / (W0 * W1 * W2))).to(p_pooled.dtype.element_ty)
            tl.store(p_pooled + o_pooled[:, None] * s_pooled + o_c[None, :], b_sum, m_pooled)
    p_sums += 2 * i_s * C
    tl.store(p_sums + o_c, tl.sum(b_s, 0), m_c)
    tl.store(p_sums + C + o_c, tl.sum(b_t, 0), m_c)


@jit
def bn_relu_global_pool_fwd_kernel(
    p_x,
    s_x,
    p_scale,
    p_shift,
    p_out,
    s_out,
    positions,
    C,
    n_c,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    s_x, s_out, C = s_x * ALIGN, s_out * ALIGN, C * ALIGN
    i_n, i_c = (tl.program_id(0) // n_c).to(tl.int64), tl.program_id(0) % n_c
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_scale = tl.load(p_scale + o_c, m_c, 0.0)
    b_shift = tl.load(p_shift + o_c, m_c, 0.0)
    b_sum = tl.full([BP, BC], 0.0, tl.float32)
    p_x += i_n * positions * s_x
    for start in range(0, positions, BP):
        o_p = (start + tl.arange(0, BP)).to(tl.int64)
        m_x = (o_p < positions)[:, None] & m_c[None, :]
        b_x = tl.load(p_x + o_p[:, None] * s_x + o_c[None, :], m_x, 0.0).to(tl.float32)  # [BP, BC]
        b_y = b_x * b_scale[None, :] + b_shift[None, :]
        b_sum += tl.where((b_y <= 0) | (m_x == 0), 0.0, b_y)
    b_out = (tl.sum(b_sum, 0) / positions).to(p_out.dtype.element_ty)
    tl.store(p_out + i_n * s_out + o_c, b_out, m_c)


@jit
def bn_relu_global_pool_bwd_kernel(
    p_x,
    s_x,
    p_mean,
    p_rstd,
    p_scale,
    p_shift,
    p_dpooled,
    s_dy,
    p_d,
    s_d,
    p_sums,
    P,
    C,
    positions,
    rows,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    s_x, s_dy, s_d, C = s_x * ALIGN, s_dy * ALIGN, s_d * ALIGN, C * ALIGN
    i_c = tl.program_id(0)
    i_s = tl.program_id(1).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_mean = tl.load(p_mean + o_c, m_c, 0.0)
    b_rstd = tl.load(p_rstd + o_c, m_c, 0.0)
    b_scale = tl.load(p_scale + o_c, m_c, 0.0)
    b_shift = tl.load(p_shift + o_c, m_c, 0.0)
    # summed over lanes once, after the loop
    b_s = tl.full([BP, BC], 0.0, tl.float32)
    b_t = tl.full([BP, BC], 0.0, tl.float32)
    first = i_s * rows
    last = tl.minimum(first + rows, P)
    for start in range(first, last, BP):
        o_p = (start + tl.arange(0, BP)).to(tl.int64)
        m_x = (o_p < last)[:, None] & m_c[None, :]
        b_x = tl.load(p_x + o_p[:, None] * s_x + o_c[None, :], m_x, 0.0).to(tl.float32)  # [BP, BC]
        p_tile = p_dpooled + (o_p // positions)[:, None] * s_dy + o_c[None, :]
        b_dz = tl.load(p_tile, m_x, 0.0).to(tl.float32) / positions
        b_y = b_x * b_scale[None, :] + b_shift[None, :]
        b_g = tl.where(b_y <= 0, 0.0, b_dz)
        b_s += b_g
        b_t += b_g * ((b_x - b_mean[None, :]) * b_rstd[None, :])
        p_tile = p_d + o_p[:, None] * s_d + o_c[None, :]
        tl.store(p_tile, (b_scale[None, :] * b_g).to(p_d.dtype.element_ty), m_x)
    p_sums += 2 * i_s * C
    tl.store(p_sums + o_c, tl.sum(b_s, 0), m_c)
    tl.store(p_sums + C + o_c, tl.sum(b_t, 0), m_c)


def _windows(shape: tuple[int, ...]) -> tuple[list[int], dict[str, int]]:
    """Spatial sizes and window sizes as three dimensions: absent ones have size and window 1."""
    absent = 3 - len(shape[1:])
    assert 0 <= absent <= 2, shape
    windows = [1] * absent + [2] * (3 - absent)
    return [1] * absent + list(shape[1:]), dict(zip(("W0", "W1", "W2"), windows, strict=True))


def bn_relu_avg_pool(
    x: Tensor, norm: Normalization, shape: tuple[int, ...], out: Tensor, launch: Launch
) -> None:
    """Average of relu(norm(x)) over windows of 2 in one, two or three dimensions.

    x (P, c) with P = prod(shape), shape = (n, *spatial); out (n * prod(s // 2), c).
    Reads P c elements (less what lies in no window), writes P c / 2^dimensions.
    """
    matrices(x, out)
    C = x.shape[1]
    n_w = out.shape[0]
    assert math.prod(shape) == x.shape[0], (shape, x.shape)
    assert shape[0] * math.prod(s // 2 for s in shape[1:]) == n_w, (shape, out.shape)
    sizes, windows = _windows(shape)
    n_c = cdiv(C, launch.block_c)
    align = alignment(x.stride(0), out.stride(0), C)
    args = (x, x.stride(0) // align, norm.scale, norm.shift, out, out.stride(0) // align)
    args += (n_w, *sizes, C // align, n_c)
    tile = {"BP": launch.block_p, "BC": launch.block_c}
    grid = (cdiv(n_w, launch.block_p) * n_c,)
    launch.start(bn_relu_avg_pool_fwd_kernel, grid, *args, ALIGN=align, **windows, **tile)
    written(out)


def bn_relu_avg_pool_backward(
    x: Tensor,
    norm: Normalization,
    shape: tuple[int, ...],
    dpooled: Tensor,
    d: Tensor,
    pooled: Tensor | None,
    launch: Launch,
) -> tuple[Tensor, Tensor]:
    """``d = scale * dz``, zero outside windows; rebuilds ``pooled``; returns S, T (c,) float32.

    Shapes as in :func:`bn_relu_avg_pool`, dpooled and pooled as its out. Reads P c
    elements and P c / 2^dimensions, writes P c (and P c / 2^dimensions with ``pooled``).
    """
    into = dpooled if pooled is None else pooled
    matrices(x, dpooled, d, into)
    P, C = x.shape
    if P == 0:
        return empty(x, C).zero_(), empty(x, C).zero_()
    sizes, windows = _windows(shape)
    n_w = shape[0] * math.prod(cdiv(s, w) for s, w in zip(sizes, windows.values(), strict=True))
    n_c = cdiv(C, launch.block_c)
    rows, splits = launch.split_rows(n_w, n_c)
    parts = empty(x, splits, 2, C)
    align = alignment(x.stride(0), dpooled.stride(0), d.stride(0), into.stride(0), C)
    args = (x, x.stride(0) // align, *norm, dpooled, dpooled.stride(0) // align)
    args += (d, d.stride(0) // align, into, into.stride(0) // align, parts)
    args += (n_w, *sizes, C // align, rows)
    constants = {"REBUILD": pooled is not None, "ALIGN": align} | windows
    constants |= {"BP": launch.block_p, "BC": launch.block_c}
    launch.start(bn_relu_avg_pool_bwd_kernel, (n_c, splits), *args, **constants)
    written(d)
    if pooled is not None:
        written(pooled)
    s, t = sum_partials(parts, launch)
    return s, t


def bn_relu_global_pool(
    x: Tensor, norm: Normalization, images: int, out: Tensor, launch: Launch
) -> None:
    """Mean of relu(norm(x)) over each image's positions; x (P, c), out (images, c).

    Reads P c elements, writes images * c.
    """
    matrices(x, out)
    P, C = x.shape
    assert out.shape[0] == images, (out.shape, images)
    n_c = cdiv(C, launch.block_c)
    align = alignment(x.stride(0), out.stride(0), C)
    args = (x, x.stride(0) // align, norm.scale, norm.shift, out, out.stride(0) // align)
    args += (P // max(images, 1), C // align, n_c)
    tile = {"BP": launch.block_p, "BC": launch.block_c}
    launch.start(bn_relu_global_pool_fwd_kernel, (images * n_c,), *args, ALIGN=align, **tile)
    written(out)


def bn_relu_global_pool_backward(
    x: Tensor, norm: Normalization, images: int, dpooled: Tensor, d: Tensor, launch: Launch
) -> tuple[Tensor, Tensor]:
    """``d = scale * dz``; returns S, T (c,) float32; x, d (P, c), dpooled (images, c).

    Reads P c elements, writes P c; dpooled is read once per tile of rows, from cache.
    """
    matrices(x, dpooled, d)
    P, C = x.shape
    if P == 0:
        return empty(x, C).zero_(), empty(x, C).zero_()
    n_c = cdiv(C, launch.block_c)
    rows, splits = launch.split_rows(P, n_c)
    parts = empty(x, splits, 2, C)
    align = alignment(x.stride(0), dpooled.stride(0), d.stride(0), C)
    args = (x, x.stride(0) // align, *norm, dpooled, dpooled.stride(0) // align)
    args += (d, d.stride(0) // align, parts, P, C // align, P // images, rows)
    tile = {"BP": launch.block_p, "BC": launch.block_c}
    launch.start(bn_relu_global_pool_bwd_kernel, (n_c, splits), *args, ALIGN=align, **tile)
    written(d)
    s, t = sum_partials(parts, launch)
    return s, t
