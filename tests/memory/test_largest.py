"""The largest number that fits, and what is estimated on its way."""

from __future__ import annotations

import pytest
from torch import nn

import effdense
from effdense.memory.planning import largest


@pytest.mark.parametrize("most", [3, 4, 5, 6, 23, 48, 49])
def test_the_largest_that_fits_is_found_in_few_trials(most: int) -> None:
    tried: list[int] = []

    def fits(n: int) -> bool:
        tried.append(n)
        return n <= most

    assert largest(fits, 3) == most
    assert len(tried) <= 2 * most.bit_length()


def test_the_deepest_network_of_a_growth_rate_is_one_of_its_depths() -> None:
    needed = effdense.estimate(effdense.densenet_bc(22, 2), (2, 3, 8, 8)).needed
    assert effdense.deepest(2, 2, needed, image_size=8) == 22
    assert effdense.deepest(2, 2, needed - 1, image_size=8) == 16


def test_norms_without_weights_are_estimated() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 5, 3))
    model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    found = effdense.estimate(model, (4, 3, 12, 12))
    # what the norm and the second convolution keep, beside the images
    assert found.parts["features"] >= 2 * 4 * (4 * 8 * 10 * 10)
