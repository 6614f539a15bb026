"""BN-ReLU over a strided matrix: forward, the backward's sums, and its input gradient.

The backward's input gradient comes in two forms. Immediate: all three terms at once, in
place of dz, for a norm whose input has one reader (BN2). Deferred: only the term that
differs from position to position, added to the gradient buffer, for a norm that reads a
prefix of the features (BN1); :mod:`effdense.kernels.finish_gradient` applies the rest.

Workspace of the sums: 8 * ranges * c bytes, ranges <= programs / tiles of channels.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from effdense.backends.base import Normalization
from effdense.kernels.launch import Launch, alignment, cdiv, empty, jit, matrices, written
from effdense.kernels.sum_partials import sum_partials


def bn_relu_reference(x: Tensor, norm: Normalization) -> Tensor:
    """relu(scale * x + shift) in x's type; x (P, c)."""
    return (norm.scale * x + norm.shift).relu().to(x.dtype)


def bn_relu_backward_reference(
    x: Tensor, norm: Normalization, dz: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Dz [z > 0], S and T of x (P, c)."""
    masked = dz * (bn_relu_reference(x, norm) > 0)
    xhat = (x - norm.mean) * norm.rstd
    return masked, masked.sum(0), (masked * xhat).sum(0)


@jit
def bn_relu_fwd_kernel(
    p_x,
    s_x,
    p_scale,
    p_shift,
    p_out,
    s_out,
    P,
    C,
    n_c,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    s_x, s_out, C = s_x * ALIGN, s_out * ALIGN, C * ALIGN
    # channel tiles of a row tile run next to each other: whole rows stream from memory
    i_p, i_c = tl.program_id(0) // n_c, tl.program_id(0) % n_c
    o_p = i_p.to(tl.int64) * BP + tl.arange(0, BP)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    m_x = (o_p < P)[:, None] & m_c[None, :]
    b_x = tl.load(p_x + o_p[:, None] * s_x + o_c[None, :], m_x, 0.0).to(tl.float32)  # [BP, BC]
    b_scale = tl.load(p_scale + o_c, m_c, 0.0)
    b_shift = tl.load(p_shift + o_c, m_c, 0.0)
    b_y = b_x * b_scale[None, :] + b_shift[None, :]
    # written so that a NaN stays one, as in torch
    b_z = tl.where(b_y <= 0, 0.0, b_y)
    tl.store(p_out + o_p[:, None] * s_out + o_c[None, :], b_z.to(p_out.dtype.element_ty), m_x)


@jit
def bn_relu_bwd_reduce_kernel(
    p_x,
    s_x,
    p_mean,
    p_rstd,
    p_scale,
    p_shift,
    p_dz,
    s_dz,
    p_d,
    s_d,
    p_sums,
    P,
    C,
    rows,
    ACCUMULATE: tl.constexpr,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    s_x, s_dz, s_d, C = s_x * ALIGN, s_dz * ALIGN, s_d * ALIGN, C * ALIGN
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
        b_dz = tl.load(p_dz + o_p[:, None] * s_dz + o_c[None, :], m_x, 0.0).to(tl.float32)
        b_y = b_x * b_scale[None, :] + b_shift[None, :]
        b_g = tl.where(b_y <= 0, 0.0, b_dz)
        b_s += b_g
        b_t += b_g * ((b_x - b_mean[None, :]) * b_rstd[None, :])
        if ACCUMULATE:
            p_tile = p_d + o_p[:, None] * s_d + o_c[None, :]
            b_d = tl.load(p_tile, m_x, 0.0).to(tl.float32) + b_scale[None, :] * b_g
            tl.store(p_tile, b_d.to(p_d.dtype.element_ty), m_x)
    p_sums += 2 * i_s * C
    tl.store(p_sums + o_c, tl.sum(b_s, 0), m_c)
    tl.store(p_sums + C + o_c, tl.sum(b_t, 0), m_c)


@jit
def bn_relu_bwd_apply_kernel(
    p_x,
    s_x,
    p_mean,
    p_rstd,
    p_scale,
    p_shift,
    p_dz,
    s_dz,
    p_s,
    p_t,
    per_count,
    P,
    C,
    n_c,
    CORRECT: tl.constexpr,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    s_x, s_dz, C = s_x * ALIGN, s_dz * ALIGN, C * ALIGN
    i_p, i_c = tl.program_id(0) // n_c, tl.program_id(0) % n_c
    o_p = i_p.to(tl.int64) * BP + tl.arange(0, BP)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    m_x = (o_p < P)[:, None] & m_c[None, :]
    b_x = tl.load(p_x + o_p[:, None] * s_x + o_c[None, :], m_x, 0.0).to(tl.float32)  # [BP, BC]
    p_tile = p_dz + o_p[:, None] * s_dz + o_c[None, :]
    b_dz = tl.load(p_tile, m_x, 0.0).to(tl.float32)
    b_scale = tl.load(p_scale + o_c, m_c, 0.0)
    b_shift = tl.load(p_shift + o_c, m_c, 0.0)
    b_y = b_x * b_scale[None, :] + b_shift[None, :]
    b_g = tl.where(b_y <= 0, 0.0, b_dz)
    if CORRECT:
        b_mean = tl.load(p_mean + o_c, m_c, 0.0)
        b_rstd = tl.load(p_rstd + o_c, m_c, 0.0)
        b_s = tl.load(p_s + o_c, m_c, 0.0) * per_count
        b_t = tl.load(p_t + o_c, m_c, 0.0) * per_count
        b_xhat = (b_x - b_mean[None, :]) * b_rstd[None, :]
        b_g -= b_s[None, :] + b_t[None, :] * b_xhat
    tl.store(p_tile, (b_scale[None, :] * b_g).to(p_dz.dtype.element_ty), m_x)


def bn_relu(x: Tensor, norm: Normalization, out: Tensor, launch: Launch) -> None:
    """Out = relu(scale * x + shift); x, out (P, c) of any row stride and storage type.

    Reads P c elements, writes P c.
    """
    matrices(x, out)
    P, C = x.shape
    n_c = cdiv(C, launch.block_c)
    align = alignment(x.stride(0), out.stride(0), C)
    args = (x, x.stride(0) // align, norm.scale, norm.shift, out, out.stride(0) // align)
    tile = {"BP": launch.block_p, "BC": launch.block_c}
    grid = (cdiv(P, launch.block_p) * n_c,)
    launch.start(bn_relu_fwd_kernel, grid, *args, P, C // align, n_c, ALIGN=align, **tile)
    written(out)


def bn_relu_backward_reduce(
    x: Tensor, norm: Normalization, dz: Tensor, d: Tensor | None, launch: Launch
) -> tuple[Tensor, Tensor]:
    """S = sum dz [z > 0] and T = sum dz [z > 0] xhat, each (c,) float32.

    With ``d`` (P, c), also ``d += scale * dz [z > 0]``. Reads 2 P c elements (x, dz);
    with d reads 3 P c and writes P c.
    """
    into = dz if d is None else d
    matrices(x, dz, into)
    P, C = x.shape
    if P == 0:
        return empty(x, C).zero_(), empty(x, C).zero_()
    n_c = cdiv(C, launch.block_c)
    rows, splits = launch.split_rows(P, n_c)
    parts = empty(x, splits, 2, C)
    align = alignment(x.stride(0), dz.stride(0), into.stride(0), C)
    args = (x, x.stride(0) // align, *norm, dz, dz.stride(0) // align, into)
    args += (into.stride(0) // align, parts, P, C // align, rows)
    tile = {"BP": launch.block_p, "BC": launch.block_c}
    flags = {"ACCUMULATE": d is not None, "ALIGN": align}
    launch.start(bn_relu_bwd_reduce_kernel, (n_c, splits), *args, **flags, **tile)
    if d is not None:
        written(d)
    s, t = sum_partials(parts, launch)
    return s, t


def bn_relu_backward_apply(
    x: Tensor,
    norm: Normalization,
    dz: Tensor,
    correction: tuple[Tensor, Tensor, float] | None,
    launch: Launch,
) -> None:
    """``dz <- scale * (dz [z > 0] - (S + T xhat) / count)``, in place; (S, T, count) or None.

    Reads 2 P c elements, writes P c.
    """
    matrices(x, dz)
    P, C = x.shape
    s, t, count = correction if correction is not None else (norm.mean, norm.mean, 1.0)
    n_c = cdiv(C, launch.block_c)
    align = alignment(x.stride(0), dz.stride(0), C)
    args = (x, x.stride(0) // align, *norm, dz, dz.stride(0) // align)
    args += (s, t, 1.0 / count, P, C // align, n_c)
    tile = {"BP": launch.block_p, "BC": launch.block_c}
    flags = {"CORRECT": correction is not None, "ALIGN": align}
    grid = (cdiv(P, launch.block_p) * n_c,)
    launch.start(bn_relu_bwd_apply_kernel, grid, *args, **flags, **tile)
    written(dz)
