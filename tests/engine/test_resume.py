"""A run that goes on from a checkpoint ends with the bits of one that was never interrupted."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from effdense.engine.checkpoint import Position
from effdense.engine.data.order import global_batches
from effdense.engine.plots import read
from tests.helpers import meddlers
from tests.helpers.chaos import chaos
from tests.helpers.launch import flags
from tests.helpers.pictures import write_folder, write_shards
from tests.helpers.ranks import RUN, Ranks, final_state, wait_for

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("published", ["epoch-00001-step-0000006", "epoch-00001-tested"])
def test_killed_and_started_again(published: str, uninterrupted: Path, tmp_path: Path) -> None:
    with Ranks(tmp_path, RUN, 3) as ranks:
        wait_for(lambda: (tmp_path / "run" / "checkpoints" / published).exists())
        ranks.kill()
        assert set(ranks.wait()) == {-signal.SIGKILL}
    with Ranks(tmp_path, RUN, 3) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.said()
        assert "going on from epoch" in ranks.said()
    assert final_state(tmp_path / "run") == final_state(uninterrupted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
def test_killed_and_started_again_on_a_gpu(tmp_path: Path) -> None:
    run = [*RUN, "--device", "cuda", "--deterministic"]
    with Ranks(tmp_path, [*run, "--work-dir", "whole"]) as ranks:
        assert ranks.wait() == [0], ranks.said()
    with Ranks(tmp_path, run) as ranks:
        wait_for(lambda: (tmp_path / "run" / "checkpoints" / str(Position(1, 6))).exists())
        ranks.kill()
    with Ranks(tmp_path, run) as ranks:
        assert ranks.wait() == [0], ranks.said()
        assert "going on from epoch 1" in ranks.said()
    assert final_state(tmp_path / "run") == final_state(tmp_path / "whole")


def test_synchronised_norms_killed_and_started_again(tmp_path: Path) -> None:
    """Shares of 22, 21 and 21 images in parts of 3: two processes' last ones are empty."""
    run = [*RUN, "--sync-batch-norm", "--accumulate", 8, "--epochs", 1]
    with Ranks(tmp_path, [*run, "--work-dir", "whole"], 3) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.said()
    with Ranks(tmp_path, run, 3) as ranks:
        wait_for(lambda: (tmp_path / "run" / "checkpoints" / str(Position(1, 6))).exists())
        ranks.kill()
    with Ranks(tmp_path, run, 3) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.said()
        assert "going on from epoch 1" in ranks.said()
    state = final_state(tmp_path / "run")
    assert state == final_state(tmp_path / "whole")
    # the running statistics are those of all processes
    own: list[Any] = [value for name, value in state.items() if Path(name).name.startswith("rank-")]
    assert len(own) == 3
    assert own[0]["buffers"] == own[1]["buffers"] == own[2]["buffers"]
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["options"]["sync_batch_norm"] is True


def test_a_finished_run_is_left_as_it_is(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "model.pt").unlink()  # as if killed just before
    with Ranks(tmp_path, RUN, 3) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.said()
        assert "going on from the end of the training" in ranks.said()
    assert final_state(tmp_path / "run") == final_state(uninterrupted)


def test_mid_epoch_with_loader_processes_and_augmentation(tmp_path: Path) -> None:
    """Killed while it reads shards; the undisturbed run reads the same images from a folder."""
    write_folder(tmp_path / "folder", train=20, val=3)
    write_shards(tmp_path / "shards", tmp_path / "folder")
    options: dict[str, Any] = {
        "arch": "densenet_bc",
        "depth": 10,
        "growth_rate": 4,
        "image_size": 16,
        "epochs": 1,
        "batch_size": 4,
        "drop_rate": 0.2,
        "threads": 1,
        "num_workers": 1,
        "checkpoint_steps": 3,
    }
    whole = flags(**options, data="imagefolder", data_dir="folder", work_dir="whole")
    cut = flags(**options, data="webdataset", data_dir="shards", work_dir="cut")
    with Ranks(tmp_path, whole, 2) as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
    with Ranks(tmp_path, cut, 2) as ranks:
        wait_for(lambda: (tmp_path / "cut" / "checkpoints" / str(Position(1, 6))).exists())
        ranks.kill()
    # another number of loader processes makes no difference
    with Ranks(tmp_path, [*cut, "--num-workers", 2], 2) as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
    assert "going on from epoch 1 of 1, step 7" in ranks.said()
    assert final_state(tmp_path / "cut") == final_state(tmp_path / "whole")


def test_other_options_are_named(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    before = final_state(tmp_path / "run")
    with Ranks(tmp_path, [*RUN, "--lr", 0.3, "--optimizer", "adam"], 1) as ranks:
        assert ranks.wait() == [2]
    assert "with other options: --optimizer is adam, was sgd; --lr is 0.3, was 0.1" in ranks.said()
    assert final_state(tmp_path / "run") == before


def test_runs_that_recorded_the_options_old_names_go_on(
    uninterrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))
    file = tmp_path / "run" / "config.yaml"
    recorded = yaml.safe_load(file.read_text())
    options = recorded["options"]
    names = {"opt": "optimizer", "sync_bn": "sync_batch_norm", "memory_budget": "budget"}
    for old, new in names.items():
        options[old] = options.pop(new)
    assert options.pop("dtype") == "float32"
    options["amp"] = "none"
    file.write_text(yaml.safe_dump(recorded))
    with Ranks(tmp_path, [*RUN, "--dtype", "bfloat16"], 1) as ranks:
        assert ranks.wait() == [2]
    assert "with other options: --dtype is bfloat16, was float32 (config.yaml)" in ranks.said()
    with Ranks(tmp_path, RUN, 3) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.said()
    assert "going on from epoch 2 of 2" in ranks.said()
    assert final_state(tmp_path / "run") == final_state(uninterrupted)


def test_another_number_of_processes(tmp_path: Path) -> None:
    """The samples and their order stay; what is no longer bit-exact is said."""
    run = [*RUN, "--drop-rate", 0.0]
    at = Position(1, 6)
    with Ranks(tmp_path, run, 3) as ranks:
        wait_for(lambda: (tmp_path / "run" / "checkpoints" / str(at)).exists())
        ranks.kill()
    with Ranks(tmp_path, run, 2, meddle=meddlers.record_indices) as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
    said = ranks.said()
    assert "not bit-exact from here on: processes 3 -> 2. The samples and their order" in said
    asked = [torch.load(tmp_path / f"asked-{rank}.pt", weights_only=True) for rank in range(2)]
    for epoch, part in ((1, asked[0][0]), (2, asked[0][1])):
        batches = global_batches(640, 64, 0, epoch)[at.step if epoch == 1 else 0 :]
        other = asked[1][epoch - 1]
        together = [one + two for one, two in zip(part, other, strict=True)]
        assert together == [batch.tolist() for batch in batches]
    train = read(tmp_path / "run" / "train.csv")
    assert train["epoch"] == [1, 2]
    # the scores of the three that were cut off are counted
    assert 0 < train["error"][0] < 100


def test_chaos(tmp_path: Path) -> None:
    """A sample; ``make chaos`` kills fifty times."""
    kills, runs = chaos(tmp_path, kills=3, seed=1000)
    # kills that come after a run's end begin another
    assert len(kills) == 3
    assert runs >= 1
