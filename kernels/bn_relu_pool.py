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

from effdense.backends.base import Deferred, Normalization
from effdense.kernels.bn_relu import bn_relu_reference
from effdense.kernels.launch import Launcher, jit
from effdense.kernels.layouts import cdiv, empty, layouts, matrices, pad, written
from effdense.kernels.sums import add_sums, prepare_sums
from effdense.kernels.tiles import (
    backward_terms,
    columns_loaded,
    normalization,
    normalized,
    rectified,
    store_columns,
    store_sums,
)


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


@jit(ALIGN=("s_x",), ALIGN_P=("s_out",), ALIGN_C=("C",))
def bn_relu_avg_pool_fwd_kernel(
    p_x,
    p_mean,
    p_var,
    p_gamma,
    p_beta,
    p_out,
    eps,
    s_x,
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
    PAD: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_P: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    s_x, s_out, C = s_x * ALIGN, s_out * ALIGN_P, C * ALIGN_C
    i_p, i_c = tl.program_id(0) // n_c, tl.program_id(0) % n_c
    o_p = i_p.to(tl.int64) * BP + tl.arange(0, BP)
    o_c = i_c * BC + tl.arange(0, BC)
    m_p = o_p < n_w
    m_x = m_p[:, None] & columns_loaded(o_c, C, PAD)[None, :]
    _, _, b_scale, b_shift = normalization(p_mean, p_var, p_gamma, p_beta, eps, o_c, o_c < C)
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
        b_x = tl.load(p_x + o_x[:, None] * s_x + o_c[None, :], m_x, 0.0)  # [BP, BC]
        b_sum += rectified(normalized(b_x, b_scale, b_shift))
    b_out = b_sum * (1.0 / (W0 * W1 * W2))
    store_columns(p_out + o_p[:, None] * s_out + o_c[None, :], b_out, m_p, o_c, C)


@jit(ALIGN=("s_x", "s_d"), ALIGN_P=("s_dpooled", "s_pooled"), ALIGN_C=("C",))
def bn_relu_avg_pool_bwd_kernel(
    p_x,
    p_mean,
    p_var,
    p_gamma,
    p_beta,
    p_dpooled,
    p_d,
    p_pooled,
    p_part,
    eps,
    s_x,
    s_dpooled,
    s_d,
    s_pooled,
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
    PAD: tl.constexpr,
    PAD_P: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_P: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    s_x, s_d = s_x * ALIGN, s_d * ALIGN
    s_dpooled, s_pooled, C = s_dpooled * ALIGN_P, s_pooled * ALIGN_P, C * ALIGN_C
    i_c = tl.program_id(0)
    i_s = tl.program_id(1).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    m_load = columns_loaded(o_c, C, PAD)
    b_mean, b_rstd, b_scale, b_shift = normalization(p_mean, p_var, p_gamma, p_beta, eps, o_c, m_c)
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
        m_pooled = m_full[:, None] & columns_loaded(o_c, C, PAD_P)[None, :]
        o_pooled = ((o_n * f0 + o_0) * f1 + o_1) * f2 + o_2
        o_row = ((o_n * S0 + o_0 * W0) * S1 + o_1 * W1) * S2 + o_2 * W2
        p_tile = p_dpooled + o_pooled[:, None] * s_dpooled + o_c[None, :]
        b_dz = tl.load(p_tile, m_pooled, 0.0).to(tl.float32) * (1.0 / (W0 * W1 * W2))  # [BP, BC]
        b_sum = tl.full([BP, BC], 0.0, tl.float32)
        for i in tl.range(0, W0 * W1 * W2, loop_unroll_factor=1):
            i_0, i_1, i_2 = i // (W1 * W2), i // W2 % W1, i % W2
            m_in = m_p & (o_0 * W0 + i_0 < S0) & (o_1 * W1 + i_1 < S1) & (o_2 * W2 + i_2 < S2)
            o_x = o_row + ((i_0 * S1 + i_1) * S2 + i_2)
            p_xw = p_x + o_x[:, None] * s_x + o_c[None, :]
            b_x = tl.load(p_xw, m_in[:, None] & m_load[None, :], 0.0)  # [BP, BC]
            b_g, b_gx = backward_terms(b_x, b_dz, b_mean, b_scale, b_shift)
            b_s += b_g
            b_t += b_gx
            p_dw = p_d + o_x[:, None] * s_d + o_c[None, :]
            store_columns(p_dw, b_scale[None, :] * b_g, m_in, o_c, C)
            if REBUILD:
                b_sum += rectified(normalized(b_x, b_scale, b_shift))
        if REBUILD:
            b_sum = b_sum * (1.0 / (W0 * W1 * W2))
            p_tile = p_pooled + o_pooled[:, None] * s_pooled + o_c[None, :]
            store_columns(p_tile, b_sum, m_full, o_c, C)
    store_sums(p_part, i_s, C, o_c, m_c, tl.sum(b_s, 0), tl.sum(b_t, 0), b_rstd)


@jit(ALIGN=("s_x",), ALIGN_C=("s_out", "C"))
def bn_relu_global_pool_fwd_kernel(
    p_x,
    p_mean,
    p_var,
    p_gamma,
    p_beta,
    p_out,
    eps,
    s_x,
    s_out,
    positions,
    C,
    n_c,
    PAD: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    s_x, s_out, C = s_x * ALIGN, s_out * ALIGN_C, C * ALIGN_C
    i_n, i_c = (tl.program_id(0) // n_c).to(tl.int64), tl.program_id(0) % n_c
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    m_load = columns_loaded(o_c, C, PAD)
    _, _, b_scale, b_shift = normalization(p_mean, p_var, p_gamma, p_beta, eps, o_c, m_c)
    b_sum = tl.full([BP, BC], 0.0, tl.float32)
    p_x += i_n * positions * s_x
    for start in range(0, positions, BP):
        o_p = (start + tl.arange(0, BP)).to(tl.int64)
        m_p = (o_p < positions)[:, None]
        b_x = tl.load(p_x + o_p[:, None] * s_x + o_c[None, :], m_p & m_load[None, :], 0.0)
        b_z = rectified(normalized(b_x, b_scale, b_shift))  # [BP, BC]
        b_sum += tl.where(m_p, b_z, 0.0)
    b_out = (tl.sum(b_sum, 0) / positions).to(p_out.dtype.element_ty)
    tl.store(p_out + i_n * s_out + o_c, b_out, m_c)


@jit(ALIGN=("s_x", "s_d"), ALIGN_P=("s_dpooled",), ALIGN_C=("C",))
def bn_relu_global_pool_bwd_kernel(
    p_x,
    p_mean,
    p_var,
    p_gamma,
    p_beta,
    p_dpooled,
    p_d,
    p_part,
    eps,
    s_x,
    s_dpooled,
    s_d,
    P,
    C,
    positions,
    rows,
    PAD: tl.constexpr,
    PAD_P: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_P: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    s_x, s_d, s_dpooled, C = s_x * ALIGN, s_d * ALIGN, s_dpooled * ALIGN_P, C * ALIGN_C
    i_c = tl.program_id(0)
    i_s = tl.program_id(1).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    m_load = columns_loaded(o_c, C, PAD)
    b_mean, b_rstd, b_scale, b_shift = normalization(p_mean, p_var, p_gamma, p_beta, eps, o_c, m_c)
    # summed over lanes once, after the loop
    b_s = tl.full([BP, BC], 0.0, tl.float32)
    b_t = tl.full([BP, BC], 0.0, tl.float32)
    first = i_s * rows
    last = tl.minimum(first + rows, P)
    for start in range(first, last, BP):
        o_p = (start + tl.arange(0, BP)).to(tl.int64)
        m_p = o_p < last
        m_x = m_p[:, None] & m_load[None, :]
        b_x = tl.load(p_x + o_p[:, None] * s_x + o_c[None, :], m_x, 0.0)  # [BP, BC]
        p_tile = p_dpooled + (o_p // positions)[:, None] * s_dpooled + o_c[None, :]
        m_pooled = m_p[:, None] & columns_loaded(o_c, C, PAD_P)[None, :]
        b_dz = tl.load(p_tile, m_pooled, 0.0).to(tl.float32) / positions
        b_g, b_gx = backward_terms(b_x, b_dz, b_mean, b_scale, b_shift)
        b_s += b_g
        b_t += b_gx
        p_tile = p_d + o_p[:, None] * s_d + o_c[None, :]
        store_columns(p_tile, b_scale[None, :] * b_g, m_p, o_c, C)
    store_sums(p_part, i_s, C, o_c, m_c, tl.sum(b_s, 0), tl.sum(b_t, 0), b_rstd)


def _windows(shape: tuple[int, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """Spatial sizes and window sizes of three dimensions: absent ones have size and window 1."""
    absent = 3 - len(shape[1:])
    assert 0 <= absent <= 2, shape
    sizes, windows = [1] * absent + list(shape[1:]), [1] * absent + [2] * (3 - absent)
    return (
        dict(zip(("S0", "S1", "S2"), sizes, strict=True)),
        dict(zip(("W0", "W1", "W2"), windows, strict=True)),
    )


def bn_relu_avg_pool(
    x: Tensor, norm: Normalization, shape: tuple[int, ...], out: Tensor, launcher: Launcher
) -> None:
    """Average of relu(norm(x)) over windows of 2 in one, two or three dimensions.

    x (P, c) with P = prod(shape), shape = (n, *spatial); out (n * prod(s // 2), c).
    Reads P c elements (less what lies in no window), writes P c / 2^dimensions.
    """
    mean, var, gamma, beta, eps = norm.mean, norm.var, norm.gamma, norm.beta, norm.eps
    key = bn_relu_avg_pool, *layouts(x, out), gamma.dtype, beta.dtype, shape
    start = launcher.prepared.get(key)
    if start is None:
        matrices(x, out)
        C, n_w = x.shape[1], out.shape[0]
        assert math.prod(shape) == x.shape[0], (shape, x.shape)
        assert shape[0] * math.prod(s // 2 for s in shape[1:]) == n_w, (shape, out.shape)
        images, windows = _windows(shape)
        launch = launcher.launch("pool", x, C)
        n_c = cdiv(C, launch.block_c)
        sizes = images | {"n_w": n_w, "C": C, "n_c": n_c}
        sizes |= {"s_x": x.stride(0), "s_out": out.stride(0)}
        grid = (cdiv(n_w, launch.block_p) * n_c,)
        kernel = bn_relu_avg_pool_fwd_kernel
        start = launcher.prepare(kernel, launch, grid, sizes, PAD=pad(x), **windows)
        launcher.keep(key, start)
    start((x, mean, var, gamma, beta, out), (eps,))
    written(out)


def bn_relu_avg_pool_backward(
    x: Tensor,
    norm: Normalization,
    shape: tuple[int, ...],
    dpooled: Tensor,
    d: Tensor,
    pooled: Tensor | None,
    deferred: Deferred | None,
    launcher: Launcher,
) -> tuple[Tensor, Tensor]:
    """``d = scale * dz``, zero outside windows; rebuilds ``pooled``; returns S, T (c,) float32.

    Shapes as in :func:`bn_relu_avg_pool`, dpooled and pooled as its out. S and T move
    ``deferred`` where it is given. Reads P c elements and P c / 2^dimensions, writes P c (and
    P c / 2^dimensions with ``pooled``).
    """
    mean, var, gamma, beta, eps = norm.mean, norm.var, norm.gamma, norm.beta, norm.eps
    into = dpooled if pooled is None else pooled
    key = (
        *(bn_relu_avg_pool_backward, *layouts(x, dpooled, d, into), shape),
        *(gamma.dtype, beta.dtype, pooled is not None, deferred is not None),
    )
    found = launcher.prepared.get(key)
    if found is None:
        matrices(x, dpooled, d, into)
        C = x.shape[1]
        images, windows = _windows(shape)
        pairs = zip(images.values(), windows.values(), strict=True)
        n_w = shape[0] * math.prod(cdiv(size, window) for size, window in pairs)
        launch = launcher.launch("pool_backward", x, C)
        n_c = cdiv(C, launch.block_c)
        rows, ranges = launch.split_rows(n_w, n_c)
        sizes = images | {"n_w": n_w, "C": C, "rows": rows}
        sizes |= {"s_x": x.stride(0), "s_dpooled": dpooled.stride(0)}
        sizes |= {"s_d": d.stride(0), "s_pooled": into.stride(0)}
        constants = windows | {"REBUILD": pooled is not None, "PAD": pad(x)}
        constants["PAD_P"] = min(pad(dpooled), pad(into))
        kernel, grid = bn_relu_avg_pool_bwd_kernel, (n_c, ranges)
        start = launcher.prepare(kernel, launch, grid, sizes, **constants)
        sums = prepare_sums(launcher, ranges, 0, C, deferred is not None)
        found = launcher.keep(key, (start, (ranges, 2, C), sums))
    start, part_shape, sums = found
    part = empty(mean, *part_shape)
    start((x, mean, var, gamma, beta, dpooled, d, into, part), (eps,))
    written(d, into)
    return add_sums(sums, part, norm, deferred)[1:]


def bn_relu_global_pool(
    x: Tensor, norm: Normalization, images: int, out: Tensor, launcher: Launcher
) -> None:
    """Mean of relu(norm(x)) over each image's positions; x (P, c), out (images, c).

    Reads P c elements, writes images * c.
    """
    mean, var, gamma, beta, eps = norm.mean, norm.var, norm.gamma, norm.beta, norm.eps
    key = bn_relu_global_pool, *layouts(x, out), gamma.dtype, beta.dtype
    start = launcher.prepared.get(key)
    if start is None:
        matrices(x, out)
        P, C = x.shape
        assert out.shape[0] == images, (out.shape, images)
        launch = launcher.launch("global_pool", out, C)
        n_c = cdiv(C, launch.block_c)
        sizes = {"positions": P // images, "C": C, "n_c": n_c}
        sizes |= {"s_x": x.stride(0), "s_out": out.stride(0)}
        kernel, grid = bn_relu_global_pool_fwd_kernel, (images * n_c,)
        start = launcher.prepare(kernel, launch, grid, sizes, PAD=pad(x))
        launcher.keep(key, start)
    start((x, mean, var, gamma, beta, out), (eps,))
    written(out)


def bn_relu_global_pool_backward(
    x: Tensor,
    norm: Normalization,
    images: int,
    dpooled: Tensor,
    d: Tensor,
    deferred: Deferred | None,
    launcher: Launcher,
) -> tuple[Tensor, Tensor]:
    """``d = scale * dz``; returns S, T (c,) float32; x, d (P, c), dpooled (images, c).

    S and T move ``deferred`` where it is given. Reads P c elements, writes P c; dpooled is
    read once per tile of rows, from cache.
    """
    mean, var, gamma, beta, eps = norm.mean, norm.var, norm.gamma, norm.beta, norm.eps
    key = (
        *(bn_relu_global_pool_backward, *layouts(x, dpooled, d)),
        *(gamma.dtype, beta.dtype, deferred is not None),
    )
    found = launcher.prepared.get(key)
    if found is None:
        matrices(x, dpooled, d)
        P, C = x.shape
        launch = launcher.launch("reduce", x, C)
        n_c = cdiv(C, launch.block_c)
        rows, ranges = launch.split_rows(P, n_c)
        sizes = {"P": P, "C": C, "positions": P // images, "rows": rows}
        sizes |= {"s_x": x.stride(0), "s_dpooled": dpooled.stride(0), "s_d": d.stride(0)}
        kernel, grid = bn_relu_global_pool_bwd_kernel, (n_c, ranges)
        padded = {"PAD": pad(x), "PAD_P": pad(dpooled)}
        start = launcher.prepare(kernel, launch, grid, sizes, **padded)
        sums = prepare_sums(launcher, ranges, 0, C, deferred is not None)
        found = launcher.keep(key, (start, (ranges, 2, C), sums))
    start, part_shape, sums = found
    part = empty(mean, *part_shape)
    start((x, mean, var, gamma, beta, dpooled, d, part), (eps,))
    written(d)
    return add_sums(sums, part, norm, deferred)[1:]
