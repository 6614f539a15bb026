"""What large volumes and large batches may take, by estimate, and small ones measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import counts, measure
from harness.case import Case

import effdense
from effdense import reference
from effdense.machine.measurement import in_fresh_process, measure_training
from effdense.memory.timeline import Training
from effdense.verification.comparison import near_prediction

MIB = 1 << 20


@pytest.mark.parametrize(("batch", "size", "most"), [(1, 256, 1024), (2, 128, 380), (1, 128, 290)])
def test_a_volume_fits(batch: int, size: int, most: int) -> None:
    """Of MONAI's DenseNet121(spatial_dims=3, in_channels=1, out_channels=2), converted."""
    with torch.device("meta"):
        model = effdense.densenet121(spatial_dims=3, in_channels=1, num_classes=2)
    assert effdense.estimate(model, (batch, 1, *[size] * 3)).needed <= most * MIB


def test_a_whole_ct_fits_a_gpu_with_slabs() -> None:
    case = Case("densenet121", 0, 0, 1, 512, "bfloat16", "cuda", 3)
    assert measure.estimated("effdense-slabs", case).needed <= 4096 * MIB


def test_a_large_batch_on_a_gpu_takes_a_fourth_more_than_its_floor() -> None:
    case = Case("densenet121", 0, 0, 256, 224, "float16", "cuda")
    assert measure.estimated("effdense-slabs", case).needed <= 1.25 * counts.floor(case).total


@pytest.mark.parametrize(
    ("case", "most"),
    [
        pytest.param(Case("densenet_bc", 1000, 12, 8, 32), 600, marks=pytest.mark.slow),
        (Case("densenet_bc", 250, 24, 32, 32), 430),
        (Case("densenet121", 0, 0, 16, 224), 235),
    ],
    ids=["1000", "250", "densenet121"],
)
def test_steps_in_backward_go_below_what_gradients_take(case: Case, most: int) -> None:
    found = measure.estimated("effdense-step-in-backward", case)
    assert found.needed <= most * MIB
    assert found.needed <= counts.floor(case).total * (0.8 if case.depth == 1000 else 1.18)


def _measured(save: effdense.Save, size: int) -> dict[str, Any]:
    """A training step of one volume, of a converted network."""

    def training(size: int) -> Training:
        torch.manual_seed(0)
        arguments: dict[str, Any] = {"block_config": (6, 2), "num_classes": 2}
        arguments |= {"spatial_dims": 3, "in_channels": 1, "num_init_features": 64}
        model = reference.DenseNet(growth_rate=32, **arguments)
        effdense.convert(model, save=save)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        return Training(model, optimizer, torch.randn(1, 1, *[size] * 3), None)

    found = measure_training(lambda: training(size), lambda: training(16).step())
    predicted = effdense.estimate(training(16).model, (1, 1, *[size] * 3)).needed
    return {"peak": found["peak"], "predicted": predicted}


@pytest.mark.slow
def test_volumes_take_no_more_than_is_predicted() -> None:
    """Up to a tenth less: room that the stem's pooling gets and does not touch."""
    peaks = {}
    for save in ("features", "slabs"):
        found = in_fresh_process(_measured, 1, save=save, size=96)
        assert "error" not in found, found["error"]
        peaks[save], predicted = found["peak"], found["predicted"]
        allowed = near_prediction(predicted, torch.float32)
        assert 0.85 * predicted - allowed <= peaks[save] <= predicted + allowed, (save, found)
    assert peaks["slabs"] < 0.9 * peaks["features"]
