"""Each operation against float64, in poisoned memory, with tiles that hit every edge."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from effdense.backends import dropout
from effdense.backends.base import Deferred, Normalization, PendingNorm, Statistics
from effdense.backends.self_check import self_check
from effdense.backends.triton_backend import INTERPRETED, TritonBackend
from effdense.kernels import bn_relu as bn_relu_kernels
from effdense.kernels import bn_relu_conv1x1 as conv_kernels
from effdense.kernels import bn_relu_conv1x1_backward as conv_backward_kernels
from effdense.kernels import bn_relu_pool as pool_kernels
from effdense.kernels import finish_gradient as finish_kernels
from effdense.kernels import statistics as statistics_kernels
from effdense.kernels import sums as sum_kernels
from effdense.kernels.launch import Launcher
from effdense.kernels.launch_table import Launch
from effdense.kernels.layouts import pad
from tests.helpers.kernel_arena import EPS32, Arena, assert_as_good, in_float64, ones, unpending

Tensor = torch.Tensor
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TILE = Launch(16, 16, 16, programs=6)


class Case(NamedTuple):
    """P, c, the buffer's width, B, and the launch."""

    rows: int
    c: int
    width: int
    b: int
    launch: Launch = TILE


CASES = [
    Case(1, 1, 1, 1),
    Case(2, 3, 7, 1),
    # primes, several tiles each way, two tiles of the bottleneck
    Case(71, 37, 53, 19),
    # the same in padded rows, of which more is loaded than c
    Case(71, 37, 48, 19),
    # whole tiles: nothing is masked
    Case(64, 32, 48, 32),
    # a whole bottleneck in one tile, one range of rows
    Case(50, 17, 17, 31, Launch(32, 32, 32, programs=1)),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: "x".join(map(str, c[:4])))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


def backend(case: Case) -> TritonBackend:
    return TritonBackend(lambda *shape: case.launch)


class Layer:
    """A layer's inputs in an arena: x is a prefix of a wider buffer."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.arena = arena = Arena(seed=case.rows)
        self.x = arena.put(arena.normal(case.rows, case.c) * 2 + 1, dtype, width=case.width)
        self.norm = arena.norm(self.x)
        self.x64, self.norm64 = self.x.double(), in_float64(self.norm)

    def dz(self, case: Case, dtype: torch.dtype) -> Tensor:
        return self.arena.put(self.arena.normal(case.rows, case.c), dtype, output=True)


def test_runs_in_the_interpreter() -> None:
    assert INTERPRETED


@each_case
@each_dtype
def test_statistics(case: Case, dtype: torch.dtype) -> None:
    arena = Arena(0)
    values = arena.normal(case.rows, case.c) * 2 + 1
    x = arena.put(values, dtype, width=case.width, column=case.width - case.c)
    found = Statistics(*torch.full((2, x.shape[1]), float("nan")))
    backend(case).statistics(x, found)
    mean, var = found
    exact = statistics_kernels.statistics_reference(x.double())
    formula = statistics_kernels.statistics_reference(x.float())
    assert_as_good(mean, exact[0], formula[0])
    assert_as_good(var, exact[1], formula[1])
    arena.check()


def test_variance_survives_a_large_mean() -> None:
    # E[x^2] - E[x]^2 in float32 has no digit left here; a mean is rounded by 2e-4
    arena = Arena(0)
    x = arena.put(arena.normal(300, 5) + 4096, torch.float32)
    mean, var = found = Statistics(*torch.full((2, x.shape[1]), float("nan")))
    backend(CASES[2]).statistics(x, found)
    exact = statistics_kernels.statistics_reference(x.double())
    torch.testing.assert_close(mean.double(), exact[0], rtol=2 * EPS32, atol=0)
    torch.testing.assert_close(var.double(), exact[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize(
    ("parts", "weights", "c"), [(1, 0, 5), (3, 1, 1), (130, 3, 33), (3, 40, 140)]
)
def test_sums(parts: int, weights: int, c: int, defer: bool) -> None:
    arena = Arena(parts)
    part = arena.put(arena.normal(parts * (weights + 2), c), torch.float32)
    part = part.view(parts, weights + 2, c)
    norm = arena.norm(arena.normal(9, c))
    deferred = deferred64 = None
    if defer:
        deferred = arena.deferred(c)
        deferred64 = Deferred(*(v.double() for v in deferred))
    launcher = Launcher(lambda *_: TILE)
    sums = sum_kernels.prepare_sums(launcher, parts, weights, c, defer)
    found = sum_kernels.add_sums(sums, part, norm, deferred)
    exact = sum_kernels.sums_reference(part.double(), in_float64(norm), deferred64)
    formula = sum_kernels.sums_reference(part, norm, None)
    assert (found[0] is None) == (weights == 0)
    for ours, *theirs in zip(found, exact, formula, strict=True):
        if ours is not None:
            assert_as_good(ours, *theirs)
    if deferred is not None and deferred64 is not None:
        for moved, expected in zip(deferred, deferred64, strict=True):
            assert_as_good(moved, expected, expected.float())
    arena.check()


@each_case
@each_dtype
@pytest.mark.parametrize("dense", [True, False])
def test_bn_relu(case: Case, dtype: torch.dtype, dense: bool) -> None:
    layer = Layer(case, dtype)
    width = case.c if dense else case.c + 3
    out = layer.arena.out(case.rows, case.c, dtype, width=width)
    backend(case).bn_relu(layer.x, layer.norm, out)
    exact = bn_relu_kernels.bn_relu_reference(layer.x64, layer.norm64)
    assert_as_good(out, exact, bn_relu_kernels.bn_relu_reference(layer.x, layer.norm))
    layer.arena.check()


@each_dtype
def test_nan_is_not_rectified_away(dtype: torch.dtype) -> None:
    x = torch.full((3, 2), float("nan"), dtype=dtype)
    norm, out = ones(2), torch.zeros(3, 2, dtype=dtype)
    TritonBackend().bn_relu(x, norm, out)
    assert out.isnan().all()


@each_case
@each_dtype
def test_bn_relu_backward_reduce(case: Case, dtype: torch.dtype) -> None:
    layer = Layer(case, dtype)
    dz = layer.dz(case, dtype)
    found = backend(case).bn_relu_backward_reduce(layer.x, layer.norm, dz)
    reference = bn_relu_kernels.bn_relu_backward_reference
    _, *exact = reference(layer.x64, layer.norm64, dz.double())
    _, *formula = reference(layer.x.float(), layer.norm, dz.float())
    for ours, *theirs in zip(found, exact, formula, strict=True):
        assert_as_good(ours, *theirs)
    layer.arena.check()


@each_case
@each_dtype
@pytest.mark.parametrize("frozen", [False, True])
def test_bn_relu_backward_apply(case: Case, dtype: torch.dtype, frozen: bool) -> None:
    layer = Layer(case, dtype)
    dz = layer.dz(case, dtype)
    s, t = (layer.arena.vector(v) for v in layer.arena.normal(2, case.c))

    def reference(x: Tensor, norm: Normalization, dz: Tensor, s: Tensor, t: Tensor) -> Tensor:
        masked = bn_relu_kernels.bn_relu_backward_reference(x, norm, dz)[0]
        if not frozen:
            masked = masked - (s + t * (x - norm.mean) * norm.rstd) / case.rows
        return (norm.scale * masked).to(x.dtype)

    exact = reference(layer.x64, layer.norm64, dz.double(), s.double(), t.double())
    formula = reference(layer.x, layer.norm, dz, s, t)
    correction = None if frozen else (s, t, float(case.rows))
    backend(case).bn_relu_backward_apply(layer.x, layer.norm, dz, correction)
    if dtype == torch.bfloat16:
        # cancellation: one unit of the largest term, not of the difference
        assert ((dz.double() - exact).abs() <= 2.0**-7 * exact.abs() + 1e-5).all()
    else:
        assert_as_good(dz, exact, formula)
    layer.arena.check()


@each_case
@each_dtype
def test_bn_relu_backward_accumulate(case: Case, dtype: torch.dtype) -> None:
    layer = Layer(case, dtype)
    dz = layer.dz(case, dtype)
    before = layer.arena.normal(case.rows, case.c)
    d = layer.arena.put(before, dtype, width=case.width + 2, output=True)
    before = d.clone()
    found = backend(case).bn_relu_backward_accumulate(layer.x, layer.norm, dz, d)
    reference = bn_relu_kernels.bn_relu_backward_reference
    masked, *exact = reference(layer.x64, layer.norm64, dz.double())
    _, *formula = reference(layer.x.float(), layer.norm, dz.float())
    for ours, *theirs in zip(found, exact, formula, strict=True):
        assert_as_good(ours, *theirs)
    formula_d = before + (layer.norm.scale * masked.to(dtype)).to(dtype)
    assert_as_good(d, before.double() + layer.norm64.scale * masked, formula_d)
    layer.arena.check()


@each_case
@each_dtype
def test_bn_relu_conv1x1(case: Case, dtype: torch.dtype) -> None:
    layer = Layer(case, dtype)
    weight = layer.arena.put(layer.arena.normal(case.b, case.c) / math.sqrt(case.c), dtype)
    out = layer.arena.out(case.rows, case.b, dtype)
    found = layer.arena.statistics(case.b)
    backend(case).bn_relu_conv1x1(layer.x, layer.norm, weight, out, found)
    reference = conv_kernels.bn_relu_conv1x1_reference
    exact = reference(layer.x64, layer.norm64, weight.double())
    assert_as_good(out, exact, reference(layer.x, layer.norm, weight))
    # the statistics are those of what was stored
    stored = statistics_kernels.statistics_reference(out.double())
    formula = statistics_kernels.statistics_reference(out.float())
    for ours, *theirs in zip(found, stored, formula, strict=True):
        assert_as_good(ours, *theirs)
    layer.arena.check()
    again = layer.arena.out(case.rows, case.b, dtype)
    backend(case).bn_relu_conv1x1(layer.x, layer.norm, weight, again, None)
    assert torch.equal(again, out)


# every mode in every type where rows, channels and bottleneck are ragged; elsewhere each once
MODES = [(True, False), (True, True), (False, False), (False, True)]
BACKWARD = [(CASES[2], dtype, *mode) for dtype in DTYPES for mode in MODES]
BACKWARD += [
    (case, DTYPES[(i + j) % 3], *mode)
    for i, case in enumerate(c for c in CASES if c is not CASES[2])
    for j, mode in enumerate(MODES)
]


@pytest.mark.parametrize(
    ("case", "dtype", "need_weight", "frozen"),
    BACKWARD,
    ids=lambda v: (
        "x".join(map(str, v[:4])) if isinstance(v, Case) else str(v).removeprefix("torch.")
    ),
)
def test_bn_relu_conv1x1_backward(
    case: Case, dtype: torch.dtype, need_weight: bool, frozen: bool
) -> None:
    layer = Layer(case, dtype)
    arena = layer.arena
    # the parameter itself, whatever the matrices are stored in
    weight = arena.put(arena.normal(case.b, case.c) / math.sqrt(case.c), torch.float32)
    dz = arena.put(arena.normal(case.rows, case.b), dtype)
    y = arena.put(arena.normal(case.rows, case.b) + 1, dtype)
    d = arena.put(arena.normal(case.rows, case.c), dtype, width=case.width, output=True)
    s2, t2 = (arena.vector(v) for v in arena.normal(2, case.b))
    correction = None if frozen else (s2, t2, float(case.rows))
    deferred = None if frozen else arena.deferred(case.c)
    pending = PendingNorm(y, arena.norm(y), correction)
    # before anything is overwritten
    before, before64 = d.clone(), d.double()
    deferred64 = None if deferred is None else Deferred(*(v.double() for v in deferred))
    correction64 = None if frozen else (s2.double(), t2.double(), float(case.rows))
    pending64 = PendingNorm(y.double(), in_float64(pending.norm), correction64)
    reference = conv_backward_kernels.bn_relu_conv1x1_backward_reference
    exact_dx, *exact = reference(layer.x64, layer.norm64, weight.double(), dz.double(), pending64)
    formula_dx, *formula = reference(layer.x, layer.norm, weight, dz, pending)
    dw, *sums = backend(case).bn_relu_conv1x1_backward(
        layer.x, layer.norm, weight, dz, d, need_weight, pending, None, deferred
    )
    assert (dw is not None) == need_weight
    for ours, *theirs in zip((dw, *sums), exact, formula, strict=True):
        if ours is not None:
            assert ours.dtype == torch.float32
            assert_as_good(ours, *theirs)
    formula_d = before + (layer.norm.scale * formula_dx).to(dtype)
    assert_as_good(d, before64 + layer.norm64.scale * exact_dx, formula_d)
    if deferred is not None and deferred64 is not None:
        deferred64.add(layer.norm64, *(v.double() for v in sums))
        for moved, expected in zip(deferred, deferred64, strict=True):
            assert_as_good(moved, expected, expected.float())
    arena.check()


def test_padding_may_hold_anything() -> None:
    # rows of 48: all 48 columns are loaded for the first 37, and what lies behind does not matter
    case = Case(71, 37, 48, 19)
    layer = Layer(case, torch.float32)
    weight = layer.arena.put(layer.arena.normal(case.b, case.c), torch.float32)
    dense = layer.x.clone()
    assert layer.x.as_strided((71, 48), (48, 1), layer.x.storage_offset())[:, 37:].isnan().all()
    for x in (layer.x, dense):
        assert pad(x) == (16 if x is layer.x else 1)
    found = [torch.zeros(71, 19) for _ in range(2)]
    for x, out in zip((layer.x, dense), found, strict=True):
        backend(case).bn_relu_conv1x1(x, layer.norm, weight, out, None)
    assert torch.equal(*found)


POOL_SHAPES = [(2, 5), (3, 2), (2, 5, 7), (1, 4, 6), (2, 1, 6), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", POOL_SHAPES, ids=lambda s: "x".join(map(str, s)))
@each_dtype
def test_bn_relu_avg_pool(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case(math.prod(shape), 19, 27, 0)
    layer = Layer(case, dtype)
    windows = shape[0] * math.prod(s // 2 for s in shape[1:])
    out = layer.arena.out(windows, case.c, dtype)
    backend(case).bn_relu_avg_pool(layer.x, layer.norm, shape, out)
    reference = pool_kernels.bn_relu_avg_pool_reference
    x64 = layer.x64.clone().requires_grad_()
    exact = reference(x64, layer.norm64, shape)
    formula = reference(layer.x, layer.norm, shape)
    if windows:
        assert_as_good(out, exact.detach(), formula)

    dpooled = layer.arena.put(layer.arena.normal(windows, case.c), dtype)
    d = layer.arena.out(case.rows, case.c, dtype, width=case.c + 5)
    pooled = layer.arena.out(windows, case.c, dtype)
    run = backend(case).bn_relu_avg_pool_backward
    s, t = run(layer.x, layer.norm, shape, dpooled, d, pooled)
    assert torch.equal(pooled, out)
    (exact_d,) = torch.autograd.grad(exact, x64, dpooled.double())
    # scale is a factor of d, so where it is zero S and T need the gradient of z itself
    z64 = bn_relu_kernels.bn_relu_reference(layer.x64, layer.norm64).requires_grad_()
    zero, one = torch.zeros_like(layer.norm64.mean), torch.ones_like(layer.norm64.mean)
    identity = Normalization(zero, one, one, zero, 0.0)
    (dz,) = torch.autograd.grad(reference(z64, identity, shape), z64, dpooled.double())
    dz = dz * (z64 > 0)
    xhat = (layer.x64 - layer.norm64.mean) * layer.norm64.rstd
    assert_as_good(d, exact_d, exact_d.to(dtype))
    assert_as_good(s, dz.sum(0), dz.float().sum(0))
    assert_as_good(t, (dz * xhat).sum(0), (dz.float() * xhat.float()).sum(0))
    layer.arena.check()
    other = layer.arena.out(case.rows, case.c, dtype)
    without = run(layer.x, layer.norm, shape, dpooled, other, None)
    assert torch.equal(other, d)
    assert torch.equal(torch.stack(without), torch.stack((s, t)))


@pytest.mark.parametrize(("images", "positions"), [(1, 1), (3, 7), (2, 49)])
@each_dtype
def test_bn_relu_global_pool(images: int, positions: int, dtype: torch.dtype) -> None:
    case = Case(images * positions, 19, 27, 0)
    layer = Layer(case, dtype)
    out = layer.arena.out(images, case.c, dtype)
    backend(case).bn_relu_global_pool(layer.x, layer.norm, images, out)
    reference = pool_kernels.bn_relu_global_pool_reference
    formula = reference(layer.x, layer.norm, images)
    assert_as_good(out, reference(layer.x64, layer.norm64, images), formula)

    dpooled = layer.arena.put(layer.arena.normal(images, case.c), dtype)
    d = layer.arena.out(case.rows, case.c, dtype, width=case.c + 5)
    run = backend(case).bn_relu_global_pool_backward
    sums = run(layer.x, layer.norm, images, dpooled, d)

    def backward(x: Tensor, norm: Normalization, dpooled: Tensor) -> tuple[Tensor, ...]:
        dz = (dpooled / positions).repeat_interleave(positions, 0)
        return bn_relu_kernels.bn_relu_backward_reference(x, norm, dz)

    dz, *exact = backward(layer.x64, layer.norm64, dpooled.double())
    dz_formula, *formula_sums = backward(layer.x.float(), layer.norm, dpooled.float())
    assert_as_good(d, layer.norm64.scale * dz, (layer.norm.scale * dz_formula).to(dtype))
    for ours, *theirs in zip(sums, exact, formula_sums, strict=True):
        assert_as_good(ours, *theirs)
    layer.arena.check()


@each_dtype
@pytest.mark.parametrize("p", [0.2, 0.5])
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (71, 19), (64, 32)])
def test_dropout_mask(rows: int, k: int, p: float, dtype: torch.dtype) -> None:
    arena = Arena(rows)
    out, key = arena.out(rows, k, dtype), torch.tensor([-(2**62) + 5])
    TritonBackend(lambda *shape: TILE).dropout_mask(key, p, out)
    expected = torch.empty(rows, k, dtype=dtype)
    dropout.dropout_mask(key, p, expected)
    if dtype == torch.bfloat16:
        # the interpreter truncates its stores
        assert torch.equal(out > 0, expected > 0)
    else:
        assert torch.equal(out, expected)
    arena.check()


@each_case
@each_dtype
@pytest.mark.parametrize("in_place", [True, False])
def test_finish_gradient(case: Case, dtype: torch.dtype, in_place: bool) -> None:
    arena = Arena(case.rows)
    column = case.width - case.c
    x = arena.put(arena.normal(case.rows, case.c), dtype, width=case.width, column=column)
    values = arena.normal(case.rows, case.c)
    d = arena.put(values, dtype, width=case.width, column=column, output=in_place)
    mean, s, t = (arena.vector(v) for v in arena.normal(3, case.c))
    out = d if in_place else arena.out(case.rows, case.c, dtype)
    reference = finish_kernels.finish_gradient_reference
    vectors = [v.double() for v in (mean, s, t)]
    exact = reference(d.double(), x.double(), *vectors, case.rows)
    formula = reference(d, x, mean, s, t, case.rows).to(dtype)
    backend(case).finish_gradient(d, x, mean, s, t, case.rows, out)
    assert_as_good(out, exact, formula)
    arena.check()


def test_two_runs_agree_bit_for_bit() -> None:
    case = CASES[2]

    def run() -> list[Tensor]:
        layer = Layer(case, torch.float16)
        arena = layer.arena
        weight = arena.put(arena.normal(case.b, case.c), torch.float16)
        dy = arena.put(arena.normal(case.rows, case.b), torch.float16)
        d = arena.put(arena.normal(case.rows, case.c), torch.float16, output=True)
        out = arena.out(case.rows, case.b, torch.float16)
        found, of_x = arena.statistics(case.b), arena.statistics(case.c)
        backend(case).bn_relu_conv1x1(layer.x, layer.norm, weight, out, found)
        dw, *sums = backend(case).bn_relu_conv1x1_backward(
            layer.x, layer.norm, weight, dy, d, True, unpending(dy), None, None
        )
        assert dw is not None
        backend(case).statistics(layer.x, of_x)
        return [*found, dw, *sums, d, out, *of_x]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_rows_beyond_two_to_the_31_elements() -> None:
    # 18 rows of 2^27 elements: 4.5 GiB of addresses, of which a few pages are ever touched (not
    # by torch.empty or new_empty, which are poisoned here)
    stride = 2**27 + 8
    x, d = (torch.empty_strided((18, 5), (stride, 1), dtype=torch.float16) for _ in range(2))
    arena = Arena(0)
    assert (x.shape[0] - 1) * x.stride(0) > 2**31
    x.copy_(arena.normal(18, 5))
    d.copy_(arena.normal(18, 5))
    norm = arena.norm(x)
    near, near_d = x.clone(), d.clone()
    weight, dy = arena.normal(3, 5).half(), arena.normal(18, 3).half()
    far = TritonBackend(lambda *shape: TILE)
    there, here = (Statistics(*torch.zeros(2, 5)) for _ in range(2))
    far.statistics(x, there)
    far.statistics(near, here)
    torch.testing.assert_close(there, here, rtol=0, atol=0)
    rest = True, unpending(dy), None, None
    back = far.bn_relu_conv1x1_backward(x, norm, weight, dy.clone(), d, *rest)
    expected = far.bn_relu_conv1x1_backward(near, norm, weight, dy.clone(), near_d, *rest)
    torch.testing.assert_close(back, expected, rtol=0, atol=0)
    assert torch.equal(d, near_d)
    out, near_out = torch.zeros(2, 18, 3, dtype=torch.float16)
    far.bn_relu_conv1x1(x, norm, weight, out, None)
    far.bn_relu_conv1x1(near, norm, weight, near_out, None)
    assert torch.equal(out, near_out)
    far.bn_relu(near, norm, d)
    assert torch.equal(d, bn_relu_kernels.bn_relu_reference(near, norm))
    far.finish_gradient(d, x, norm.mean, norm.rstd, norm.shift, 18.0, d)
    finished = bn_relu_kernels.bn_relu_reference(near, norm)
    far.finish_gradient(finished, near, norm.mean, norm.rstd, norm.shift, 18.0, finished)
    assert torch.equal(d, finished)


def test_writes_are_known_to_autograd() -> None:
    x, norm = torch.ones(4, 3), ones(3)
    out = torch.zeros(4, 3)
    version = out._version
    TritonBackend().bn_relu(x, norm, out)
    assert out._version > version
    dw, d = torch.zeros(2, 3), torch.zeros(4, 3)
    version = d._version
    dy = torch.ones(4, 2)
    TritonBackend().bn_relu_conv1x1_backward(x, norm, dw, dy, d, True, unpending(dy), None, None)
    assert d._version > version


def test_inference_tensors_are_accepted() -> None:
    with torch.inference_mode():
        out = torch.zeros(4, 3)
        TritonBackend().bn_relu(torch.ones(4, 3), ones(3), out)
    assert (out == 2).all()


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        TritonBackend().statistics(
            torch.ones(4, 3, dtype=torch.float64), Statistics(*torch.zeros(2, 3))
        )


@each_dtype
def test_self_check_passes(dtype: torch.dtype) -> None:
    assert self_check(TritonBackend(), torch.device("cpu"), dtype) is None
