"""What of a network learns by --freeze, what its average follows, what is said of a run's data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import effdense
from effdense.engine import training
from effdense.engine.average import MovingAverage
from effdense.engine.freezing import freeze, set_training
from effdense.engine.options import TrainConfig


@pytest.mark.parametrize("count", [1, 2, 3])
def test_blocks_are_frozen_with_all_before_the_next(count: int) -> None:
    network: Any = effdense.densenet_bc(10, 2)
    config = TrainConfig(data="fake", freeze=str(count)).resolved()
    said = freeze(network, config)
    frozen = {name.split(".")[1] for name, p in network.named_parameters() if not p.requires_grad}
    learns = {name.split(".")[1] for name, p in network.named_parameters() if p.requires_grad}
    parts = ["conv0", "denseblock1", "transition1", "denseblock2", "transition2", "denseblock3"]
    assert frozen == set(parts[: 2 * count + 1])
    assert learns == {*parts[2 * count + 1 :], "norm5", "weight", "bias"}
    total = sum(p.numel() for p in network.parameters())
    left = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert said == f"{left:,} of {total:,} parameters learn"
    set_training(network, config)
    assert not network.features.denseblock1.denselayer1.norm1.training
    assert network.features.norm5.training


def test_norms_without_weights_are_frozen_too() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4, affine=False))
    for freeze_norms in (True, False):
        config = TrainConfig(data="fake", freeze_norms=freeze_norms).resolved()
        freeze(network, config)
        set_training(network, config)
        assert [module.training for module in network] == [True, not freeze_norms]


def test_the_average_becomes_the_network_and_then_follows_it() -> None:
    network = effdense.densenet_bc(10, 2).double()
    average, decay = MovingAverage(network, 0.75), 0.75
    expected: dict[str, torch.Tensor] = {}
    for number in range(3):
        for value in network.state_dict().values():
            value.add_(number + 1)
        average.update_parameters(network)
        for name, value in network.state_dict().items():
            if not number or not value.is_floating_point():
                expected[name] = value.clone()
            else:
                expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_what_is_odd_about_the_data_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = training.load
    monkeypatch.setattr(
        training,
        "load",
        lambda *given, **options: dataclasses.replace(load(*given, **options), notes=("odd: x",)),
    )
    small: dict[str, Any] = {"data": "fake", "depth": 10, "growth_rate": 2, "image_size": 8}
    training.train(TrainConfig(**small, epochs=1, threads=1, work_dir=tmp_path / "run"))
    assert "odd: x" in capsys.readouterr().out.splitlines()
