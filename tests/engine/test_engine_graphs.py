"""--cuda-graphs: a run by replays is the run without them, whatever else it is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import effdense
from effdense.engine import trainer as trainers
from effdense.engine.distributed import data_parallel, joined_world
from effdense.engine.freezing import freeze, set_training
from effdense.engine.options import TrainConfig
from effdense.engine.plots import read
from effdense.engine.tasks import Classification
from effdense.engine.trainer import Trainer
from effdense.engine.training import train
from effdense.errors import UserError
from tests.helpers.ranks import by_ranks
from tests.helpers.replayed_training import RUNS
from tests.helpers.replaying import ReplayingDevice, replaying


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[ReplayingDevice]:
    """A CPU that has graphs."""
    monkeypatch.setenv("EFFDENSE_BACKEND", "torch")
    monkeypatch.setattr(trainers, "CAPTURED", ("cpu",))
    with replaying() as device:
        yield device


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ema": {"ema": 0.75},
    "clipping": {"clip_grad": 0.01},
    "accumulation": {"accumulate": 2},
    "uneven accumulation": {"accumulate": 3, "batch_size": 8},
    "loss scaling": {"dtype": "float16"},
    "autocast": {"dtype": "bfloat16", "drop_rate": 0.2},
    "label smoothing": {"label_smoothing": 0.2},
    "steps left out": {"non_finite": "skip"},
    "channels last": {"channels_last": True, "optimizer": "adamw", "lr": 0.01},
    "deterministic": {"deterministic": True},
    "norms that do not learn": {"freeze_norms": True},
    "a block that does not learn": {"freeze": "1"},
}


def steps(graphs: Any, **options: Any) -> list[torch.Tensor]:
    """All that three steps leave behind, whose rate falls."""
    torch.manual_seed(0)
    options = {"batch_size": 6, **options}
    drop_rate = options.get("drop_rate", 0.0)
    network = effdense.densenet_bc(depth=10, growth_rate=4, num_classes=5, drop_rate=drop_rate)
    config = TrainConfig(
        data="fake", image_size=8, threads=1, cuda_graphs=graphs, **options
    ).resolved()
    freeze(network, config)
    with joined_world("cpu", threads=1) as world:
        trainer = Trainer(network, config, world, Classification(tuple("abcde")))
        said = trainer.capture((3, 8, 8))
        assert (said is None) == (graphs == "off")
        set_training(network, config)
        found = []
        torch.manual_seed(5)
        size = config.batch_size
        for step in range(3):
            images, labels = torch.randn(size, 3, 8, 8), torch.randint(5, (size,))
            if step == 1 and config.non_finite == "skip":
                images[0] = float("nan")
            loss, logits, held = trainer.step(images, labels, size, lr=0.1 / (step + 1))
            left_out = step == 1 and config.non_finite == "skip"
            assert held is None or bool(held) is not left_out
            found += [] if left_out else [loss, logits]
        found += [t.detach().clone() for t in network.state_dict().values()]
        found += [t.clone() for t in trainer.tested.state_dict().values()]
    return found


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_are_those_without_graphs(options: dict[str, Any], device: ReplayingDevice) -> None:
    expected = steps("off", **options)
    assert not device.recordings
    actual = steps("auto", **options)
    # beside the check of what was recorded
    parts = 3 * options.get("accumulate", 1)
    if "batch_size" not in options:  # whose last part is smaller
        assert device.replays == (parts + 1) * len(device.recordings)
    assert device.replays > len(device.recordings)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_steps_of_processes_whose_norms_synchronise(tmp_path: Path) -> None:
    found = by_ranks("trained_by_replays", 2, tmp_path)
    assert found.keys() == RUNS.keys()
    for name, run in RUNS.items():
        for equal, stages, replays in found[name].tolist():
            assert equal, name
            assert stages == 3, name
            assert replays == 2 * stages * run.replayed, name


@pytest.mark.slow
def test_a_run_is_the_run_without_graphs(
    device: ReplayingDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrapped(model: Any, world: Any) -> Any:
        # what it would hold is of another stream than a capture's
        when.append(len(device.recordings))
        return data_parallel(model, world)

    monkeypatch.setattr(trainers, "data_parallel", wrapped)
    when: list[int] = []
    scores = []
    choices: tuple[Any, ...] = ("off", "on")
    for graphs in choices:
        folder = tmp_path / graphs
        train(
            TrainConfig(
                data="fake",
                depth=10,
                growth_rate=4,
                image_size=8,
                batch_size=50,
                epochs=2,
                drop_rate=0.2,
                ema=0.5,
                threads=1,
                work_dir=folder,
                cuda_graphs=graphs,
            )
        )
        scores.append([read(folder / name) for name in ("train.csv", "test.csv")])
    assert scores[0] == scores[1]
    assert when == [0, len(device.recordings)]
    assert "3 stages by CUDA graphs" in (tmp_path / "on" / "config.yaml").read_text()
    assert "CUDA graphs" not in (tmp_path / "off" / "config.yaml").read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"cuda_graphs": "off"},
        {"compile": True},
        {"offload": True},
        {"sync_batch_norm": True},
        {"step_in_backward": True},
    ],
)
def test_where_they_are_not_wanted(options: dict[str, Any], device: ReplayingDevice) -> None:
    config = TrainConfig(data="fake", threads=1, **options).resolved()
    with joined_world("cpu", threads=1) as world:
        assert not trainers.wants_graphs(config, world)


def test_what_cannot_be_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(data="fake", threads=1, cuda_graphs="on").resolved()
    with joined_world("cpu", threads=1) as world:
        with pytest.raises(UserError, match="--cuda-graphs on needs a GPU, this run is on cpu"):
            trainers.wants_graphs(config, world)
        config = TrainConfig(data="fake", threads=1, cuda_graphs="on", compile=True).resolved()
        monkeypatch.setattr(trainers, "CAPTURED", ("cpu",))
        with pytest.raises(UserError, match="does not go with --compile"):
            trainers.wants_graphs(config, world)
