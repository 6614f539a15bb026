"""Dropout's masks: a function of a key in a tensor, the same wherever they are made."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import effdense
from effdense.backends.cpu_backend import CpuBackend
from effdense.backends.dropout import draw_seed, dropout_mask, layer_keys, threshold
from effdense.backends.torch_backend import TorchBackend
from tests.helpers.compare import SMALL, assert_identical, images, step


def made(seed: int, layer: int, p: float, rows: int = 400, columns: int = 250) -> Tensor:
    out = torch.empty(rows, columns)
    dropout_mask(layer_keys(torch.tensor(seed), layer + 1)[layer], p, out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.0, 1e-18, 0.2, 0.5, 0.999, 1.0])
def test_backends_make_the_same_bits(p: float, dtype: torch.dtype) -> None:
    key = torch.tensor([-3_141_592_653_589_793_238])
    found = []
    for backend in (TorchBackend("cpu"), CpuBackend(dtype)):
        found.append(torch.full((1001, 13), float("nan"), dtype=dtype))
        backend.dropout_mask(key, p, found[-1])
    assert torch.equal(*found)
    if p < 1e-9 or p == 1:
        assert torch.equal(found[0], torch.full_like(found[0], float(p < 1)))


def test_pieces_make_the_mask_of_the_whole() -> None:
    whole, pieces = torch.empty(2, 77, 5).unbind()
    for out, elements in ((whole, 1000), (pieces, 7)):
        dropout_mask(torch.tensor([12]), 0.3, out, elements)
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_elements_are_kept_as_often_as_said_and_independently(p: float) -> None:
    mask = made(7, 3, p)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    kept = (mask > 0).double()
    others = {
        "the next channel": (kept[:, :-1], kept[:, 1:]),
        "the next position": (kept[:-1], kept[1:]),
        "the next layer": (kept, (made(7, 4, p) > 0).double()),
        "the next seed": (kept, (made(8, 3, p) > 0).double()),
    }
    for name, (one, other) in others.items():
        n = one.numel()
        # of n independent pairs' covariance the standard deviation is p (1 - p) / sqrt(n)
        covariance = ((one - (1 - p)) * (other - (1 - p))).mean().item()
        assert abs(covariance) < 4 * p * (1 - p) / math.sqrt(n), name
    deviation = math.sqrt(p * (1 - p) / kept.numel())
    assert abs(kept.mean().item() - (1 - p)) < 4 * deviation
    columns = kept.mean(0) - (1 - p)
    assert columns.abs().max().item() < 5 * math.sqrt(p * (1 - p) / len(kept))


def test_the_threshold_is_the_probability() -> None:
    assert (threshold(0.5), threshold(0.25), threshold(1.0)) == (0, 2**62, -(2**63))
    assert threshold(0.0) == 2**63 - 1


def test_layers_and_seeds_have_keys_of_their_own() -> None:
    keys = torch.cat([layer_keys(torch.tensor(seed), 50) for seed in range(50)])
    assert len(keys.unique()) == 2500
    assert torch.equal(layer_keys(torch.tensor(3), 7)[:4], layer_keys(torch.tensor(3), 4))


def network(save: Any, **options: Any) -> effdense.DenseNet:
    torch.manual_seed(0)
    return effdense.DenseNet(**SMALL | {"drop_rate": 0.4}, save=save, **options)


@pytest.mark.parametrize("save", ["features", "bottlenecks", "input"])
def test_no_generator_is_made_or_seeded_in_a_step(save: Any) -> None:
    model, x = network(save), images(2, 3, 8, 8, dtype=torch.float32)
    # checks of the backend come first
    model(x)
    forbidden = mock.Mock(side_effect=AssertionError("a generator"))
    with mock.patch("torch.Generator", forbidden), mock.patch("torch.manual_seed", forbidden):
        model(x).sum().backward()


def test_a_generator_that_is_put_back_gives_the_same_step() -> None:
    steps = []
    for save in ("features", "bottlenecks", "input"):
        model, x = network(save), images(4, 3, 9, 7, dtype=torch.float32)
        others = [network(save), network(save)]
        torch.manual_seed(5)
        state = torch.get_rng_state()
        first = step(model, x)
        moved = step(others[0], x)
        torch.set_rng_state(state)
        again = step(others[1], x)
        assert_identical(first, again)
        assert not torch.equal(first.output, moved.output)
        steps.append(first)
    assert_identical(steps[0], steps[1])
    assert_identical(steps[0], steps[2])


def test_a_seed_is_drawn_where_the_features_lie() -> None:
    torch.manual_seed(1)
    one = draw_seed(torch.device("cpu"))
    torch.manual_seed(1)
    assert torch.equal(one, torch.empty((), dtype=torch.int64).random_())
    assert draw_seed(torch.device("meta")).is_meta
