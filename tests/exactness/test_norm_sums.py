"""T from weight gradients: each of its three ways is exact, and each is taken."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

from effdense.backends import cpu_backend, norm_sums
from effdense.backends.base import Normalization, PendingNorm
from effdense.backends.select import get_backend
from effdense.backends.stepwise import Stepwise, _sum_of_products
from tests.helpers.compare import assert_same_step, images, norms_of, step, twins

WAYS = {"none": type(None), "few": torch.Tensor, "all": slice}


def set_norms(way: str, model: nn.Module) -> None:
    """Weights of both signs, and biases beyond them in no channel, some or all."""
    generator = torch.Generator().manual_seed(3)
    for norm in norms_of(model):
        size = norm.weight.shape
        sign = torch.randint(2, size, generator=generator) * 2 - 1
        norm.weight.data = sign * (0.5 + torch.rand(size, generator=generator)).double()
        norm.bias.data = 0.4 * (torch.rand(size, generator=generator).double() - 0.5)
        unstable = {"none": slice(0, 0), "few": slice(1, None, 6), "all": slice(None)}[way]
        # not far beyond: a ReLU that never cuts has no gradient of its norm's bias
        norm.bias.data[unstable] = -1.2 * norm.weight.data[unstable]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("save", ["features", "bottlenecks"])
def test_every_way_equals_naive(way: str, save: str, each_backend: str) -> None:
    ours, naive = twins(save, prepare=lambda model: set_norms(way, model))
    taken = []

    def watch(_: Stepwise, norm: Normalization) -> norm_sums.Channels:
        taken.append(norm_sums.direct_channels(norm))
        return taken[-1]

    x = images(3, 3, 9, 11)
    with mock.patch.object(Stepwise, "direct_channels", watch):
        assert_same_step(step(ours, x), step(naive, x))
    if each_backend == "torch":
        assert {type(channels) for channels in taken} == {WAYS[way]}


@pytest.mark.parametrize("wide", [False, True])
def test_the_compiled_loops_take_the_same_channels(wide: bool) -> None:
    """Seen by weights of zero, for which only the definition gives a number."""
    ops = get_backend("cpu", torch.device("cpu"), torch.float64)
    assert isinstance(ops, cpu_backend.CpuBackend)
    generator = torch.Generator().manual_seed(5)
    x, dout, weight = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((70, 13), (70, 4), (4, 13, 3) if wide else (4, 13))
    )
    gamma = torch.tensor([-1.5, 0.7] * 7, dtype=torch.float64)[:13]
    gamma[[2, 7]] = 0
    beta = torch.full((13,), 0.1, dtype=torch.float64)
    norm = Normalization(x.mean(0), x.var(0, correction=0), gamma, beta, 1e-5)
    direct = norm_sums.direct_channels(norm)
    assert isinstance(direct, torch.Tensor)
    assert direct.tolist() == [2, 7]

    def second_sums(ratio: float) -> torch.Tensor:
        with mock.patch.object(cpu_backend, "STABLE_RATIO", ratio):
            if wide:
                d = torch.zeros_like(x)
                return ops.convolve_backward(x, norm, weight, dout, (7, 10), True, None, d)[2]
            one = torch.ones(4, dtype=torch.float64)
            norm2 = Normalization(torch.zeros_like(one), one, one, one, 0.0)
            pending = PendingNorm(torch.zeros_like(dout), norm2, None)
            rest = torch.zeros_like(x), True, pending, None, None
            return ops.bn_relu_conv1x1_backward(x, norm, weight, dout.clone(), *rest)[2]

    by_definition = second_sums(0.0)
    torch.testing.assert_close(second_sums(1.0), by_definition, rtol=1e-10, atol=1e-10)
    assert by_definition.isfinite().all()
    assert second_sums(float("inf")).isfinite().logical_not().nonzero().flatten().tolist() == [2, 7]


@pytest.mark.parametrize("rows", [1, 255, 1024, 1025])
def test_sums_of_products_are_those_of_the_whole(rows: int) -> None:
    """Made of 256 rows at a time here."""
    a, b = torch.randn(2, rows, 1024, dtype=torch.float64)
    found = _sum_of_products(a, b)
    torch.testing.assert_close(found, (a * b).sum(0), rtol=1e-12, atol=1e-12)
