"""The 3-wide convolution's kernels against float64, in poisoned memory, in every program order."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from effdense.backends.base import Normalization, Statistics, Unfinished
from effdense.kernels import bn_relu_conv3 as bn_relu_conv3_module
from effdense.kernels.bn_relu import bn_relu_reference
from effdense.kernels.bn_relu_conv3 import bn_relu_conv3, bn_relu_conv3_reference
from effdense.kernels.bn_relu_conv3_backward import (
    bn_relu_conv3_backward,
    bn_relu_conv3_backward_reference,
)
from effdense.kernels.launch import Launcher
from effdense.kernels.launch_table import Launch
from effdense.kernels.statistics import statistics_reference
from tests.helpers.kernel_arena import Arena, assert_as_good, in_float64
from tests.helpers.program_order import in_every_order, programs_in

Tensor = torch.Tensor
EPS = 1e-3


class Case(NamedTuple):
    """Images and their sizes, B, k, X's width and the first of the k columns; the launch."""

    shape: tuple[int, ...]
    b: int
    k: int
    width: int
    column: int
    launch: Launch


SMALL = Launch(16, 16, 16, programs=6)
# Several images; rows, B and k that are no whole tiles; columns that begin anywhere.
LINES = Case((2, 9), 19, 5, 16, 11, SMALL)
# primes: no tile begins at a line
PLANES = Case((2, 3, 7), 19, 5, 37, 31, SMALL)
VOLUMES = Case((2, 2, 3, 2), 13, 5, 16, 9, SMALL)
EVERY_TYPE = (LINES, PLANES, VOLUMES)
# Edges of the tiling and of images, which have nothing to do with the type: one each.
EDGES = [
    (Case((1, 1), 16, 1, 1, 0, SMALL), torch.float32),
    (Case((1, 1, 1), 3, 1, 7, 3, SMALL), torch.bfloat16),
    # several tiles of k and B, columns at a multiple of 4
    (Case((2, 4, 4), 32, 24, 48, 20, SMALL), torch.float16),
    # whole tiles, aligned throughout
    (Case((1, 8, 8), 32, 16, 64, 32, Launch(32, 32, 16, programs=3)), torch.float16),
    # B wider than a tile, a k that is no power of two in a tile that is
    (Case((1, 3, 6), 130, 12, 32, 18, Launch(32, 64, 64, programs=1)), torch.float32),
    # one line, one column: neighbours in two directions only
    (Case((2, 1, 5), 16, 12, 16, 0, SMALL), torch.bfloat16),
    (Case((2, 5, 1), 16, 12, 16, 4, SMALL), torch.float16),
    # a volume with an inside
    (Case((1, 3, 3, 3), 48, 24, 32, 8, Launch(16, 32, 32, programs=4)), torch.float32),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


def name_of(value: Case | torch.dtype) -> str:
    if isinstance(value, torch.dtype):
        return str(value).split(".")[1]
    return f"{'x'.join(map(str, value.shape))}-B{value.b}-k{value.k}"


each_case = pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, dtype) for case in EVERY_TYPE for dtype in DTYPES), *EDGES],
    ids=name_of,
)


def launcher_of(case: Case) -> Launcher:
    def table(operation: str, like: Tensor, channels: int, growth: int) -> Launch:
        assert operation in ("conv3", "conv3_backward", "conv3_weight")
        assert (like.shape[1], channels, growth) == (case.b, case.b, case.k)
        if operation == "conv3":
            return case.launch
        # backward, tiles of channels are those of the growth
        return replace(case.launch, block_c=case.launch.block_b)

    return Launcher(table)


class Layer:
    """A layer's inputs in an arena."""

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        parameters: torch.dtype = torch.float32,
        layout: str = "contiguous",
    ) -> None:
        self.case, self.dtype, self.arena = case, dtype, Arena(seed=case.b + case.k)
        self.rows = math.prod(case.shape)
        self.y = self.arena.put(self.arena.normal(self.rows, case.b) * 2 + 1, dtype)
        gamma, beta = self.arena.normal(2, case.b)
        gamma[::5] = 0
        y = self.y.double()
        mean, var = (self.arena.vector(v) for v in (y.mean(0), y.var(0, unbiased=False)))
        gamma, beta = (self.arena.put(v[None], parameters)[0] for v in (gamma, beta))
        self.norm = Normalization(mean, var, gamma, beta, EPS)
        self.weight = self.make_weight(parameters, layout)

    def make_weight(self, dtype: torch.dtype, layout: str) -> Tensor:
        case, dims = self.case, len(self.case.shape) - 1
        taps = 3**dims
        values = self.arena.normal(case.k, case.b, taps) / math.sqrt(case.b * taps)
        values = values.bfloat16()  # so that every type holds the same weight
        # the order of the weight's dimensions in memory
        order = {"contiguous": (0, 1, 2), "channels last": (0, 2, 1), "packed": (2, 0, 1)}[layout]
        stored = values.permute(order).reshape(1, -1)
        flat = self.arena.put(stored, dtype)[0]
        back = [order.index(i) for i in range(3)]
        weight = flat.view([values.shape[i] for i in order]).permute(back)
        sizes, strides = [3] * dims, [3**i * weight.stride(2) for i in reversed(range(dims))]
        shape, stride = (case.k, case.b, *sizes), (*weight.stride()[:2], *strides)
        return weight.as_strided(shape, stride, weight.storage_offset())

    def mask(self) -> Tensor:
        keep = torch.rand(self.rows, self.case.k, generator=self.arena.generator) < 0.7
        return self.arena.put(keep / 0.7, self.dtype)

    def columns(self, values: Tensor | None = None) -> Tensor:
        """The k columns of a wider buffer: an output, or ``values``."""
        width, column = self.case.width, self.case.column
        if values is None:
            return self.arena.out(self.rows, self.case.k, self.dtype, width=width, column=column)
        return self.arena.put(values, self.dtype, width=width, column=column)


def statistics_slices(layer: Layer) -> Statistics:
    """Slices of longer vectors, at any offset."""
    k = layer.case.k
    outs = (layer.arena.out(1, k, torch.float32, width=k + 8, column=3) for _ in range(2))
    return Statistics(*(out[0] for out in outs))


def rounded_operands(layer: Layer) -> tuple[Tensor, Normalization, Tensor]:
    """relu(norm(y)) and the weight in the storage type, as float32; a norm that does nothing."""
    z = bn_relu_reference(layer.y.float(), layer.norm).to(layer.dtype).float()
    zero, one = torch.zeros(layer.case.b), torch.ones(layer.case.b)
    return z, Normalization(zero, one, one, zero, 0.0), layer.weight.to(layer.dtype).float()


def exact_forward(layer: Layer, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """In float64, and by torch's formula on operands of the storage type."""
    shape = layer.case.shape
    inputs = (layer.y.double(), in_float64(layer.norm), layer.weight.double())
    exact = bn_relu_conv3_reference(*inputs, shape)
    formula = bn_relu_conv3_reference(*rounded_operands(layer), shape).to(layer.dtype)
    if mask is not None:
        exact, formula = exact * mask.double(), formula * mask
    return exact, formula


@each_case
def test_forward(case: Case, dtype: torch.dtype) -> None:
    layer = Layer(case, dtype)
    mask = layer.mask() if case.k % 2 else None
    out, found = layer.columns(), statistics_slices(layer)
    arguments = (layer.y, layer.norm, layer.weight, case.shape)
    bn_relu_conv3(*arguments, out, mask, found, launcher_of(case))
    assert_as_good(out, *exact_forward(layer, mask))
    # the statistics are those of what was stored
    stored, formula = statistics_reference(out.double()), statistics_reference(out.float())
    for ours, *theirs in zip(found, stored, formula, strict=True):
        assert_as_good(ours, *theirs)
    layer.arena.check()
    if case in (LINES, PLANES):
        frozen = layer.columns()
        bn_relu_conv3(*arguments, frozen, mask, None, launcher_of(case))
        assert torch.equal(frozen, out)


def gradient_of(layer: Layer, masked: bool) -> Unfinished:
    rows, k = layer.rows, layer.case.k
    d, x = (layer.columns(layer.arena.normal(rows, k) + shift) for shift in (0, 2))
    mean, s, t = (layer.arena.vector(v) for v in layer.arena.normal(3, k))
    mask = layer.mask() if masked else None

    def scratch() -> Tensor:
        raise AssertionError("finished in memory")

    return Unfinished(d, x, mean, s, t, rows + 0.5, mask, scratch)


def finished(gradient: Unfinished, dtype: torch.dtype) -> Tensor:
    vectors = gradient.d, gradient.x, gradient.mean, gradient.s, gradient.t
    d, x, mean, s, t = (v.to(dtype) for v in vectors)
    found = d - (s + t * (x - mean)) / gradient.count
    return found if gradient.mask is None else found * gradient.mask.to(dtype)


def exact_backward(layer: Layer, gradient: Unfinished) -> list[tuple[Tensor, Tensor]]:
    """Dz, dW, S and T in float64, and by torch's formula on operands of the storage type."""
    shape, reference = layer.case.shape, bn_relu_conv3_backward_reference
    inputs = (layer.y.double(), in_float64(layer.norm), layer.weight.double())
    exact = reference(*inputs, finished(gradient, torch.float64), shape)
    z, identity, weight = rounded_operands(layer)
    dout = finished(gradient, torch.float32).to(layer.dtype).float()
    dz, _, s, t = reference(layer.y.float(), layer.norm, weight, dout, shape)
    _, dw, _, _ = reference(z, identity, weight, dout, shape)
    return list(zip(exact, (dz, dw, s, t), strict=True))


def backward(
    layer: Layer, gradient: Unfinished, need_weight: bool, dz: Tensor | None, d: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    arguments = (layer.y, layer.norm, layer.weight, gradient, layer.case.shape, need_weight)
    return bn_relu_conv3_backward(*arguments, dz, d, launcher_of(layer.case))


@each_case
def test_backward(case: Case, dtype: torch.dtype) -> None:
    layer = Layer(case, dtype)
    gradient = gradient_of(layer, masked=case.k % 2 == 1)
    exact = exact_backward(layer, gradient)
    dz = layer.arena.out(layer.rows, case.b, dtype)
    dw, *sums = backward(layer, gradient, True, dz, None)
    assert dw is not None
    assert dw.is_contiguous()
    for ours, theirs in zip((dw, *sums), exact[1:], strict=True):
        assert ours.dtype == torch.float32
        assert_as_good(ours, *theirs)
    exact_dz, formula_dz = exact[0]
    assert_as_good(dz, exact_dz, formula_dz.to(dtype))
    layer.arena.check()
    if len(case.shape) == 4:
        # what follows is the same in every number of dimensions
        return

    # a layer without bottleneck: onto the gradient of its prefix, and a frozen weight
    before = layer.arena.normal(layer.rows, case.b)
    d = layer.arena.put(before, dtype, width=case.b + 5, output=True)
    before = d.clone()
    none, *again = backward(layer, gradient, False, None, d)
    assert none is None
    assert torch.equal(torch.stack(again), torch.stack(sums))
    scale = in_float64(layer.norm).scale
    formula_d = before + (layer.norm.scale * formula_dz).to(dtype)
    assert_as_good(d, before.double() + scale * exact_dz, formula_d)
    layer.arena.check()


# for each number of dimensions a type, three tiles of rows and, but in 3-D, several of B and k
ORDERED = [
    (Case((3, 13), 19, 18, 48, 20, SMALL), torch.float16),
    (Case((3, 3, 4), 19, 18, 37, 17, SMALL), torch.float32),
    (Case((3, 2, 2, 3), 13, 5, 16, 9, SMALL), torch.bfloat16),
]
each_ordered = pytest.mark.parametrize(("case", "dtype"), ORDERED, ids=name_of)


@each_ordered
def test_forward_in_every_order(case: Case, dtype: torch.dtype) -> None:
    def run() -> list[Tensor]:
        layer = Layer(case, dtype)
        out, found = layer.columns(), statistics_slices(layer)
        arguments = (layer.y, layer.norm, layer.weight, case.shape, out)
        bn_relu_conv3(*arguments, layer.mask(), found, launcher_of(case))
        layer.arena.check()
        return [out, *found]

    in_every_order(run)


@each_ordered
def test_backward_in_every_order(case: Case, dtype: torch.dtype) -> None:
    def run() -> list[Tensor | None]:
        layer = Layer(case, dtype)
        dz = layer.arena.out(layer.rows, case.b, dtype)
        found = backward(layer, gradient_of(layer, True), True, dz, None)
        layer.arena.check()
        return [dz, *found]

    in_every_order(run)


@pytest.mark.parametrize("parameters", DTYPES, ids=name_of)
@each_dtype
def test_weights_in_any_type_and_order(dtype: torch.dtype, parameters: torch.dtype) -> None:
    # each type of parameters meets each type of features, and each number of dimensions
    i, j = DTYPES.index(dtype), DTYPES.index(parameters)
    case, layout = EVERY_TYPE[(i + j) % 3], ("channels last", "packed")[j % 2]
    layer = Layer(case, dtype, parameters, layout)
    assert layer.weight.stride(1) == 1
    out, other = layer.columns(), layer.columns()
    for weight, into in ((layer.weight, out), (layer.weight.to(dtype).contiguous(), other)):
        arguments = (layer.y, layer.norm, weight, case.shape, into)
        bn_relu_conv3(*arguments, None, None, launcher_of(case))
    assert torch.equal(out, other)
    assert_as_good(out, *exact_forward(layer, None))
    layer.arena.check()


def packed_after(rows: int, layer: Layer, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All results, where weights are packed from so many rows on, and how many launches it took."""
    monkeypatch.setattr(bn_relu_conv3_module, "PACKED_ROWS", rows)
    case = layer.case
    out, dz = layer.columns(), layer.arena.out(layer.rows, case.b, layer.dtype)
    with programs_in(lambda programs: programs) as grids:
        arguments = (layer.y, layer.norm, layer.weight, case.shape, out, None, None)
        bn_relu_conv3(*arguments, launcher_of(case))
        dw, *sums = backward(layer, gradient_of(layer, False), True, dz, None)
    assert dw is not None
    assert dw.stride() == layer.weight.stride()
    layer.arena.check()
    return [out, dz, dw, *sums, torch.tensor(len(grids))]


@pytest.mark.parametrize(
    "shape", [(1, 3), (1, 3, 2), (1, 2, 2, 2)], ids=lambda s: f"{len(s) - 1}-D"
)
@each_dtype
def test_a_packed_weight_changes_no_bit(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # k B is more than one program packs, and two tiles of B
    case = Case(shape, 19, 15, 17, 1, SMALL)
    found = [packed_after(rows, Layer(case, dtype), monkeypatch) for rows in (0, 1 << 14)]
    assert [int(results.pop()) for results in found] == [6, 4]
    for packed, plain in zip(*found, strict=True):
        assert torch.equal(packed, plain)


def test_a_weight_with_its_channels_side_by_side_is_read_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = Layer(PLANES, torch.float16, layout="channels last")
    *_, launches = packed_after(0, layer, monkeypatch)
    assert launches == 4
