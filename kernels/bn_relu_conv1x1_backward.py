"""Backward of normalise, rectify, multiply: everything in one pass over X.

A program owns a tile of channels and walks a range of rows. Per tile of X it rebuilds Z,
multiplies dY by the weight for dZ, masks, and uses both while they are in registers:
D += scale * dZ, the sums S and T, and dY^T Z. The weight's tile and the accumulators
stay where they are for the whole walk; X is read once and D read and written once. dY
is read by every tile of channels; those programs walk the same rows side by side, so
all but the first of them find it in the L2 cache.

A bottleneck wider than one tile needs a tile of dW for each part of it and the sum over
all parts for dZ: two launches of the same kernel then, each with half of its work, and
X is read once more per part.

Workspace: 4 * ranges * (B + 2) * c bytes, ranges <= programs / tiles of channels, so
about 4 * programs * block_c * (B + 2) however wide X is.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from effdense.backends.base import Normalization
from effdense.kernels.bn_relu import bn_relu_reference
from effdense.kernels.bn_relu_conv1x1 import product_constants
from effdense.kernels.launch import Launch, alignment, cdiv, empty, jit, matrices, written
from effdense.kernels.sum_partials import sum_partials


def bn_relu_conv1x1_backward_reference(
    x: Tensor, norm: Normalization, weight: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dz (P, c), dW (B, c), S (c,) and T (c,)."""
    z = bn_relu_reference(x, norm)
    dz = (dy @ weight) * (z > 0)
    xhat = (x - norm.mean) * norm.rstd
    return dz, dy.t() @ z, dz.sum(0), (dz * xhat).sum(0)


@jit
def bn_relu_conv1x1_bwd_kernel(
    p_x,
    s_x,
    p_mean,
    p_rstd,
    p_scale,
    p_shift,
    p_w,
    s_w,
    p_dy,
    s_dy,
    p_d,
    s_d,
    p_parts,
    n_parts,
    P,
    C,
    B,
    rows,
    INPUT: tl.constexpr,
    WEIGHT: tl.constexpr,
    WHOLE_B: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_B: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BB: tl.constexpr,
):
    s_x, s_w, s_d, C = s_x * ALIGN, s_w * ALIGN, s_d * ALIGN, C * ALIGN
    s_dy, B = s_dy * ALIGN_B, B * ALIGN_B
    i_c = tl.program_id(0)
    i_s = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2)
    o_c = i_c * BC + tl.arange(0, BC)
    o_b = i_b * BB + tl.arange(0, BB)
    m_c = o_c < C
    m_b = o_b < B
    b_scale = tl.load(p_scale + o_c, m_c, 0.0)
    b_shift = tl.load(p_shift + o_c, m_c, 0.0)
    # one range of partial sums: n_parts rows of C, dW's first, then S and T
    p_parts += i_s * n_parts * C
    if INPUT:
        b_mean = tl.load(p_mean + o_c, m_c, 0.0)
        b_rstd = tl.load(p_rstd + o_c, m_c, 0.0)
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
        m_x = m_p[:, None] & m_c[None, :]
        b_x = tl.load(p_x + o_p[:, None] * s_x + o_c[None, :], m_x, 0.0).to(tl.float32)  # [BP, BC]
        b_y = b_x * b_scale[None, :] + b_shift[None, :]
        if WHOLE_B or WEIGHT:
            p_dyb = p_dy + o_p[:, None] * s_dy + o_b[None, :]
            b_dy = tl.load(p_dyb, m_p[:, None] & m_b[None, :], 0.0)  # [BP, BB]
            if b_dy.dtype != DOT:
                b_dy = b_dy.to(tl.float32).to(DOT)
        if WEIGHT:
            b_z = tl.where(b_y <= 0, 0.0, b_y)
            b_dw = tl.dot(tl.trans(b_dy), b_z.to(DOT), b_dw, input_precision=PRECISION)
        if INPUT:
            if WHOLE_B:
                b_dz = tl.dot(b_dy, b_w, input_precision=PRECISION)  # [BP, BC]
            else:
                b_dz = tl.full([BP, BC], 0.0, tl.float32)
                for start_b in range(0, B, BB):
                    o_k = start_b + tl.arange(0, BB)
                    m_k = o_k < B
                    p_dyk = p_dy + o_p[:, None] * s_dy + o_k[None, :]
                    b_dyk = tl.load(p_dyk, m_p[:, None] & m_k[None, :], 0.0)  # [BP, BB]
                    p_wk = p_w + o_k.to(tl.int64)[:, None] * s_w + o_c[None, :]
                    b_wk = tl.load(p_wk, m_k[:, None] & m_c[None, :], 0.0)  # [BB, BC]
                    if b_dyk.dtype != DOT:
                        b_dyk = b_dyk.to(tl.float32).to(DOT)
                    if b_wk.dtype != DOT:
                        b_wk = b_wk.to(tl.float32).to(DOT)
                    b_dz = tl.dot(b_dyk, b_wk, b_dz, input_precision=PRECISION)
            b_dz = tl.where(b_y <= 0, 0.0, b_dz)
            b_s += tl.sum(b_dz, 0)
            b_t += tl.sum(b_dz * ((b_x - b_mean[None, :]) * b_rstd[None, :]), 0)
            p_dc = p_d + o_p[:, None] * s_d + o_c[None, :]
            b_d = tl.load(p_dc, m_x, 0.0).to(tl.float32) + b_scale[None, :] * b_dz
            tl.store(p_dc, b_d.to(p_d.dtype.element_ty), m_x)
    if WEIGHT:
        p_dw = p_parts + o_b.to(tl.int64)[:, None] * C + o_c[None, :]
        tl.store(p_dw, b_dw, m_b[:, None] & m_c[None, :])
    if INPUT:
        tl.store(p_parts + (n_parts - 2) * C + o_c, b_s, m_c)
        tl.store(p_parts + (n_parts - 1) * C + o_c, b_t, m_c)


def bn_relu_conv1x1_backward(
    x: Tensor,
    norm: Normalization,
    weight: Tensor,
    dy: Tensor,
    d: Tensor,
    need_weight: bool,
    launch: Launch,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """``d += scale * dz``, dz = (dy @ weight) [z > 0]; returns dW (B, c) or None, S, T (c,).

    x, d (P, c); weight (B, c); dy (P, B); results float32. Reads 2 P c elements (x, d)
    and P B, writes P c; P c more per ``block_b`` columns of a wider bottleneck.
    4 P c B floating-point operations.
    """
    matrices(x, weight, dy, d)
    P, C = x.shape
    B = weight.shape[0]
    n_parts = B + 2 if need_weight else 2
    if P == 0:
        sums = empty(x, n_parts, C).zero_()
        return sums[:-2] if need_weight else None, sums[-2], sums[-1]
    n_c, n_b = cdiv(C, launch.block_c), cdiv(B, launch.block_b)
    rows, splits = launch.split_rows(P, n_c)
    parts = empty(x, splits, n_parts, C)
    align = alignment(x.stride(0), weight.stride(0), d.stride(0), C)
    align_b = alignment(dy.stride(0), B)
    args = (x, x.stride(0) // align, *norm, weight, weight.stride(0) // align)
    args += (dy, dy.stride(0) // align_b, d, d.stride(0) // align)
    args += (parts, n_parts, P, C // align, B // align_b, rows)
    constants = product_constants(bn_relu_conv1x1_bwd_kernel, x)
    constants |= {"ALIGN": align, "ALIGN_B": align_b, "WHOLE_B": n_b == 1}
    constants |= {"BP": launch.block_p, "BC": launch.block_c, "BB": launch.block_b}
    kernel = bn_relu_conv1x1_bwd_kernel
    together = need_weight and n_b == 1
    launch.start(kernel, (n_c, splits, 1), *args, INPUT=True, WEIGHT=together, **constants)
    if need_weight and not together:
        launch.start(kernel, (n_c, splits, n_b), *args, INPUT=False, WEIGHT=True, **constants)
    written(d)
    sums = sum_partials(parts, launch)
    return sums[:-2] if need_weight else None, sums[-2], sums[-1]
