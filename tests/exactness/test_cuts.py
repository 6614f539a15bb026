"""save="slabs": bottlenecks and their gradients a slab at a time."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import effdense
from effdense import reference
from effdense.backends.torch_backend import TorchBackend
from effdense.backends.triton_backend import TritonBackend
from effdense.block import cuts, dense_block
from tests.helpers.compare import (
    assert_same_step,
    images,
    norms_of,
    shared_masks,
    step,
    twins,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.fixture
def slabs(monkeypatch: pytest.MonkeyPatch) -> list[list[cuts.Cut]]:
    """The cuts of each layer's backward, of steps as small as the networks here."""
    made: list[list[cuts.Cut]] = []
    cut = cuts.cuts

    def noted(shape: tuple[int, ...], lines: int) -> list[cuts.Cut]:
        made.append(list(cut(shape, lines)))
        return made[-1]

    for backend in (TorchBackend, TritonBackend):
        monkeypatch.setattr(
            backend, "images_per_step", lambda _, n, nbytes: max(1, min(n, 20_000 // nbytes))
        )
    monkeypatch.setattr(cuts, "_LEAST_LINES", 3)
    monkeypatch.setattr(dense_block, "cuts", noted)
    return made


@pytest.mark.parametrize("shape", [(3, 10, 7), (2, 3), (4, 5, 6, 7), (1, 9), (7, 1, 1)], ids=str)
@pytest.mark.parametrize("step", [1, 3, 4, 9, 11, 20, 1000])
def test_every_row_is_in_one_slab_with_its_neighbours(shape: tuple[int, ...], step: int) -> None:
    rows = torch.arange(math.prod(shape))
    per_line = math.prod(shape[2:])
    lines = rows // per_line % shape[1]
    of_images = rows // (per_line * shape[1])
    seen = []
    for slab in cuts.cuts(shape, step):
        own, around = rows[slab.own], rows[slab.around]
        assert torch.equal(around[slab.inside], own)
        assert len(around) == slab.rows == math.prod(slab.shape)
        same = (of_images >= of_images[own].min()) & (of_images <= of_images[own].max())
        near = (lines >= lines[own].min() - 1) & (lines <= lines[own].max() + 1)
        assert torch.equal(around, rows[same & near])
        seen.append(own)
    assert torch.equal(torch.cat(seen), rows)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"spatial_dims": 1}, (2, 3, 83)),
        ({"block_config": (3, 2)}, (3, 3, 17, 13)),
        ({"small_inputs": False}, (5, 3, 61, 45)),
        ({"spatial_dims": 3}, (2, 3, 11, 5, 7)),
        ({"spatial_dims": 3, "small_inputs": False}, (1, 3, 45, 21, 29)),
        ({"drop_rate": 0.3, "block_config": (2, 1, 3)}, (2, 3, 29, 13)),
    ],
    ids=["1-D", "2-D", "stem", "3-D", "3-D, stem", "dropout"],
)
def test_slabs_equal_the_naive_network(
    options: dict[str, Any],
    shape: tuple[int, ...],
    backend: str,
    slabs: list[list[cuts.Cut]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EFFDENSE_BACKEND", backend)
    ours, naive = twins("slabs", **options)
    with shared_masks(7, options.get("block_config", (2, 2))):
        assert_same_step(step(ours, images(*shape)), step(naive, images(*shape)))
    assert max(map(len, slabs)) > 2
    # the first block's are parts of images, the last of unequal size
    assert any(slab.own != slab.around for slab in slabs[-1])
    assert len({slab.rows for slab in slabs[-1]}) > 1


def test_frozen_norms_and_parameters(slabs: list[list[cuts.Cut]]) -> None:
    def freeze(model: nn.Module) -> None:
        norms_of(model)[2].eval()
        for name, parameter in model.named_parameters():
            if "denselayer2.conv" in name or "denselayer1.norm2" in name:
                parameter.requires_grad_(False)

    ours, naive = twins("slabs", prepare=freeze)
    assert_same_step(step(ours, images(2, 3, 15, 13)), step(naive, images(2, 3, 15, 13)))
    assert max(map(len, slabs)) > 2


def test_what_fits_one_slab_is_not_cut() -> None:
    """It is "features" then, bit for bit."""
    steps = [step(twins(save)[0], images(2, 3, 9, 7)) for save in ("slabs", "features")]
    assert torch.equal(steps[0].output, steps[1].output)
    for name, gradient in steps[0].gradients.items():
        assert gradient is not None
        assert torch.equal(gradient, steps[1].gradients[name]), name  # type: ignore[arg-type]


def test_a_block_called_alone(slabs: list[list[cuts.Cut]]) -> None:
    layers = reference.dense_layers(3, 6, 4, 4, 0.0)
    ours = effdense.DenseBlock(copy.deepcopy(layers)).double()
    naive = reference.DenseBlock(layers).double()
    ours.load_state_dict(naive.state_dict())
    ours.save = "slabs"
    assert_same_step(step(ours, images(2, 6, 21, 11)), step(naive, images(2, 6, 21, 11)))
    assert max(map(len, slabs)) > 2


def test_neither_bottleneck_nor_its_gradient_exists_as_a_whole() -> None:
    """Of one that is wide: the peak is forward's then, with one of them."""
    model = effdense.DenseNet(4, (2,), 8, 32, small_inputs=True)
    shape = (16, 3, 64, 64)
    wide = 16 * 64 * 64 * 128 * 4
    peaks = {}
    for save in ("features", "slabs"):
        model.save = save
        peaks[save] = effdense.estimate(model, shape).peak
    assert wide < peaks["features"] - peaks["slabs"] < 2 * wide


@pytest.mark.parametrize("dims", [2, 3])
def test_a_plan_takes_slabs_where_nothing_else_fits(dims: int) -> None:
    with torch.device("meta"):
        model = effdense.densenet121(spatial_dims=dims)
    shape = (32, 3, 224, 224) if dims == 2 else (1, 3, 192, 192, 192)
    peaks = {}
    for save in ("features", "input", "slabs"):
        model.save = save
        peaks[save] = effdense.estimate(model, shape).peak
    assert peaks["slabs"] < 0.9 * min(peaks["features"], peaks["input"])
    plan = effdense.plan(model, shape, int(1.01 * peaks["slabs"]))
    assert plan.save[0] == "slabs"
    assert plan.slowdown > 1
