"""Memory of one training step, each measurement in a fresh process."""

from __future__ import annotations

import functools
import math

import pytest

from tests.helpers.measure_memory import measure

pytestmark = pytest.mark.slow


@functools.cache
def _measured(depth: int, batch: int, save: str | None) -> dict[str, int]:
    model = "naive" if save is None else "effdense"
    return measure(model=model, save=save, depth=depth, growth_rate=12, batch=batch)


def _growth_exponent(save: str | None) -> float:
    """Of activations' memory with the number of layers, from depth 100 to 250."""
    shallow, deep = (_measured(depth, 8, save) for depth in (100, 250))
    activations = [m["peak"] - m["state"] for m in (shallow, deep)]
    return math.log(activations[1] / activations[0]) / math.log(246 / 96)


def test_features_take_at_most_a_fifth_of_the_naive_networks_memory() -> None:
    assert _measured(100, 64, "features")["peak"] <= _measured(100, 64, None)["peak"] / 5


def test_memory_grows_linearly_with_depth_where_the_naive_networks_grows_quadratically() -> None:
    assert _growth_exponent("features") <= 1.2
    assert _growth_exponent(None) > 1.6


def test_less_is_kept_from_mode_to_mode() -> None:
    modes = ("input", "features", "bottlenecks", "all")
    saved = [_measured(100, 8, save)["saved"] for save in modes]
    assert saved == sorted(saved)
    # The first block's features and their gradient are the peak of "input" and "features".
    peaks = [_measured(100, 8, save)["peak"] for save in modes[1:]]
    assert peaks == sorted(peaks)


@pytest.mark.parametrize("save", ["features", "bottlenecks"])
def test_saved_tensors_are_the_features_and_the_kept_bottlenecks(save: str) -> None:
    growth, batch, layers = 12, 8, 16
    width, size, expected = 2 * growth, 32, 0
    for _ in range(3):
        positions = batch * size * size
        kept = layers * (4 * growth) if save == "bottlenecks" else 0
        expected += 4 * positions * (width + layers * growth + kept)
        width, size = (width + layers * growth) // 2, size // 2
    # besides: the images, statistics, the classifier's input
    assert expected <= _measured(100, batch, save)["saved"] <= 1.03 * expected


def test_an_imagenet_networks_step_takes_hardly_more_than_its_floor() -> None:
    job = {"depth": 121, "growth_rate": 32, "batch": 16, "size": 224}
    found = measure(model="densenet121", save="features", **job)
    # the first convolution's output, the first block's features and their gradient buffer
    images = 16 * 4
    activations = images * (112 * 112 * 64 + 2 * 56 * 56 * 256)
    assert found["peak"] <= 1.15 * (activations + found["state"])


@functools.cache
def _other(model: str, depth: int, **job: bool) -> int:
    """Peak of a naive or converted network without parameters, gradients and momentum."""
    found = measure(model=model, save=None, depth=depth, growth_rate=12, batch=8, **job)
    return found["peak"] - found["state"]


def test_a_converted_network_takes_hardly_more_than_ours() -> None:
    ours = _measured(100, 8, "features")
    # its last norm and pooling are called by a model that we don't know
    assert _other("converted", 100) <= 1.25 * (ours["peak"] - ours["state"])


def test_inference_of_a_converted_network_takes_no_more_than_the_originals() -> None:
    assert _other("converted", 100, eval=True) <= _other("naive", 100, eval=True)


def test_recomputed_layers_take_linear_memory() -> None:
    shallow, deep = (_other("converted", depth, group_norm=True) for depth in (22, 64))
    assert math.log(deep / shallow) / math.log(60 / 18) <= 1.2
    assert deep <= _other("naive", 64, group_norm=True) / 3
