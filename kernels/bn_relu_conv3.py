"""Normalise, rectify and convolve 3 wide: the dense layer's second convolution, forward.

Rows are positions p = (image, ..., line, column) of a contiguous image, so a tap of the
convolution is a shift of rows: row p + shift, or nothing where that would leave the
image. A shifted tile of Y is as contiguous as the tile itself, and the convolution is
a product over (tap, channel) whose left operand is read in place, once per tap: the
first time from memory, then from the caches, which is why its loads ask for L1. Each
tile becomes relu(norm(y)) in registers on its way into the product; the padding is zero
after the ReLU, not before.

The k new channels go straight to their columns of X, times the dropout mask where there
is one, and their statistics are taken on what is stored, after it.

Programs read the whole weight each, tap by tap. torch lays it out with the taps of a channel
side by side, where a warp's load of 32 channels touches nine lines of the cache for one.
From PACKED_ROWS on, a launch before puts channels side by side, in the storage type; a weight
that has them so already (``model.to(memory_format=torch.channels_last)``) is read in place.

Workspace with statistics: 8 * ceil(P / block_p) * k bytes; 2 or 4 * taps * k * B where packed.

NOTE [ Columns at any offset ]
A layer's k columns of X and D begin wherever the layers before it end, at a multiple of
2, 4 or 8 elements, and Triton knows of a pointer that it is divisible by 16 bytes or
nothing. Launchers pass a pointer rounded down to such an address and the columns between
as an integer of the group that ALIGN_K divides (see layouts.py, NOTE [ Aligned
integers ]): accesses are then as wide as the offset allows, never the 128 bits that it
forbids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from effdense.backends.base import Normalization, Statistics
from effdense.kernels.bn_relu import bn_relu_reference
from effdense.kernels.bn_relu_conv1x1 import operand_type
from effdense.kernels.launch import Launcher, jit
from effdense.kernels.launch_table import Launch
from effdense.kernels.layouts import cdiv, empty, layouts, matrices, written
from effdense.kernels.statistics import prepare_combination
from effdense.kernels.tiles import column_statistics, normalization, normalized

PACKED_ROWS = 1 << 14
"""Rows from which packing a weight, some 2 us of a device's time, costs less than it saves.

By count of cache lines at k = 24, B = 96: unpacked, an H100 would spend 0.3 us per 1,024 rows on
the weight forward and 0.8 backward. Not measured.
"""
PACK = Launch(num_warps=4, num_stages=1)
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def bn_relu_conv3_reference(
    y: Tensor, norm: Normalization, weight: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """conv(relu(norm(y))); y (P, B), weight (k, B, 3, ...), shape (n, *spatial); (P, k)."""
    z = bn_relu_reference(y, norm).view(*shape, -1).movedim(-1, 1)
    out = CONVOLUTIONS[len(shape) - 1](z, weight, padding=1)
    return out.movedim(1, -1).reshape(y.shape[0], -1)


@triton.jit
def taps_inside(o_p, m_p, S0, S1, S2, DIMS: tl.constexpr):
    """Bit t of a row says whether its tap t lies inside the image; [BP] int32."""
    i_2 = o_p % S2
    b_taps = 2 + tl.where(i_2 > 0, 1, 0) + tl.where(i_2 < S2 - 1, 4, 0)
    if DIMS > 1:
        i_1 = (o_p // S2) % S1
        b_low = tl.where(i_1 > 0, b_taps, 0)
        b_taps = b_low + (b_taps << 3) + tl.where(i_1 < S1 - 1, b_taps << 6, 0)
    if DIMS > 2:
        i_0 = (o_p // (S1 * S2)) % S0
        b_low = tl.where(i_0 > 0, b_taps, 0)
        b_taps = b_low + (b_taps << 9) + tl.where(i_0 < S0 - 1, b_taps << 18, 0)
    return tl.where(m_p, b_taps, 0)


@triton.jit
def tap_shift(tap, S1, S2, DIMS: tl.constexpr):
    """By how many rows a tap lies behind its centre."""
    shift = tap % 3 - 1
    if DIMS > 1:
        shift += ((tap // 3) % 3 - 1) * S2
    if DIMS > 2:
        shift += (tap // 9 - 1) * (S1 * S2)
    return shift.to(tl.int64)


@triton.jit
def tap_weight(tap, s_w0, s_w1, s_w2, DIMS: tl.constexpr):
    """Where a tap begins in the weight, in elements: 32 bits hold any weight."""
    offset = (tap % 3) * s_w2
    if DIMS > 1:
        offset += ((tap // 3) % 3) * s_w1
    if DIMS > 2:
        offset += (tap // 9) * s_w0
    return offset


@jit
def bn_relu_conv3_pack_kernel(
    p_w,
    p_packed,
    s_wk,
    s_wb,
    s_w0,
    s_w1,
    s_w2,
    B,
    K,
    DIMS: tl.constexpr,
    BM: tl.constexpr,
):
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < 3**DIMS * K * B
    o_w = tap_weight(o_m // (B * K), s_w0, s_w1, s_w2, DIMS)
    o_w += ((o_m // B) % K) * s_wk + (o_m % B) * s_wb
    b_w = tl.load(p_w + o_w, m_m, 0.0)
    tl.store(p_packed + o_m, b_w.to(tl.float32).to(p_packed.dtype.element_ty), m_m)


@jit(
    ALIGN_B=("s_y", "B"),
    ALIGN_W=("s_wk", "s_w0", "s_w1", "s_w2"),
    ALIGN_K=("s_out", "first", "K"),
)
def bn_relu_conv3_fwd_kernel(
    p_y,
    p_mean,
    p_var,
    p_gamma,
    p_beta,
    p_w,
    p_mask,
    p_out,
    p_part,
    eps,
    s_y,
    s_wk,
    s_wb,
    s_w0,
    s_w1,
    s_w2,
    s_out,
    first,
    P,
    B,
    K,
    S0,
    S1,
    S2,
    n_k,
    DIMS: tl.constexpr,
    UNIT: tl.constexpr,
    MASK: tl.constexpr,
    STATISTICS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN_B: tl.constexpr,
    ALIGN_W: tl.constexpr,
    ALIGN_K: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    TAPS: tl.constexpr = 3**DIMS
    s_y, B = s_y * ALIGN_B, B * ALIGN_B
    s_out, first, K = s_out * ALIGN_K, first * ALIGN_K, K * ALIGN_K
    s_wk, s_w0, s_w1, s_w2 = s_wk * ALIGN_W, s_w0 * ALIGN_W, s_w1 * ALIGN_W, s_w2 * ALIGN_W
    if UNIT:
        s_wb = 1
    i_p = tl.program_id(0) // n_k
    i_k = tl.program_id(0) % n_k
    o_r = i_p * BP + tl.arange(0, BP)
    o_k = i_k * BK + tl.arange(0, BK)
    m_p = o_r < P
    m_k = o_k < K
    b_taps = taps_inside(o_r, m_p, S0, S1, S2, DIMS)
    o_p = o_r.to(tl.int64)
    b_acc = tl.full([BP, BK], 0.0, tl.float32)
    for start in range(0, B, BC):
        o_c = start + tl.arange(0, BC)
        m_c = o_c < B
        _, _, b_scale, b_shift = normalization(p_mean, p_var, p_gamma, p_beta, eps, o_c, m_c)
        p_tile = p_y + o_p[:, None] * s_y + o_c[None, :]
        o_w = o_k[:, None] * s_wk + o_c[None, :] * s_wb
        for tap in range(TAPS):
            b_in = (b_taps >> tap) & 1
            m_in = b_in != 0
            p_tap = p_tile + tap_shift(tap, S1, S2, DIMS) * s_y
            b_y = tl.load(p_tap, m_in[:, None] & m_c[None, :], 0.0, cache_modifier=".ca")
            b_y = normalized(b_y, b_scale, b_shift)  # [BP, BC]
            b_z = tl.where((b_y <= 0) | (b_in == 0)[:, None], 0.0, b_y)
            p_tap = p_w + (o_w + tap_weight(tap, s_w0, s_w1, s_w2, DIMS))
            b_w = tl.load(p_tap, m_k[:, None] & m_c[None, :], 0.0)  # [BK, BC]
            if b_w.dtype != DOT:
                b_w = b_w.to(tl.float32).to(DOT)
            b_acc = tl.dot(b_z.to(DOT), tl.trans(b_w), b_acc, input_precision=PRECISION)
    m_out = m_p[:, None] & m_k[None, :]
    if MASK:
        p_keep = p_mask + o_p[:, None] * K + o_k[None, :]
        b_acc *= tl.load(p_keep, m_out, 0.0).to(tl.float32)
    b_out = b_acc.to(p_out.dtype.element_ty)  # [BP, BK]
    tl.store(p_out + o_p[:, None] * s_out + (first + o_k)[None, :], b_out, m_out)
    if STATISTICS:
        n_rows = tl.minimum(P - i_p * BP, BP).to(tl.float32)
        b_mean, b_m2 = column_statistics(b_out, m_out, n_rows)
        n_p = (P + (BP - 1)) // BP
        tl.store(p_part + i_p * K + o_k, b_mean, m_k)
        tl.store(p_part + (n_p + i_p) * K + o_k, b_m2, m_k)


def bn_relu_conv3(
    source: Tensor,
    norm: Normalization,
    weight: Tensor,
    shape: tuple[int, ...],
    out: Tensor,
    mask: Tensor | None,
    statistics: Statistics | None,
    launcher: Launcher,
) -> None:
    """out = conv(relu(norm(source))) * mask, the statistics of what was stored into theirs.

    source (P, B); weight (k, B, 3, ...) of any float type and strides, best with channels side
    by side; out (P, k), a column range of a wider matrix or not; ``shape`` = (n, *spatial),
    n * prod(spatial) = P; mask (P, k) dense or None; statistics (k,) float32 each.
    Reads P B elements of source from memory, once per ``block_b`` channels of the growth, and
    again per tap from the caches; writes P k. 2 * taps P B k floating-point operations.
    """
    mean, var, gamma, beta, eps = norm.mean, norm.var, norm.gamma, norm.beta, norm.eps
    take, drop = statistics is not None, mask is not None
    key = (
        *(bn_relu_conv3, *layouts(source, weight, out), shape),
        *(gamma.dtype, beta.dtype, drop, take),
    )
    found = launcher.prepared.get(key)
    if found is None:
        found = _prepare(source, weight, shape, out, drop, take, launcher)
        launcher.keep(key, found)
    start, read, first, size, combine = found
    part = empty(mean, *size) if take else mean
    base, weight = aligned_columns(out, first), read.packed(weight)
    start((source, mean, var, gamma, beta, weight, mask if drop else out, base, part), (eps,))
    written(out)
    if statistics is not None:
        combine((part, *statistics))


def _prepare(
    source: Tensor,
    weight: Tensor,
    shape: tuple[int, ...],
    out: Tensor,
    drop: bool,
    take: bool,
    launcher: Launcher,
) -> Any:
    matrices(source, out)
    kernel = bn_relu_conv3_fwd_kernel
    sizes, constants = convolution(kernel, source, weight, shape, drop)
    P, B, k = sizes["P"], sizes["B"], sizes["K"]
    launch = launcher.launch("conv3", source, B, k)
    n_p, n_k = cdiv(P, launch.block_p), cdiv(k, launch.block_b)
    first = columns_before(out)
    read = prepare_weight(weight, source, launcher)
    sizes |= read.strides | {"n_k": n_k, "s_out": out.stride(0), "first": first}
    constants |= {"STATISTICS": take, "UNIT": read.strides["s_wb"] == 1, "BK": launch.block_b}
    start = launcher.prepare(kernel, launch, (n_p * n_k,), sizes, **constants)
    combine = prepare_combination(launcher, n_p, k, P, launch.block_p) if take else None
    return start, read, first, (2, n_p, k), combine


def convolution(
    kernel: Any, source: Tensor, weight: Tensor, shape: tuple[int, ...], masked: bool
) -> tuple[dict[str, int], dict[str, Any]]:
    """Sizes and constants that each of its kernels takes, forward and back."""
    (P, B), k = source.shape, weight.shape[0]
    sizes = {"P": P, "B": B, "K": k, "s_y": source.stride(0)} | _positions(shape)
    return sizes, {
        "DIMS": len(shape) - 1,
        "MASK": masked,
        "DOT": operand_type(kernel, source),
    }


def _positions(shape: tuple[int, ...]) -> dict[str, int]:
    """The last three spatial sizes, 1 where there are fewer."""
    assert 2 <= len(shape) <= 4, shape
    if math.prod(shape) >= 2**31 - 2**10:
        raise ValueError(
            f"{math.prod(shape)} positions of {shape} are more than the kernels' 32-bit row "
            'numbers hold; use a smaller batch, or backend="torch"'
        )
    return dict(zip(("S0", "S1", "S2"), (1, 1, *shape[1:])[-3:], strict=True))


class Weight(NamedTuple):
    """How a kernel reads the weight: the strides, and how it is packed before, if it is."""

    strides: dict[str, int]
    pack: Callable[..., None] | None
    size: tuple[int, ...]
    dtype: torch.dtype

    def packed(self, weight: Tensor) -> Tensor:
        if self.pack is None:
            return weight
        found = torch.empty(self.size, dtype=self.dtype, device=weight.device)
        self.pack((weight, found))
        return found


def prepare_weight(weight: Tensor, source: Tensor, launcher: Launcher) -> Weight:
    """Packs a weight whose channels are apart, where there are rows enough to gain by it."""
    strides, (k, B), dims = weight_strides(weight), weight.shape[:2], weight.dim() - 2
    pays = strides["s_wb"] != 1 and source.shape[0] >= PACKED_ROWS
    if not launcher.choose("pack", pays):
        return Weight(strides, None, (), weight.dtype)
    size = 3**dims, k, B
    kernel, block = bn_relu_conv3_pack_kernel, 256
    grid = (cdiv(math.prod(size), block),)
    pack = launcher.prepare(kernel, PACK, grid, strides | {"B": B, "K": k}, DIMS=dims, BM=block)
    # products round to what is stored here, but in the interpreter
    exact = operand_type(kernel, source) == tl.float32
    dtype = torch.float32 if exact else source.dtype
    strides = {f"s_w{i}": 3 ** (2 - i) * k * B for i in range(3)}
    return Weight(strides | {"s_wk": B, "s_wb": 1}, pack, size, dtype)


def weight_strides(weight: Tensor) -> dict[str, int]:
    """Of output channels, input channels and up to three dimensions of taps."""
    s_k, s_b, *taps = weight.stride()
    assert tuple(weight.shape[2:]) == (3,) * len(taps), weight.shape
    padded = (*[0] * (3 - len(taps)), *taps)
    return {"s_wk": s_k, "s_wb": s_b} | {f"s_w{i}": s for i, s in enumerate(padded)}


def columns_before(x: Tensor) -> int:
    """How many columns x (P, k) begins behind a 16-byte address of its storage."""
    return int(x.storage_offset() % (16 // x.element_size()))


def aligned_columns(x: Tensor, first: int) -> Tensor:
    """A view of x (P, k) and the ``first`` columns before it."""
    if first == 0:
        return x
    P, k = x.shape
    return x.as_strided((P, first + k), x.stride(), x.storage_offset() - first)
