"""Memory in which a kernel's mistakes show: poison wherever nothing was written, guards around."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effdense.backends.base import Deferred, Normalization, PendingNorm, Statistics

GUARD = 64
# Around inputs NaN, so that what is read shows; around outputs a number, because a NaN
# written over a NaN would not. A value that every type holds exactly.
CANARY = -1536.0
EPS32 = 2.0**-23
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Region(NamedTuple):
    flat: Tensor
    view: Tensor
    before: Tensor
    output: bool


class Arena:
    """Buffers that hold nothing of use outside the given values, and change but where declared."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.regions: list[_Region] = []

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def put(
        self,
        values: Tensor,
        dtype: torch.dtype,
        *,
        width: int | None = None,
        column: int = 0,
        output: bool = False,
    ) -> Tensor:
        """``values`` (P, c) as columns of a (P, width) matrix between two guards."""
        rows, columns = values.shape
        width = columns if width is None else width
        guard = CANARY if output else float("nan")
        flat = torch.full((2 * GUARD + rows * width,), guard, dtype=dtype)
        matrix = flat[GUARD : GUARD + rows * width].view(rows, width)
        view = matrix[:, column : column + columns]
        view.copy_(values)
        self.regions.append(_Region(flat, view, flat.clone(), output))
        return view

    def out(
        self,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        *,
        width: int | None = None,
        column: int = 0,
    ) -> Tensor:
        """An output in which every element is still to be written."""
        nothing = torch.full((rows, columns), float("nan"))
        return self.put(nothing, dtype, width=width, column=column, output=True)

    def vector(self, values: Tensor) -> Tensor:
        return self.put(values.view(1, -1), torch.float32)[0]

    def norm(self, x: Tensor) -> Normalization:
        """A batch norm of x, its gammas of both signs and some of them zero."""
        c = x.shape[1]
        gamma, beta = self.normal(2, c)
        gamma[::5] = 0
        mean, var = x.double().mean(0), x.double().var(0, unbiased=False)
        mean, var, gamma, beta = (self.vector(v) for v in (mean, var, gamma, beta))
        return Normalization(mean, var, gamma, beta, 1e-5)

    def statistics(self, columns: int) -> Statistics:
        """A place for those of a product's columns, still to be written."""
        return Statistics(*(self.out(1, columns, torch.float32)[0] for _ in range(2)))

    def deferred(self, columns: int) -> Deferred:
        """A correction that other readers of the channels have begun."""
        values = self.normal(2, 1, columns)
        return Deferred(*(self.put(v, torch.float32, output=True)[0] for v in values))

    def check(self) -> None:
        """Nothing but the declared outputs has changed, bit for bit; outputs are all written."""
        for region in self.regions:
            bits = _BITS[region.flat.element_size()]
            before = region.before.clone()
            if region.output:
                assert not region.view.isnan().any(), "an output element was not written"
                offset = region.view.storage_offset()
                shape, stride = region.view.shape, region.view.stride()
                before.as_strided(shape, stride, offset).copy_(region.view)
            assert torch.equal(region.flat.view(bits), before.view(bits)), "a guard was overwritten"


def in_float64(norm: Normalization) -> Normalization:
    mean, var, gamma, beta = (v.double() for v in (norm.mean, norm.var, norm.gamma, norm.beta))
    return Normalization(mean, var, gamma, beta, norm.eps)


def ones(c: int) -> Normalization:
    """x + 1."""
    one = torch.ones(c)
    return Normalization(torch.zeros(c), one, one, one, 0.0)


def unpending(dy: Tensor) -> PendingNorm:
    """A norm2 that leaves ``dy`` as it is."""
    return PendingNorm(torch.zeros_like(dy), ones(dy.shape[1]), None)


def assert_as_good(ours: Tensor, exact: Tensor, formula: Tensor) -> None:
    """At most twice the error of torch's formula in the same type (flash-attention's rule).

    bfloat16, whose stores the interpreter truncates: within one unit in the last place.
    """
    assert ours.shape == exact.shape
    difference = (ours.double() - exact).abs()
    tiny = 8 * EPS32 * max(1.0, exact.abs().max().item())
    if ours.dtype == torch.bfloat16:
        allowed = exact.abs() * 2.0**-7 + tiny
    else:
        allowed = 2 * (formula.double() - exact).abs().max() + tiny
    # all(<=), so that a NaN fails
    assert (difference <= allowed).all(), f"error {difference.max():.3g}, allowed {allowed}"
