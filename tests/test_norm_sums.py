"""T from weight gradients: each of its three ways is exact, and each is taken."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from compare import assert_same_step, images, norms_of, step, twins
from torch import nn

from effdense import norm_sums
from effdense.backends import cpu_backend, torch_backend
from effdense.backends.base import Normalization

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

    def watch(norm: Normalization) -> norm_sums.Channels:
        taken.append(norm_sums.direct_channels(norm))
        return taken[-1]

    x = images(3, 3, 9, 11)
    module = {"cpu": cpu_backend, "torch": torch_backend}[each_backend]
    with mock.patch.object(module, "direct_channels", watch):
        assert_same_step(step(ours, x), step(naive, x))
    assert {type(channels) for channels in taken} == {WAYS[way]}
