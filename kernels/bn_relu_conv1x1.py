"""Normalise, rectify and multiply: the dense layer's first convolution, forward.

The normalised features Z never exist in memory: each tile of X becomes its tile of Z in
registers, on its way into the product. One program owns a tile of rows and, where there are
rows enough for every multiprocessor, the whole width of the bottleneck, so the prefix of X is
read once. The statistics of the product (the next norm's) are taken from the accumulator
before it leaves, on values rounded as they are stored. The weight is the parameter itself, of
any float type: the kernel casts it.

Workspace with statistics: 8 * ceil(P / block_p) * B bytes, 1/32 of a 16-bit output at
block_p = 128.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from effdense.backends.base import Normalization, Statistics
from effdense.kernels.bn_relu import bn_relu_reference
from effdense.kernels.launch import Launcher, interpreted, jit
from effdense.kernels.layouts import cdiv, empty, layouts, matrices, pad, written
from effdense.kernels.statistics import prepare_combination
from effdense.kernels.tiles import (
    column_statistics,
    columns_loaded,
    normalization,
    normalized,
    rectified,
)


def bn_relu_conv1x1_reference(x: Tensor, norm: Normalization, weight: Tensor) -> Tensor:
    """relu(norm(x)) @ weight^T; x (P, c), weight (B, c)."""
    return bn_relu_reference(x, norm) @ weight.to(x.dtype).t()


def operand_type(kernel: Any, x: Tensor) -> Any:
    """The type of a product's operands.

    They are rounded to the storage type, which is what tensor cores take; the sum is float32
    always. The interpreter multiplies bfloat16 as if it were an integer, so it gets float32.
    """
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    dot = types[x.dtype]
    return tl.float32 if interpreted(kernel) and dot == tl.bfloat16 else dot


@jit(ALIGN=("s_x",), ALIGN_W=("s_w", "C"), ALIGN_B=("s_out", "B"))
def bn_relu_conv1x1_fwd_kernel(
    p_x,
    p_mean,
    p_var,
    p_gamma,
    p_beta,
    p_w,
    p_out,
    p_part,
    eps,
    s_x,
    s_w,
    s_out,
    P,
    C,
    B,
    n_b,
    STATISTICS: tl.constexpr,
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
    s_x, s_w, C = s_x * ALIGN, s_w * ALIGN_W, C * ALIGN_W
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
        m_x = m_p[:, None] & columns_loaded(o_c, C, PAD)[None, :]
        b_x = tl.load(p_x + o_p[:, None] * s_x + o_c[None, :], m_x, 0.0)  # [BP, BC]
        _, _, b_scale, b_shift = normalization(p_mean, p_var, p_gamma, p_beta, eps, o_c, m_c)
        b_z = rectified(normalized(b_x, b_scale, b_shift))
        if PAD > 1:
            # of columns that are not this layer's even a NaN must not survive
            b_z = tl.where(m_c[None, :], b_z, 0.0)
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
        b_mean, b_m2 = column_statistics(b_out, m_out, n_rows)
        n_p = (P + (BP - 1)) // BP
        tl.store(p_part + i_p * B + o_b, b_mean, m_b)
        tl.store(p_part + (n_p + i_p) * B + o_b, b_m2, m_b)


def bn_relu_conv1x1(
    x: Tensor,
    norm: Normalization,
    weight: Tensor,
    out: Tensor,
    statistics: Statistics | None,
    launcher: Launcher,
) -> None:
    """out = relu(norm(x)) @ weight^T, its mean and biased variance into ``statistics``.

    x (P, c), weight (B, c) of any float type, out (P, B); statistics (B,) float32 each.
    Reads P c elements of x once per ``block_b`` columns of the product, and weight once
    per ``block_p`` rows; writes P B. 2 P c B floating-point operations.
    """
    mean, var, gamma, beta, eps = norm.mean, norm.var, norm.gamma, norm.beta, norm.eps
    take = statistics is not None
    key = bn_relu_conv1x1, *layouts(x, weight, out), gamma.dtype, beta.dtype, take
    found = launcher.prepared.get(key)
    if found is None:
        found = launcher.keep(key, _prepare(x, weight, out, take, launcher))
    start, shape, combine = found
    part = empty(mean, *shape) if take else mean
    start((x, mean, var, gamma, beta, weight, out, part), (eps,))
    written(out)
    if statistics is not None:
        combine((part, *statistics))


def _prepare(x: Tensor, weight: Tensor, out: Tensor, take: bool, launcher: Launcher) -> Any:
    matrices(x, weight, out)
    (P, C), B = x.shape, weight.shape[0]
    launch = launcher.launch("product", x, C, B)
    n_p, n_b = cdiv(P, launch.block_p), cdiv(B, launch.block_b)
    sizes = {"P": P, "C": C, "B": B, "n_b": n_b}
    sizes |= {"s_x": x.stride(0), "s_w": weight.stride(0), "s_out": out.stride(0)}
    kernel = bn_relu_conv1x1_fwd_kernel
    constants = {"STATISTICS": take, "DOT": operand_type(kernel, x), "PAD": pad(x)}
    start = launcher.prepare(kernel, launch, (n_p * n_b,), sizes, **constants)
    combine = prepare_combination(launcher, n_p, B, P, launch.block_p) if take else None
    return start, (2, n_p, B), combine
