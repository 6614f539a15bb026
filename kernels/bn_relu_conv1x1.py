"""Normalise, rectify and multiply: the dense layer's first convolution, forward.

The normalised features Z never exist in memory: each tile of X becomes its tile of Z in
registers, on its way into the product. One program owns a tile of rows and, up to 256
columns, the whole width of the bottleneck, so the prefix of X is read once. The
statistics of the product (the next norm's) are taken from the accumulator before it
leaves, on values rounded as they are stored.

Workspace with statistics: 8 * ceil(P / block_p) * B bytes, 1/32 of a 16-bit output at
block_p = 128.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from effdense.backends.base import Normalization
from effdense.kernels.bn_relu import bn_relu_reference
from effdense.kernels.launch import (
    Launch,
    alignment,
    cdiv,
    empty,
    interpreted,
    jit,
    matrices,
    written,
)
from effdense.kernels.statistics import combine_statistics


def bn_relu_conv1x1_reference(x: Tensor, norm: Normalization, weight: Tensor) -> Tensor:
    """relu(norm(x)) @ weight^T; x (P, c), weight (B, c)."""
    return bn_relu_reference(x, norm) @ weight.t()


def product_constants(kernel: Any, x: Tensor) -> dict[str, Any]:
    """Type and precision of a product's operands.

    Operands are rounded to the storage type, which is what tensor cores take; the sum is
    float32 always. float32 operands follow torch's own switch between TF32 and exact
    products. The interpreter multiplies bfloat16 as if it were an integer, so it gets
    float32 operands.
    """
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    dot = types[x.dtype]
    if interpreted(kernel) and dot == tl.bfloat16:
        dot = tl.float32
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return {"DOT": dot, "PRECISION": precision}


@jit
def bn_relu_conv1x1_fwd_kernel(
    p_x,
    s_x,
    p_scale,
    p_shift,
    p_w,
    s_w,
    p_out,
    s_out,
    p_mean,
    p_m2,
    P,
    C,
    B,
    n_b,
    STATISTICS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_B: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BB: tl.constexpr,
):
    s_x, s_w, C = s_x * ALIGN, s_w * ALIGN, C * ALIGN
    s_out, B = s_out * ALIGN_B, B * ALIGN_B
    i_p = (tl.program_id(0) // n_b).to(tl.int64)
    i_b = tl.program_id(0) % n_b
    o_p = i_p * BP + tl.arange(0, BP)
    o_b = i_b * BB + tl.arange(0, BB)
    m_p = o_p < P
    m_b = o_b < B
    b_acc = tl.full([BP, BB], 0.0, tl.float32)
    for start in range(0, C, BC):
        o_c = start + tl.arange(0, BC)
        m_c = o_c < C
        p_tile = p_x + o_p[:, None] * s_x + o_c[None, :]
        b_x = tl.load(p_tile, m_p[:, None] & m_c[None, :], 0.0).to(tl.float32)  # [BP, BC]
        # masked channels normalise to zero and add nothing
        b_scale = tl.load(p_scale + o_c, m_c, 0.0)
        b_shift = tl.load(p_shift + o_c, m_c, 0.0)
        b_y = b_x * b_scale[None, :] + b_shift[None, :]
        b_z = tl.where(b_y <= 0, 0.0, b_y)
        p_wt = p_w + o_b.to(tl.int64)[None, :] * s_w + o_c[:, None]
        b_wt = tl.load(p_wt, m_c[:, None] & m_b[None, :], 0.0)  # [BC, BB]
        if b_wt.dtype != DOT:
            b_wt = b_wt.to(tl.float32).to(DOT)
        b_acc = tl.dot(b_z.to(DOT), b_wt, b_acc, input_precision=PRECISION)
    m_out = m_p[:, None] & m_b[None, :]
    b_out = b_acc.to(p_out.dtype.element_ty)  # [BP, BB]
    tl.store(p_out + o_p[:, None] * s_out + o_b[None, :], b_out, m_out)
    if STATISTICS:
        n_rows = tl.minimum(P - i_p * BP, BP).to(tl.float32)
        b_out = b_out.to(tl.float32)
        b_mean = tl.sum(tl.where(m_out, b_out, 0.0), 0) / n_rows  # [BB]
        b_dev = tl.where(m_out, b_out - b_mean[None, :], 0.0)
        tl.store(p_mean + i_p * B + o_b, b_mean, m_b)
        tl.store(p_m2 + i_p * B + o_b, tl.sum(b_dev * b_dev, 0), m_b)


def bn_relu_conv1x1(
    x: Tensor, norm: Normalization, weight: Tensor, out: Tensor, statistics: bool, launch: Launch
) -> tuple[Tensor, Tensor] | None:
    """Out = relu(norm(x)) @ weight^T; x (P, c), weight (B, c), out (P, B).

    Returns out's mean and biased variance, each (B,) float32, when ``statistics``.
    Reads P c elements of x once per ``block_b`` columns of the product, and weight once
    per ``block_p`` rows; writes P B. 2 P c B floating-point operations.
    """
    matrices(x, weight, out)
    P, C = x.shape
    B = weight.shape[0]
    if P == 0:
        nothing = empty(x, B).fill_(float("nan"))
        return (nothing, nothing.clone()) if statistics else None
    n_p, n_b = cdiv(P, launch.block_p), cdiv(B, launch.block_b)
    mean = m2 = norm.scale
    if statistics:
        mean, m2 = empty(x, n_p, B), empty(x, n_p, B)
    align = alignment(x.stride(0), weight.stride(0), C)
    align_b = alignment(out.stride(0), B)
    args = (x, x.stride(0) // align, norm.scale, norm.shift, weight, weight.stride(0) // align)
    args += (out, out.stride(0) // align_b, mean, m2, P, C // align, B // align_b, n_b)
    constants = product_constants(bn_relu_conv1x1_fwd_kernel, x)
    constants |= {"STATISTICS": statistics, "ALIGN": align, "ALIGN_B": align_b}
    tile = {"BP": launch.block_p, "BC": launch.block_c, "BB": launch.block_b}
    launch.start(bn_relu_conv1x1_fwd_kernel, (n_p * n_b,), *args, **constants, **tile)
    written(out)
    return combine_statistics(mean, m2, P, launch.block_p, launch) if statistics else None
