"""BN-ReLU over a strided matrix: forward, the backward's sums, and its input gradient.

A dense layer needs none of these where its 3x3 convolution is a kernel of ours, which has
them as prologue and epilogue; they stand beside the vendor's convolution.

Workspace of the sums: 8 * ranges * c bytes, ranges <= programs / tiles of channels.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from effdense.backends.base import Normalization
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


def bn_relu_reference(x: Tensor, norm: Normalization) -> Tensor:
    """relu(scale * x + shift) in x's type; x (P, c)."""
    return (norm.scale * x + norm.shift).relu().to(x.dtype)


def bn_relu_backward_reference(
    x: Tensor, norm: Normalization, dz: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dz [z > 0], S and T of x (P, c)."""
    masked = dz * (bn_relu_reference(x, norm) > 0)
    xhat = (x - norm.mean) * norm.rstd
    return masked, masked.sum(0), (masked * xhat).sum(0)


@jit(ALIGN=("s_x",), ALIGN_C=("C", "s_out"))
def bn_relu_fwd_kernel(
    p_x,
    p_mean,
    p_var,
    p_gamma,
    p_beta,
    p_out,
    eps,
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
    s_x, s_out, C = s_x * ALIGN, s_out * ALIGN_C, C * ALIGN_C
    # channel tiles of a row tile run next to each other: whole rows stream from memory
    i_p, i_c = tl.program_id(0) // n_c, tl.program_id(0) % n_c
    o_p = i_p.to(tl.int64) * BP + tl.arange(0, BP)
    o_c = i_c * BC + tl.arange(0, BC)
    m_p = o_p < P
    _, _, b_scale, b_shift = normalization(p_mean, p_var, p_gamma, p_beta, eps, o_c, o_c < C)
    m_x = m_p[:, None] & columns_loaded(o_c, C, PAD)[None, :]
    b_x = tl.load(p_x + o_p[:, None] * s_x + o_c[None, :], m_x, 0.0)  # [BP, BC]
    b_z = rectified(normalized(b_x, b_scale, b_shift))
    store_columns(p_out + o_p[:, None] * s_out + o_c[None, :], b_z, m_p, o_c, C)


@jit(ALIGN=("s_x", "s_dz", "s_d", "C"))
def bn_relu_bwd_reduce_kernel(
    p_x,
    p_mean,
    p_var,
    p_gamma,
    p_beta,
    p_dz,
    p_d,
    p_part,
    eps,
    s_x,
    s_dz,
    s_d,
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
    b_mean, b_rstd, b_scale, b_shift = normalization(p_mean, p_var, p_gamma, p_beta, eps, o_c, m_c)
    # summed over lanes once, after the loop
    b_s = tl.full([BP, BC], 0.0, tl.float32)
    b_t = tl.full([BP, BC], 0.0, tl.float32)
    first = i_s * rows
    last = tl.minimum(first + rows, P)
    for start in range(first, last, BP):
        o_p = (start + tl.arange(0, BP)).to(tl.int64)
        m_x = (o_p < last)[:, None] & m_c[None, :]
        b_x = tl.load(p_x + o_p[:, None] * s_x + o_c[None, :], m_x, 0.0)  # [BP, BC]
        b_dz = tl.load(p_dz + o_p[:, None] * s_dz + o_c[None, :], m_x, 0.0).to(tl.float32)
        b_g, b_gx = backward_terms(b_x, b_dz, b_mean, b_scale, b_shift)
        b_s += b_g
        b_t += b_gx
        if ACCUMULATE:
            p_tile = p_d + o_p[:, None] * s_d + o_c[None, :]
            b_d = tl.load(p_tile, m_x, 0.0).to(tl.float32) + b_scale[None, :] * b_g
            tl.store(p_tile, b_d.to(p_d.dtype.element_ty), m_x)
    store_sums(p_part, i_s, C, o_c, m_c, tl.sum(b_s, 0), tl.sum(b_t, 0), b_rstd)


@jit(ALIGN=("s_x", "s_dz", "C"))
def bn_relu_bwd_apply_kernel(
    p_x,
    p_mean,
    p_var,
    p_gamma,
    p_beta,
    p_dz,
    p_s,
    p_t,
    eps,
    per_count,
    s_x,
    s_dz,
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
    b_mean, b_rstd, b_scale, b_shift = normalization(p_mean, p_var, p_gamma, p_beta, eps, o_c, m_c)
    b_x = tl.load(p_x + o_p[:, None] * s_x + o_c[None, :], m_x, 0.0).to(tl.float32)  # [BP, BC]
    p_tile = p_dz + o_p[:, None] * s_dz + o_c[None, :]
    b_dz = tl.load(p_tile, m_x, 0.0).to(tl.float32)
    b_g = tl.where(normalized(b_x, b_scale, b_shift) <= 0, 0.0, b_dz)
    if CORRECT:
        b_s = tl.load(p_s + o_c, m_c, 0.0) * per_count
        b_t = tl.load(p_t + o_c, m_c, 0.0) * per_count
        b_g -= b_s[None, :] + b_t[None, :] * ((b_x - b_mean[None, :]) * b_rstd[None, :])
    tl.store(p_tile, (b_scale[None, :] * b_g).to(p_dz.dtype.element_ty), m_x)


def bn_relu(x: Tensor, norm: Normalization, out: Tensor, launcher: Launcher) -> None:
    """out = relu(norm(x)); x, out (P, c) of any row stride and storage type.

    Reads P c elements, writes P c.
    """
    mean, var, gamma, beta, eps = norm.mean, norm.var, norm.gamma, norm.beta, norm.eps
    key = bn_relu, *layouts(x, out), gamma.dtype, beta.dtype
    start = launcher.prepared.get(key)
    if start is None:
        matrices(x, out)
        P, C = x.shape
        launch = launcher.launch("map", x, C)
        n_c = cdiv(C, launch.block_c)
        sizes = {"P": P, "C": C, "n_c": n_c, "s_x": x.stride(0), "s_out": out.stride(0)}
        grid = (cdiv(P, launch.block_p) * n_c,)
        start = launcher.prepare(bn_relu_fwd_kernel, launch, grid, sizes, PAD=pad(x))
        launcher.keep(key, start)
    start((x, mean, var, gamma, beta, out), (eps,))
    written(out)


def bn_relu_backward_reduce(
    x: Tensor, norm: Normalization, dz: Tensor, d: Tensor | None, launcher: Launcher
) -> tuple[Tensor, Tensor]:
    """S = sum dz [z > 0] and T = sum dz [z > 0] xhat, each (c,) float32; x, dz (P, c).

    With ``d`` (P, c), also ``d += scale * dz [z > 0]``. Reads 2 P c elements; with d reads
    3 P c and writes P c.
    """
    mean, var, gamma, beta, eps = norm.mean, norm.var, norm.gamma, norm.beta, norm.eps
    accumulate, into = d is not None, dz if d is None else d
    key = (
        *(bn_relu_backward_reduce, *layouts(x, dz, into)),
        *(gamma.dtype, beta.dtype, accumulate),
    )
    found = launcher.prepared.get(key)
    if found is None:
        matrices(x, dz, into)
        P, C = x.shape
        launch = launcher.launch("reduce", x, C)
        n_c = cdiv(C, launch.block_c)
        rows, ranges = launch.split_rows(P, n_c)
        sizes = {"P": P, "C": C, "rows": rows}
        sizes |= {"s_x": x.stride(0), "s_dz": dz.stride(0), "s_d": into.stride(0)}
        kernel, grid = bn_relu_bwd_reduce_kernel, (n_c, ranges)
        start = launcher.prepare(kernel, launch, grid, sizes, ACCUMULATE=accumulate)
        found = start, (ranges, 2, C), prepare_sums(launcher, ranges, 0, C, False)
        launcher.keep(key, found)
    start, shape, sums = found
    part = empty(mean, *shape)
    start((x, mean, var, gamma, beta, dz, into, part), (eps,))
    if d is not None:
        written(d)
    return add_sums(sums, part, norm, None)[1:]


def bn_relu_backward_apply(
    x: Tensor,
    norm: Normalization,
    dz: Tensor,
    correction: tuple[Tensor, Tensor, float] | None,
    launcher: Launcher,
) -> None:
    """``dz <- scale * (dz [z > 0] - (S + T xhat) / count)``, in place; (S, T, count) or None.

    Reads 2 P c elements, writes P c.
    """
    mean, var, gamma, beta, eps = norm.mean, norm.var, norm.gamma, norm.beta, norm.eps
    correct = correction is not None
    s, t, count = (mean, mean, 1.0) if correction is None else correction
    key = bn_relu_backward_apply, *layouts(x, dz), gamma.dtype, beta.dtype, correct
    start = launcher.prepared.get(key)
    if start is None:
        matrices(x, dz)
        P, C = x.shape
        launch = launcher.launch("map", x, C)
        n_c = cdiv(C, launch.block_c)
        sizes = {"P": P, "C": C, "n_c": n_c, "s_x": x.stride(0), "s_dz": dz.stride(0)}
        grid = (cdiv(P, launch.block_p) * n_c,)
        start = launcher.prepare(bn_relu_bwd_apply_kernel, launch, grid, sizes, CORRECT=correct)
        launcher.keep(key, start)
    start((x, mean, var, gamma, beta, dz, s, t), (eps, 1.0 / count))
    written(dz)
