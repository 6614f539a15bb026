"""Backward of normalise, rectify, convolve 3 wide: two passes over Y and the layer's k columns.

The gradient dO of the k new channels is what lies in their columns of D, less the deferred
correction, times the dropout mask. It is made of D and X in registers wherever it is
used, and never stored. Both products take it shifted by each tap:

input: dH = sum over taps of dO[p - shift] W[tap], masked by the ReLU, with its sums S
and T; it goes to dZ, or times scale onto D where there is no bottleneck.
weight: dW[tap] = sum over rows of relu(norm(y))^T dO[p - shift], a program per range of rows
and per tap, or per line of three taps, which then share one tile of Y. In one launch with
the input's gradient it spilled registers at every tile size tried.

A third launch adds up the partial sums of both, in a fixed order.

Workspace: 8 B ceil(P / block_p) bytes of S and T; 4 taps k B bytes of dW for each range of
rows, ranges <= programs / (taps or lines * tiles of B and k).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdense.backends.base import Normalization, Unfinished
from effdense.kernels.bn_relu import bn_relu_reference
from effdense.kernels.bn_relu_conv3 import (
    CONVOLUTIONS,
    Weight,
    aligned_columns,
    columns_before,
    convolution,
    prepare_weight,
    tap_shift,
    tap_weight,
    taps_inside,
    weight_strides,
)
from effdense.kernels.launch import Launcher, jit
from effdense.kernels.launch_table import Launch
from effdense.kernels.layouts import cdiv, empty, layouts, matrices, written
from effdense.kernels.tiles import (
    backward_terms,
    normalization,
    normalized,
    rectified,
    store_sums,
)

SUMS = Launch(num_warps=4, num_stages=1)
# sums of one program: of dW there are many, of S and T many partial results
DW_COLUMNS, ST_COLUMNS = 256, 16


def bn_relu_conv3_backward_reference(
    y: Tensor, norm: Normalization, weight: Tensor, dout: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dz (P, B), dW (k, B, 3, ...), S (B,) and T (B,) for the finished gradient dout (P, k)."""
    z = bn_relu_reference(y, norm).detach().requires_grad_()
    weight = weight.detach().requires_grad_()
    image = z.view(*shape, -1).movedim(-1, 1)
    out = CONVOLUTIONS[len(shape) - 1](image, weight, padding=1).movedim(1, -1)
    dz, dw = torch.autograd.grad(out, (z, weight), dout.view_as(out))
    dz = dz * (z > 0)
    xhat = (y - norm.mean) * norm.rstd
    return dz, dw, dz.sum(0), (dz * xhat).sum(0)


@triton.jit
def correction(p_x_mean, p_s, p_t, per_count, o_k, m_k):
    """Mean and the two coefficients of the deferred correction, of some of the k channels."""
    b_mean = tl.load(p_x_mean + o_k, m_k, 0.0)
    b_s = tl.load(p_s + o_k, m_k, 0.0) * per_count
    b_t = tl.load(p_t + o_k, m_k, 0.0) * per_count
    return b_mean, b_s, b_t


@triton.jit
def finished_gradient(p_d, p_x, p_mask, m_g, b_x_mean, b_s, b_t, MASK: tl.constexpr):
    """DO where ``m_g``, else zero; [BP, BK]. Shifted rows lie in L1: most were read before."""
    b_d = tl.load(p_d, m_g, 0.0, cache_modifier=".ca").to(tl.float32)
    b_x = tl.load(p_x, m_g, 0.0, cache_modifier=".ca").to(tl.float32)
    b_g = b_d - (b_s[None, :] + b_t[None, :] * (b_x - b_x_mean[None, :]))
    if MASK:
        b_g *= tl.load(p_mask, m_g, 0.0).to(tl.float32)
    return tl.where(m_g, b_g, 0.0)


@jit(
    ALIGN_B=("s_y", "s_out", "B"),
    ALIGN_W=("s_wk", "s_w0", "s_w1", "s_w2"),
    ALIGN_K=("s_d", "first_d", "s_x", "first_x", "K"),
)
def bn_relu_conv3_bwd_input_kernel(
    p_d,
    p_x,
    p_x_mean,
    p_s,
    p_t,
    p_mask,
    p_y,
    p_mean,
    p_var,
    p_gamma,
    p_beta,
    p_w,
    p_out,
    p_part,
    per_count,
    eps,
    s_d,
    first_d,
    s_x,
    first_x,
    s_y,
    s_wk,
    s_wb,
    s_w0,
    s_w1,
    s_w2,
    s_out,
    P,
    B,
    K,
    S0,
    S1,
    S2,
    n_b,
    DIMS: tl.constexpr,
    UNIT: tl.constexpr,
    MASK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN_B: tl.constexpr,
    ALIGN_W: tl.constexpr,
    ALIGN_K: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    BB: tl.constexpr,
):
    TAPS: tl.constexpr = 3**DIMS
    s_y, s_out, B = s_y * ALIGN_B, s_out * ALIGN_B, B * ALIGN_B
    s_d, first_d, K = s_d * ALIGN_K, first_d * ALIGN_K, K * ALIGN_K
    s_x, first_x = s_x * ALIGN_K, first_x * ALIGN_K
    s_wk, s_w0, s_w1, s_w2 = s_wk * ALIGN_W, s_w0 * ALIGN_W, s_w1 * ALIGN_W, s_w2 * ALIGN_W
    if UNIT:
        s_wb = 1
    i_p = tl.program_id(0) // n_b
    i_b = tl.program_id(0) % n_b
    o_r = i_p * BP + tl.arange(0, BP)
    o_b = i_b * BB + tl.arange(0, BB)
    m_p = o_r < P
    m_b = o_b < B
    b_taps = taps_inside(o_r, m_p, S0, S1, S2, DIMS)
    o_p = o_r.to(tl.int64)
    b_dh = tl.full([BP, BB], 0.0, tl.float32)
    for start in range(0, K, BK):
        o_k = start + tl.arange(0, BK)
        m_k = o_k < K
        b_x_mean, b_s, b_t = correction(p_x_mean, p_s, p_t, per_count, o_k, m_k)
        p_dk = p_d + o_p[:, None] * s_d + (first_d + o_k)[None, :]
        p_xk = p_x + o_p[:, None] * s_x + (first_x + o_k)[None, :]
        p_keep = p_mask + o_p[:, None] * K + o_k[None, :]
        o_w = o_k[:, None] * s_wk + o_b[None, :] * s_wb
        for tap in range(TAPS):
            shift = tap_shift(tap, S1, S2, DIMS)
            m_in = ((b_taps >> tap) & 1) != 0
            m_g = m_in[:, None] & m_k[None, :]
            p_dtap, p_xtap, p_keeptap = p_dk + shift * s_d, p_xk + shift * s_x, p_keep + shift * K
            b_g = finished_gradient(p_dtap, p_xtap, p_keeptap, m_g, b_x_mean, b_s, b_t, MASK)
            # what reached row p from p + shift went through the opposite tap
            p_tap = p_w + (o_w + tap_weight(TAPS - 1 - tap, s_w0, s_w1, s_w2, DIMS))
            b_w = tl.load(p_tap, m_k[:, None] & m_b[None, :], 0.0)  # [BK, BB]
            if b_w.dtype != DOT:
                b_w = b_w.to(tl.float32).to(DOT)
            b_dh = tl.dot(b_g.to(DOT), b_w, b_dh, input_precision=PRECISION)
    m_y = m_p[:, None] & m_b[None, :]
    b_mean, b_rstd, b_scale, b_shift = normalization(p_mean, p_var, p_gamma, p_beta, eps, o_b, m_b)
    b_y = tl.load(p_y + o_p[:, None] * s_y + o_b[None, :], m_y, 0.0)  # [BP, BB]
    b_dz, b_dzx = backward_terms(b_y, b_dh, b_mean, b_scale, b_shift)
    p_rows = p_out + o_p[:, None] * s_out + o_b[None, :]
    b_out = b_dz
    if ACCUMULATE:
        b_out = tl.load(p_rows, m_y, 0.0).to(tl.float32) + b_scale[None, :] * b_dz
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), m_y)
    store_sums(p_part, i_p, B, o_b, m_b, tl.sum(b_dz, 0), tl.sum(b_dzx, 0), b_rstd)


@jit(
    ALIGN_B=("s_y", "B"),
    ALIGN_K=("s_d", "first_d", "s_x", "first_x", "K"),
)
def bn_relu_conv3_bwd_weight_kernel(
    p_d,
    p_x,
    p_x_mean,
    p_s,
    p_t,
    p_mask,
    p_y,
    p_mean,
    p_var,
    p_gamma,
    p_beta,
    p_part,
    per_count,
    eps,
    s_d,
    first_d,
    s_x,
    first_x,
    s_y,
    P,
    B,
    K,
    S0,
    S1,
    S2,
    rows,
    n_b,
    n_k,
    DIMS: tl.constexpr,
    LINE: tl.constexpr,
    MASK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN_B: tl.constexpr,
    ALIGN_K: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    BB: tl.constexpr,
):
    TAPS: tl.constexpr = 3**DIMS
    s_y, B = s_y * ALIGN_B, B * ALIGN_B
    s_d, first_d, K = s_d * ALIGN_K, first_d * ALIGN_K, K * ALIGN_K
    s_x, first_x = s_x * ALIGN_K, first_x * ALIGN_K
    i_b = tl.program_id(0) % n_b
    i_k = (tl.program_id(0) // n_b) % n_k
    i_s = tl.program_id(1)
    # this program's tap, or the first of its three
    tap = tl.program_id(0) // (n_b * n_k)
    if LINE:
        tap = 3 * tap
    o_b = i_b * BB + tl.arange(0, BB)
    o_k = i_k * BK + tl.arange(0, BK)
    m_b = o_b < B
    m_k = o_k < K
    _, _, b_scale, b_shift = normalization(p_mean, p_var, p_gamma, p_beta, eps, o_b, m_b)
    b_x_mean, b_s, b_t = correction(p_x_mean, p_s, p_t, per_count, o_k, m_k)
    shift = tap_shift(tap, S1, S2, DIMS)
    b_dw0 = tl.full([BB, BK], 0.0, tl.float32)
    if LINE:
        b_dw1 = tl.full([BB, BK], 0.0, tl.float32)
        b_dw2 = tl.full([BB, BK], 0.0, tl.float32)
    first = i_s * rows
    last = tl.minimum(first + rows, P)
    for start in range(first, last, BP):
        o_r = start + tl.arange(0, BP)
        m_p = o_r < last
        b_taps = taps_inside(o_r, m_p, S0, S1, S2, DIMS) >> tap
        o_p = o_r.to(tl.int64)
        m_y = m_p[:, None] & m_b[None, :]
        b_y = tl.load(p_y + o_p[:, None] * s_y + o_b[None, :], m_y, 0.0)  # [BP, BB]
        # a row past the end has no gradient, so that its shift adds nothing
        b_h = tl.trans(rectified(normalized(b_y, b_scale, b_shift)).to(DOT))  # [BB, BP]
        p_dk = p_d + (o_p + shift)[:, None] * s_d + (first_d + o_k)[None, :]
        p_xk = p_x + (o_p + shift)[:, None] * s_x + (first_x + o_k)[None, :]
        p_keep = p_mask + (o_p + shift)[:, None] * K + o_k[None, :]
        m_g = ((b_taps & 1) != 0)[:, None] & m_k[None, :]
        b_g = finished_gradient(p_dk, p_xk, p_keep, m_g, b_x_mean, b_s, b_t, MASK)
        b_dw0 = tl.dot(b_h, b_g.to(DOT), b_dw0, input_precision=PRECISION)
        if LINE:
            m_g = ((b_taps & 2) != 0)[:, None] & m_k[None, :]
            p_dk, p_xk, p_keep = p_dk + s_d, p_xk + s_x, p_keep + K
            b_g = finished_gradient(p_dk, p_xk, p_keep, m_g, b_x_mean, b_s, b_t, MASK)
            b_dw1 = tl.dot(b_h, b_g.to(DOT), b_dw1, input_precision=PRECISION)
            m_g = ((b_taps & 4) != 0)[:, None] & m_k[None, :]
            p_dk, p_xk, p_keep = p_dk + s_d, p_xk + s_x, p_keep + K
            b_g = finished_gradient(p_dk, p_xk, p_keep, m_g, b_x_mean, b_s, b_t, MASK)
            b_dw2 = tl.dot(b_h, b_g.to(DOT), b_dw2, input_precision=PRECISION)
    # what lies at p + shift met this row's features through the opposite tap
    m_dw = m_b[:, None] & m_k[None, :]
    p_dw = p_part + (i_s.to(tl.int64) * TAPS + TAPS - 1 - tap) * (B * K)
    p_dw += o_b[:, None] * K + o_k[None, :]
    tl.store(p_dw, b_dw0, m_dw)
    if LINE:
        tl.store(p_dw - B * K, b_dw1, m_dw)
        tl.store(p_dw - 2 * (B * K), b_dw2, m_dw)


@jit(ALIGN_B=("B",), ALIGN_K=("K",))
def bn_relu_conv3_bwd_sums_kernel(
    p_part,
    p_sums,
    p_part_dw,
    p_dw,
    s_wk,
    s_wb,
    s_w0,
    s_w1,
    s_w2,
    B,
    K,
    n_parts,
    n_ranges,
    n_w,
    DIMS: tl.constexpr,
    ALIGN_B: tl.constexpr,
    ALIGN_K: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
):
    B, K = B * ALIGN_B, K * ALIGN_K
    i_m = tl.program_id(0)
    o_t = tl.arange(0, BT)
    o_r = tl.arange(0, BR)
    if i_m < n_w:
        M = 3**DIMS * B * K
        o_m = i_m * BM + tl.arange(0, BM)
        m_m = o_m < M
        b_dw = tl.full([BR, BM], 0.0, tl.float32)
        for start in range(0, n_ranges, BR):
            m_r = (start + o_r < n_ranges)[:, None] & m_m[None, :]
            p_rows = p_part_dw + (start + o_r).to(tl.int64)[:, None] * M + o_m[None, :]
            b_dw += tl.load(p_rows, m_r, 0.0)
        # from (taps, B, k) to where the weight has them
        o_dw = tap_weight(o_m // (B * K), s_w0, s_w1, s_w2, DIMS)
        o_dw += (o_m % K) * s_wk + ((o_m // K) % B) * s_wb
        tl.store(p_dw + o_dw, tl.sum(b_dw, 0), m_m)
    else:
        o_s = (i_m - n_w) * BS + tl.arange(0, BS)
        m_s = o_s < 2 * B
        b_sums = tl.full([BT, BS], 0.0, tl.float32)
        for start in range(0, n_parts, BT):
            m_t = (start + o_t < n_parts)[:, None] & m_s[None, :]
            p_rows = p_part + (start + o_t).to(tl.int64)[:, None] * (2 * B) + o_s[None, :]
            b_sums += tl.load(p_rows, m_t, 0.0)
        tl.store(p_sums + o_s, tl.sum(b_sums, 0), m_s)


def bn_relu_conv3_backward(
    source: Tensor,
    norm: Normalization,
    weight: Tensor,
    gradient: Unfinished,
    shape: tuple[int, ...],
    need_weight: bool,
    dz: Tensor | None,
    d: Tensor | None,
    launcher: Launcher,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Back through bn_relu_conv3 from its output's ``gradient``; returns dW, S, T.

    source (P, B); weight (k, B, 3, ...) of any float type and strides. The gradient after the
    ReLU goes to ``dz`` (P, B), masked, or, where that is None, times scale onto ``d`` (P, B).
    dW (k, B, 3, ...) float32, in the weight's order in memory, None unless ``need_weight``;
    S, T (B,) float32.

    For the input's gradient, reads 2 P k elements (the layer's columns of D and X) and P B and
    writes P B; for the weight's, reads 2 P k and P B: from memory, and again per tap from the
    caches. 4 * taps P B k floating-point operations.
    """
    out = d if dz is None else dz
    assert out is not None
    mask, gamma, beta = gradient.mask, norm.gamma, norm.beta
    key = (
        bn_relu_conv3_backward,
        *layouts(source, weight, gradient.d, gradient.x, out),
        *(shape, gamma.dtype, beta.dtype),
        *(mask is None, need_weight, dz is None),
    )
    found = launcher.prepared.get(key)
    if found is None:
        arguments = source, weight, gradient, shape, need_weight, out, dz is None
        found = launcher.keep(key, _prepare(*arguments, launcher))
    base_d = aligned_columns(gradient.d, found.first_d)
    base_x = aligned_columns(gradient.x, found.first_x)
    tensors: tuple[Tensor, ...] = base_d, base_x, gradient.mean, gradient.s, gradient.t
    tensors += (source if mask is None else mask, source, norm.mean, norm.var, gamma, beta)
    floats = 1.0 / gradient.count, norm.eps
    part = empty(norm.mean, *found.part)
    found.input((*tensors, found.read.packed(weight), out, part), floats)
    written(out)
    sums = empty(norm.mean, 2, source.shape[1])
    dw, part_dw, dw_out = None, part, sums
    if need_weight:
        part_dw = empty(norm.mean, *found.part_dw)
        found.weight((*tensors, part_dw), floats)
        dw = dw_out = gradient_like(weight)
    found.sums((part, sums, part_dw, dw_out))
    s, t = sums.unbind()
    return dw, s, t


class _Prepared(NamedTuple):
    """The three launches, the sizes of their partial results, and the columns before d and x."""

    input: Callable[..., None]
    weight: Callable[..., None]
    sums: Callable[..., None]
    read: Weight
    part: tuple[int, ...]
    part_dw: tuple[int, ...]
    first_d: int
    first_x: int


def _prepare(
    source: Tensor,
    weight: Tensor,
    gradient: Unfinished,
    shape: tuple[int, ...],
    need_weight: bool,
    out: Tensor,
    accumulate: bool,
    launcher: Launcher,
) -> _Prepared:
    matrices(source, gradient.d, gradient.x, out)
    kernel, masked = bn_relu_conv3_bwd_input_kernel, gradient.mask is not None
    sizes, constants = convolution(kernel, source, weight, shape, masked)
    P, B, k, dims = sizes["P"], sizes["B"], sizes["K"], constants["DIMS"]
    taps = 3**dims
    first_d, first_x = columns_before(gradient.d), columns_before(gradient.x)
    sizes |= {"s_d": gradient.d.stride(0), "first_d": first_d}
    sizes |= {"s_x": gradient.x.stride(0), "first_x": first_x}

    launch = launcher.launch("conv3_backward", source, B, k)
    n_p, n_b = cdiv(P, launch.block_p), cdiv(B, launch.block_b)
    read = prepare_weight(weight, source, launcher)
    into = read.strides | {"s_out": out.stride(0), "n_b": n_b}
    start_input = launcher.prepare(
        *(kernel, launch, (n_p * n_b,), sizes | into),
        **(constants | {"UNIT": read.strides["s_wb"] == 1, "ACCUMULATE": accumulate}),
        BK=launch.block_c,
    )

    start_weight, ranges, n_w = start_input, 0, 0
    if need_weight:
        launch = launcher.launch("conv3_weight", source, B, k)
        n_b, n_k = cdiv(B, launch.block_b), cdiv(k, launch.block_c)
        pays = shares_lines(launch, P, taps, n_b * n_k, k, source.element_size())
        line = launcher.choose("line", pays)
        programs = (taps // 3 if line else taps) * n_b * n_k
        rows, ranges = launch.split_rows(P, programs)
        ranged = sizes | {"rows": rows, "n_b": n_b, "n_k": n_k}
        start_weight = launcher.prepare(
            *(bn_relu_conv3_bwd_weight_kernel, launch, (programs, ranges), ranged),
            **constants,
            LINE=line,
            BK=launch.block_c,
        )
        n_w = cdiv(taps * B * k, DW_COLUMNS)
    adding = weight_strides(gradient_like(weight)) if need_weight else read.strides
    adding |= {"B": B, "K": k, "n_parts": n_p, "n_ranges": ranges, "n_w": n_w}
    grid = (n_w + cdiv(2 * B, ST_COLUMNS),)
    tile = {"BT": 128, "BS": ST_COLUMNS, "BR": 8, "BM": DW_COLUMNS}
    kernel = bn_relu_conv3_bwd_sums_kernel
    start_sums = launcher.prepare(kernel, SUMS, grid, adding, DIMS=dims, **tile)
    parts = (n_p, 2, B), (ranges, taps, B, k)
    return _Prepared(start_input, start_weight, start_sums, read, *parts, first_d, first_x)


def gradient_like(weight: Tensor) -> Tensor:
    """An empty float32 tensor with the weight's own order of dimensions in memory."""
    if weight.is_contiguous():
        return empty(weight, *weight.shape)
    return torch.empty_like(weight, dtype=torch.float32)


def shares_lines(launch: Launch, P: int, taps: int, tiles: int, k: int, size: int) -> bool:
    """Whether three taps a program move fewer bytes than one.

    Y is then read a third as often, ``size`` bytes an element; but as many programs make three
    times the ranges of rows, and each range stores all of dW in float32, to be read again.
    """

    def bytes_per_channel(programs: int) -> int:
        _, ranges = launch.split_rows(P, programs * tiles)
        return programs * P * size + 2 * 4 * ranges * taps * k

    return bytes_per_channel(taps // 3) <= bytes_per_channel(taps)
