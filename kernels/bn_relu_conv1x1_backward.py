"""Backward of normalise, rectify, multiply: everything in one pass over X.

A program owns a tile of channels and walks a range of rows. Its prologue makes dY of dZ2, the
gradient after the next norm's ReLU: that norm's correction is no pass of its own. Per tile of
X it rebuilds Z, multiplies dY by the weight for dZ, masks, and uses both while they are in
registers: D += scale * dZ, the sums S and T, and dY^T Z. The weight's tile and the
accumulators stay where they are for the whole walk; X is read once and D read and written
once. Y and dZ2 are read by every tile of channels; those programs walk the same rows side by
side, so all but the first of them find them in the L2 cache.

D's columns behind c, up to the multiple of 16 that is loaded, get the bits back that they
held: no other program of the launch touches them.

A bottleneck wider than one tile needs a tile of dW for each part of it and the sum over
all parts for dZ: two launches of the same kernel then, each with half of its work, and
X is read once more per part.

Workspace: 4 * ranges * (B + 2) * c bytes, ranges <= programs / tiles of channels, so
about 4 * programs * block_c * (B + 2) however wide X is.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from effdense.backends.base import Deferred, Normalization, PendingNorm
from effdense.kernels.bn_relu import bn_relu_backward_reference, bn_relu_reference
from effdense.kernels.bn_relu_conv1x1 import operand_type
from effdense.kernels.launch import Launcher, jit
from effdense.kernels.layouts import cdiv, empty, layouts, matrices, pad, written
from effdense.kernels.sums import add_sums, prepare_sums
from effdense.kernels.tiles import (
    backward_terms,
    columns_loaded,
    normalization,
    normalized,
    rectified,
)


def bn_relu_conv1x1_backward_reference(
    x: Tensor, norm: Normalization, weight: Tensor, dz: Tensor, pending: PendingNorm
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dx before D's scale (P, c), dW (B, c), S (c,) and T (c,); dz, pending.y (P, B)."""
    y, norm2 = pending.y, pending.norm
    dy = bn_relu_backward_reference(y, norm2, dz)[0]
    if pending.correction is not None:
        s, t, count = pending.correction
        dy = dy - (s + t * (y - norm2.mean) * norm2.rstd) / count
    dy = (norm2.scale * dy).to(dz.dtype)
    z = bn_relu_reference(x, norm)
    masked, s, t = bn_relu_backward_reference(x, norm, dy @ weight.to(dy.dtype))
    return masked, dy.t() @ z, s, t


@triton.jit
def _correction(p_s, p_t, per_count, o_b, m_b, b_mean, b_rstd, b_scale):
    """Of BN2: the part of dY that is affine in y, as offset and slope of the columns o_b."""
    b_s = tl.load(p_s + o_b, m_b, 0.0) * per_count
    b_slope = b_scale * b_rstd * tl.load(p_t + o_b, m_b, 0.0) * per_count
    return b_scale * b_s - b_slope * b_mean, b_slope


@triton.jit
def _gradient_of_y(b_y, b_dz, m_p, b_scale, b_shift, b_offset, b_slope, CORRECT: tl.constexpr):
    """DY of a tile, [BP, BB] float32, from Y and dZ2; zero where nothing is."""
    b_y = b_y.to(tl.float32)
    b_g = b_scale[None, :] * b_dz.to(tl.float32)
    b_g = tl.where(normalized(b_y, b_scale, b_shift) <= 0, 0.0, b_g)
    if CORRECT:
        b_g -= b_offset[None, :] + b_slope[None, :] * b_y
        # the correction is not zero in rows that don't exist
        b_g = tl.where(m_p[:, None], b_g, 0.0)
    return b_g


@jit(
    ALIGN=("s_x", "s_d"),
    ALIGN_W=("s_w", "C"),
    ALIGN_B=("s_dz", "s_y", "B"),
)
def bn_relu_conv1x1_bwd_kernel(
    p_x,
    p_mean,
    p_var,
    p_gamma,
    p_beta,
    p_w,
    p_dz,
    p_y,
    p_mean2,
    p_var2,
    p_gamma2,
    p_beta2,
    p_s2,
    p_t2,
    p_d,
    p_part,
    eps,
    eps2,
    per_count,
    s_x,
    s_w,
    s_dz,
    s_y,
    s_d,
    n_parts,
    P,
    C,
    B,
    rows,
    CORRECT: tl.constexpr,
    INPUT: tl.constexpr,
    WEIGHT: tl.constexpr,
    WHOLE_B: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    PAD: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_W: tl.constexpr,
    ALIGN_B: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BB: tl.constexpr,
):
    s_x, s_d, s_w, C = s_x * ALIGN, s_d * ALIGN, s_w * ALIGN_W, C * ALIGN_W
    s_dz, s_y, B = s_dz * ALIGN_B, s_y * ALIGN_B, B * ALIGN_B
    i_c = tl.program_id(0)
    i_s = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2)
    o_c = i_c * BC + tl.arange(0, BC)
    o_b = i_b * BB + tl.arange(0, BB)
    m_c = o_c < C
    m_b = o_b < B
    m_load = columns_loaded(o_c, C, PAD)
    b_mean, b_rstd, b_scale, b_shift = normalization(p_mean, p_var, p_gamma, p_beta, eps, o_c, m_c)
    if WHOLE_B or WEIGHT:
        b_mean2, b_rstd2, b_scale2, b_shift2 = normalization(
            p_mean2, p_var2, p_gamma2, p_beta2, eps2, o_b, m_b
        )
        b_offset2, b_slope2 = b_mean2, b_mean2
        if CORRECT:
            b_offset2, b_slope2 = _correction(
                p_s2, p_t2, per_count, o_b, m_b, b_mean2, b_rstd2, b_scale2
            )
    # one range of partial sums: n_parts rows of C, dW's first, then S and T
    p_part += i_s * n_parts * C
    if INPUT:
        b_s = tl.full([BC], 0.0, tl.float32)
        b_t = tl.full([BC], 0.0, tl.float32)
        if WHOLE_B:
            p_wb = p_w + o_b.to(tl.int64)[:, None] * s_w + o_c[None, :]
            b_w = tl.load(p_wb, m_b[:, None] & m_c[None, :], 0.0)  # [BB, BC]
            if b_w.dtype != DOT:
                b_w = b_w.to(tl.float32).to(DOT)
    if WEIGHT:
        b_dw = tl.full([BB, BC], 0.0, tl.float32)
    first = i_s * rows
    last = tl.minimum(first + rows, P)
    for start in range(first, last, BP):
        o_p = (start + tl.arange(0, BP)).to(tl.int64)
        m_p = o_p < last
        m_x = m_p[:, None] & m_load[None, :]
        b_x = tl.load(p_x + o_p[:, None] * s_x + o_c[None, :], m_x, 0.0)  # [BP, BC]
        if WHOLE_B or WEIGHT:
            m_y = m_p[:, None] & m_b[None, :]
            b_y = tl.load(p_y + o_p[:, None] * s_y + o_b[None, :], m_y, 0.0)  # [BP, BB]
            b_dy = tl.load(p_dz + o_p[:, None] * s_dz + o_b[None, :], m_y, 0.0)
            b_dy = _gradient_of_y(
                b_y, b_dy, m_p, b_scale2, b_shift2, b_offset2, b_slope2, CORRECT
            ).to(DOT)
        if WEIGHT:
            b_z = rectified(normalized(b_x, b_scale, b_shift))
            if PAD > 1:
                # of columns that are not this layer's even a NaN must not survive
                b_z = tl.where(m_c[None, :], b_z, 0.0)
            b_dw = tl.dot(tl.trans(b_dy), b_z.to(DOT), b_dw, input_precision=PRECISION)
        if INPUT:
            if WHOLE_B:
                b_dz = tl.dot(b_dy, b_w, input_precision=PRECISION)  # [BP, BC]
            else:
                b_dz = tl.full([BP, BC], 0.0, tl.float32)
                for start_b in range(0, B, BB):
                    o_k = start_b + tl.arange(0, BB)
                    m_k = o_k < B
                    b_mean_k, b_rstd_k, b_scale_k, b_shift_k = normalization(
                        p_mean2, p_var2, p_gamma2, p_beta2, eps2, o_k, m_k
                    )
                    b_offset_k, b_slope_k = b_mean_k, b_mean_k
                    if CORRECT:
                        b_offset_k, b_slope_k = _correction(
                            p_s2, p_t2, per_count, o_k, m_k, b_mean_k, b_rstd_k, b_scale_k
                        )
                    m_yk = m_p[:, None] & m_k[None, :]
                    b_yk = tl.load(p_y + o_p[:, None] * s_y + o_k[None, :], m_yk, 0.0)
                    b_dyk = tl.load(p_dz + o_p[:, None] * s_dz + o_k[None, :], m_yk, 0.0)
                    b_dyk = _gradient_of_y(
                        b_yk, b_dyk, m_p, b_scale_k, b_shift_k, b_offset_k, b_slope_k, CORRECT
                    ).to(DOT)  # [BP, BB]
                    p_wk = p_w + o_k.to(tl.int64)[:, None] * s_w + o_c[None, :]
                    b_wk = tl.load(p_wk, m_k[:, None] & m_c[None, :], 0.0)  # [BB, BC]
                    if b_wk.dtype != DOT:
                        b_wk = b_wk.to(tl.float32).to(DOT)
                    b_dz = tl.dot(b_dyk, b_wk, b_dz, input_precision=PRECISION)
            b_g, b_gx = backward_terms(b_x, b_dz, b_mean, b_scale, b_shift)
            b_s += tl.sum(b_g, 0)
            b_t += tl.sum(b_gx, 0)
            p_dc = p_d + o_p[:, None] * s_d + o_c[None, :]
            b_d = tl.load(p_dc, m_x, 0.0)
            b_new = (b_d.to(tl.float32) + b_scale[None, :] * b_g).to(p_d.dtype.element_ty)
            if PAD > 1:
                b_new = tl.where(m_c[None, :], b_new, b_d)
            tl.store(p_dc, b_new, m_x)
    if WEIGHT:
        p_dw = p_part + o_b.to(tl.int64)[:, None] * C + o_c[None, :]
        tl.store(p_dw, b_dw, m_b[:, None] & m_c[None, :])
    if INPUT:
        tl.store(p_part + (n_parts - 2) * C + o_c, b_s, m_c)
        tl.store(p_part + (n_parts - 1) * C + o_c, b_t * b_rstd, m_c)


def bn_relu_conv1x1_backward(
    x: Tensor,
    norm: Normalization,
    weight: Tensor,
    dz: Tensor,
    d: Tensor,
    need_weight: bool,
    pending: PendingNorm,
    deferred: Deferred | None,
    launcher: Launcher,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """``d += scale * dx``, dx = (dy @ weight) [z > 0]; returns dW (B, c) or None, S, T (c,).

    dy = scale2 * (dz [z2 > 0] - (S2 + T2 yhat) / count), of ``pending``. x, d (P, c); weight
    (B, c); dz, pending.y (P, B); results float32. S and T move ``deferred`` where it is given.
    Reads 2 P c elements (x, d) and 2 P B, writes P c; P c and 2 P B more per ``block_b``
    columns of a wider bottleneck. 4 P c B floating-point operations.
    """
    mean, var, gamma, beta, eps = norm.mean, norm.var, norm.gamma, norm.beta, norm.eps
    y, norm2, correction = pending
    gamma2, beta2 = norm2.gamma, norm2.beta
    correct, defer = correction is not None, deferred is not None
    key = (
        *(bn_relu_conv1x1_backward, *layouts(x, weight, dz, y, d)),
        *(gamma.dtype, beta.dtype, gamma2.dtype, beta2.dtype, need_weight, correct, defer),
    )
    found = launcher.prepared.get(key)
    if found is None:
        flags = need_weight, correct, defer
        found = launcher.keep(key, _prepare(x, weight, dz, y, d, *flags, launcher))
    starts, shape, sums = found
    part = empty(mean, *shape)
    s2, t2, count = (mean, mean, 1.0) if correction is None else correction
    tensors = (
        *(x, mean, var, gamma, beta, weight, dz, y, norm2.mean, norm2.var, gamma2, beta2),
        *(s2, t2, d, part),
    )
    floats = eps, norm2.eps, 1.0 / count
    for start in starts:
        start(tensors, floats)
    written(d)
    return add_sums(sums, part, norm, deferred)


def _prepare(
    x: Tensor,
    weight: Tensor,
    dz: Tensor,
    y: Tensor,
    d: Tensor,
    need_weight: bool,
    correct: bool,
    defer: bool,
    launcher: Launcher,
) -> Any:
    matrices(x, weight, dz, y, d)
    (P, C), B = x.shape, weight.shape[0]
    launch = launcher.launch("product_backward", x, C, B)
    n_c, n_b = cdiv(C, launch.block_c), cdiv(B, launch.block_b)
    rows, ranges = launch.split_rows(P, n_c)
    weights = B if need_weight else 0
    sizes = {"P": P, "C": C, "B": B, "rows": rows, "n_parts": weights + 2}
    sizes |= {"s_x": x.stride(0), "s_w": weight.stride(0), "s_d": d.stride(0)}
    sizes |= {"s_dz": dz.stride(0), "s_y": y.stride(0)}
    kernel = bn_relu_conv1x1_bwd_kernel
    constants = {"CORRECT": correct, "WHOLE_B": n_b == 1, "PAD": min(pad(x), pad(d))}
    constants |= {"DOT": operand_type(kernel, x)}
    together = need_weight and n_b == 1
    modes: list[tuple[tuple[int, ...], bool, bool]] = [((n_c, ranges), True, together)]
    if need_weight and not together:
        modes.append(((n_c, ranges, n_b), False, True))
    starts = [
        launcher.prepare(kernel, launch, grid, sizes, INPUT=inputs, WEIGHT=dw, **constants)
        for grid, inputs, dw in modes
    ]
    shape = ranges, weights + 2, C
    return starts, shape, prepare_sums(launcher, ranges, weights, C, defer)
