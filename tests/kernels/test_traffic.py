"""The table of traffic against the matrices that operations hand to their kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from effdense.backends.base import (
    Deferred,
    Normalization,
    PendingNorm,
    Statistics,
    Unfinished,
)
from effdense.kernels import (
    bn_relu,
    bn_relu_conv1x1,
    bn_relu_conv1x1_backward,
    bn_relu_conv3,
    bn_relu_conv3_backward,
    bn_relu_pool,
    dropout,
    finish_gradient,
    statistics,
    traffic,
)
from effdense.kernels.launch import Launcher
from effdense.kernels.launch_table import Architecture, LaunchTable

Tensor = torch.Tensor
SHAPE = (2, 8, 8)
P, C, B, K = 128, 160, 48, 16
WINDOWS = 32


class Watching(Launcher):
    """Starts nothing, and notes the elements of every matrix of P rows, or of windows."""

    def __init__(self) -> None:
        super().__init__(LaunchTable(Architecture("cuda", 90, 132)))
        self.starts: list[int] = []

    def start(
        self, kernel: Any, grid: tuple[int, ...], integers: Any, constants: Any
    ) -> Callable[..., None]:
        pointers = [name for name in kernel.arg_names if name.startswith("p_")]

        def start(tensors: tuple[Tensor, ...], floats: tuple[float, ...] = ()) -> None:
            given = zip(pointers, tensors, strict=True)
            # a matrix that stands in for an argument that is not there comes twice
            found = {
                id(t): t.numel() * (2 if name == "p_d" and "conv1x1_bwd" in kernel.__name__ else 1)
                for name, t in given
                if name in kernel.matrices and t.shape[0] in (P, WINDOWS)
            }
            self.starts.append(sum(found.values()))

        return start


def matrix(columns: int, rows: int = P) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")


def vectors(c: int, n: int = 2) -> Any:
    return torch.empty(n, c, device="meta")


def norm(c: int) -> Normalization:
    mean, var, gamma, beta = vectors(c, 4)
    return Normalization(mean, var, gamma, beta, 1e-5)


def columns() -> Tensor:
    return matrix(C + K)[:, C:]


def product(watching: Watching) -> None:
    weight = torch.empty(B, C, device="meta")
    run = bn_relu_conv1x1.bn_relu_conv1x1
    run(matrix(C), norm(C), weight, matrix(B), Statistics(*vectors(B)), watching)


def product_backward(watching: Watching) -> None:
    pending = PendingNorm(matrix(B), norm(B), (*vectors(B), 1.0))
    weight = torch.empty(B, C, device="meta")
    rest = weight, matrix(B), matrix(C), True, pending, Deferred(*vectors(C)), watching
    bn_relu_conv1x1_backward.bn_relu_conv1x1_backward(matrix(C), norm(C), *rest)


def taps() -> Tensor:
    return torch.empty(K, B, 3, 3, device="meta")


def convolution(watching: Watching) -> None:
    rest = taps(), SHAPE, columns(), None, Statistics(*vectors(K)), watching
    bn_relu_conv3.bn_relu_conv3(matrix(B), norm(B), *rest)


def convolution_backward(watching: Watching) -> None:
    mean, s, t = vectors(K, 3)
    given = columns(), columns(), mean, s, t
    gradient = Unfinished(*given, 1.0, None, lambda: matrix(K))
    rest = taps(), gradient, SHAPE, True, matrix(B), None, watching
    bn_relu_conv3_backward.bn_relu_conv3_backward(matrix(B), norm(B), *rest)


def pool(watching: Watching) -> None:
    bn_relu_pool.bn_relu_avg_pool(matrix(C), norm(C), SHAPE, matrix(C, WINDOWS), watching)


def pool_backward(watching: Watching) -> None:
    pooled = matrix(C, WINDOWS), matrix(C), matrix(C, WINDOWS)
    run = bn_relu_pool.bn_relu_avg_pool_backward
    run(matrix(C), norm(C), SHAPE, *pooled, None, watching)


def finish(watching: Watching) -> None:
    run = finish_gradient.finish_gradient
    run(matrix(C), matrix(C), *vectors(C, 3), 1.0, matrix(C), watching)


def new_statistics(watching: Watching) -> None:
    statistics.statistics(columns(), Statistics(*vectors(K)), watching)


def rectify(watching: Watching) -> None:
    bn_relu.bn_relu(matrix(B), norm(B), matrix(B), watching)


def sums(watching: Watching) -> None:
    bn_relu.bn_relu_backward_reduce(matrix(B), norm(B), matrix(B), None, watching)


def mask(watching: Watching) -> None:
    key = torch.empty(1, dtype=torch.int64, device="meta")
    dropout.dropout_mask(matrix(K), key, 0.2, watching)


forward, backward = traffic.transition(2)
CASES = [
    (product, [traffic.FORWARD[0]]),
    (product, [traffic.REBUILD]),
    (convolution, [traffic.FORWARD[1]]),
    (convolution_backward, traffic.BACKWARD[:2]),
    (product_backward, [traffic.BACKWARD[2]]),
    (mask, [traffic.MASK]),
    (pool, [forward]),
    (pool_backward, [backward]),
    (finish, [traffic.INPUT]),
    (rectify, [traffic.VENDOR_FORWARD[0]]),
    (new_statistics, [traffic.VENDOR_FORWARD[3]]),
    (sums, [traffic.VENDOR_BACKWARD[4]]),
]


@pytest.mark.parametrize(
    ("operation", "rows"), CASES, ids=lambda v: v.__name__ if callable(v) else v[0].name
)
def test_rows_are_what_kernels_are_given(
    operation: Callable[[Watching], None], rows: list[traffic.Traffic]
) -> None:
    watching = Watching()
    operation(watching)
    # the launches that add up partial results are given none
    found = [elements for elements in watching.starts if elements]
    assert found == [P * row.moved.of(C, B, K) for row in rows]


def test_bottleneck_wide_passes_of_a_layer() -> None:
    layer = (*traffic.FORWARD, traffic.REBUILD, *traffic.BACKWARD)
    assert sum(row.moved.B for row in layer) <= 8
    assert sum(row.moved.c for row in layer) == 5


def test_the_page_shows_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "traffic.md"
    assert traffic.markdown() in page.read_text()
