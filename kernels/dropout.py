"""Dropout's mask by a counter-based generator; see effdense/backends/dropout.py."""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from effdense.backends import dropout
from effdense.kernels.launch import Launcher, jit
from effdense.kernels.layouts import cdiv, layouts, matrices, written
from effdense.kernels.tiles import store_columns

_GAMMA = tl.constexpr(dropout.GAMMA)
_FACTOR_1, _FACTOR_2 = tl.constexpr(dropout.FACTOR_1), tl.constexpr(dropout.FACTOR_2)


def dropout_mask_reference(key: Tensor, p: float, rows: int, columns: int) -> Tensor:
    """(rows, columns) of 1/(1-p) with probability 1-p, else 0."""
    out = torch.empty(rows, columns, dtype=torch.float64, device=key.device)
    dropout.dropout_mask(key, p, out)
    return out


@jit(ALIGN=("s_out",))
def dropout_mask_fwd_kernel(
    p_key,
    p_out,
    value,
    s_out,
    P,
    C,
    n_c,
    THRESHOLD: tl.constexpr,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    s_out = s_out * ALIGN
    i_p, i_c = tl.program_id(0) // n_c, tl.program_id(0) % n_c
    o_p = i_p.to(tl.int64) * BP + tl.arange(0, BP)
    o_c = i_c * BC + tl.arange(0, BC)
    place = (o_p[:, None] * C + o_c[None, :] + 1).to(tl.uint64)
    b_z = tl.load(p_key).to(tl.uint64) + place * _GAMMA  # [BP, BC]
    b_z = (b_z ^ (b_z >> 30)) * _FACTOR_1
    b_z = (b_z ^ (b_z >> 27)) * _FACTOR_2
    b_out = tl.where(b_z.to(tl.int64) < THRESHOLD, value, 0.0)
    store_columns(p_out + o_p[:, None] * s_out + o_c[None, :], b_out, o_p < P, o_c, C)


def wide(out: Tensor) -> Tensor:
    """A dense matrix as one of more columns, where there is one: its stores are wider.

    An element's place is counted along the rows, so it has the same one in either.
    """
    columns = math.gcd(out.numel(), 128)
    return out.view(-1, columns) if columns > out.shape[1] else out


def dropout_mask(out: Tensor, key: Tensor, p: float, launcher: Launcher) -> None:
    """The mask of ``key`` (1,) into ``out`` (P, k), dense. Writes P k elements."""
    prepared = dropout_mask, p, *layouts(out)
    start = launcher.prepared.get(prepared)
    if start is None:
        matrices(out)
        P, C = out.shape
        launch = launcher.launch("map", out, C)
        n_c = cdiv(C, launch.block_c)
        sizes = {"P": P, "C": C, "n_c": n_c, "s_out": out.stride(0)}
        grid = (cdiv(P, launch.block_p) * n_c,)
        limit = dropout.threshold(p)
        start = launcher.prepare(dropout_mask_fwd_kernel, launch, grid, sizes, THRESHOLD=limit)
        launcher.keep(prepared, start)
    start((key, out), (dropout.kept_value(p),))
    written(out)
