"""A plan that runs out of memory is made again, once; the error is injected."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import effdense
from effdense.engine import rehearsal, training
from effdense.engine.distributed import World, joined_world
from effdense.engine.options import TrainConfig
from effdense.engine.training import train
from effdense.errors import UserError
from effdense.machine.sizes import show_size
from effdense.memory.planning import choices

pytestmark = pytest.mark.slow

NETWORK: dict[str, Any] = {"data": "fake", "depth": 22, "growth_rate": 12, "image_size": 32}
OPTIONS: dict[str, Any] = {**NETWORK, "epochs": 1, "batch_size": 32, "device": "cpu"}


@pytest.fixture
def alone() -> Iterator[World]:
    with joined_world("cpu", threads=1) as world:
        yield world


def out_of_memory_above(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU of ``limit`` bytes: a step that is predicted to need more fails."""
    real = rehearsal.take_step

    def take_step(network: Any, shape: Any, config: Any, world: Any) -> None:
        if effdense.estimate(network, shape).peak > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        real(network, shape, config, world)

    monkeypatch.setattr(rehearsal, "take_step", take_step)
    monkeypatch.setattr(rehearsal, "allocated_peak", lambda device: limit)
    monkeypatch.setattr(training, "REHEARSED", ("cpu",))


def test_a_plan_is_made_again_for_what_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = [each.peak for each in choices(effdense.densenet_bc(22, 12), (32, 3, 32, 32))]
    limit = (min(peaks) + max(peaks)) // 2
    out_of_memory_above(limit, monkeypatch)
    train(TrainConfig(**OPTIONS, budget="2GiB", work_dir=tmp_path / "run"))
    said = capsys.readouterr().out
    assert said.count("of a budget of 2.00 GiB") == 1
    assert f"ran out of memory after {show_size(limit)}; planned again" in said
    assert f"of a budget of {show_size(limit)}" in said
    assert (tmp_path / "run" / "model.pt").exists()


def test_a_plan_that_holds_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = []
    for name, rehearsed in (("without", ()), ("with", ("cpu",))):
        monkeypatch.setattr(training, "REHEARSED", rehearsed)
        options = {**OPTIONS, "depth": 10, "image_size": 8, "drop_rate": 0.2}
        train(TrainConfig(**options, budget="2GiB", work_dir=tmp_path / name))
        weights.append(torch.load(tmp_path / name / "model.pt", weights_only=True))
    assert "planned again" not in capsys.readouterr().out
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_second_failure_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "REHEARSED", ("cpu",))
    monkeypatch.setattr(rehearsal, "allocated_peak", lambda device: 60 << 20)
    attempts = []

    def fail(*arguments: Any) -> None:
        attempts.append(arguments)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rehearsal, "take_step", fail)
    with pytest.raises(UserError, match=r"out of memory again.* 60 MiB .*--batch-size"):
        train(TrainConfig(**OPTIONS, budget="2GiB", work_dir=tmp_path / "run"))
    assert len(attempts) == 2


def test_nothing_fits_what_there_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_above(5 << 20, monkeypatch)
    with pytest.raises(UserError, match="no choice of save modes fits a budget of 5 MiB"):
        train(TrainConfig(**OPTIONS, budget="2GiB", work_dir=tmp_path / "run"))


def test_a_rehearsal_leaves_no_trace(alone: World) -> None:
    network = effdense.densenet_bc(22, 12, drop_rate=0.2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    rehearsal.take_step(network, (8, 3, 32, 32), TrainConfig(**OPTIONS).resolved(), alone)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_offloading_is_an_option_of_a_run(tmp_path: Path) -> None:
    weights = []
    for offload in (False, True):
        options = {**OPTIONS, "depth": 10, "batch_size": 64, "save": "all", "offload": offload}
        train(TrainConfig(**options, work_dir=tmp_path / str(offload)))
        weights.append(torch.load(tmp_path / str(offload) / "model.pt", weights_only=True))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
