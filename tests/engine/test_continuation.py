"""A run that has ended is gone on with; what may differ then, and what is said of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import effdense
from effdense.engine.options import TrainConfig
from effdense.engine.plots import read
from effdense.errors import UserError
from tests.helpers.launch import REPOSITORY
from tests.helpers.ranks import RUN, Ranks, final_state, wait_for

SMALL: dict[str, Any] = {"data": "fake", "depth": 10, "growth_rate": 4, "image_size": 8}


def train(work_dir: Path, **options: Any) -> None:
    effdense.train(
        TrainConfig(work_dir=work_dir, **{**SMALL, "epochs": 1, "threads": 1, **options})
    )


def test_more_epochs_after_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    train(path, schedule="cosine")
    train(path, schedule="cosine", epochs=3)
    said = capsys.readouterr().out
    assert "--epochs 1 -> 3: from here on the learning rate is that of a run of 3 epochs" in said
    assert "going on from epoch 2 of 3, step 1" in said
    curve = read(path / "train.csv", ["lr"])
    assert curve["epoch"] == [1, 2, 3]
    config = TrainConfig(**SMALL, schedule="cosine", epochs=3).resolved()
    assert curve["lr"][1:] == [config.lr_at((epoch + 0.9) / 3) for epoch in (1, 2)]
    recorded = yaml.safe_load((path / "config.yaml").read_text())
    assert recorded["options"]["epochs"] == 3
    (continued,) = recorded["continued"]
    assert continued["options"] == {"epochs": 3}
    with pytest.raises(UserError, match=r"--epochs must be at least 3, which the run in .* got 2"):
        train(path, schedule="cosine", epochs=2)
    with pytest.raises(UserError, match=r"with other options: --schedule is multistep"):
        train(path, epochs=4)


def test_what_rounds_differently_may_change_and_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run")
    train(tmp_path / "run", epochs=2, save="input", backend="torch", threads=2)
    said = capsys.readouterr().out
    assert "not bit-exact from here on: threads 1 -> 2, --backend auto -> torch, " in said
    assert "--save features -> input. The samples and their order are the same" in said


def test_a_run_goes_on_on_another_device(tmp_path: Path) -> None:
    """Begun on a GPU, where products were rounded to TF32."""
    train(tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    recorded = yaml.safe_load(file.read_text())
    assert recorded["tf32"] is False
    recorded["tf32"] = True
    recorded["processes"] |= {"device": "cuda: a GPU", "backend": "nccl"}
    file.write_text(yaml.safe_dump(recorded))
    train(tmp_path / "run", epochs=2, tf32="off")
    assert read(tmp_path / "run" / "train.csv", ["lr"])["epoch"] == [1, 2]


@pytest.mark.slow
def test_more_epochs_killed_and_started_again(uninterrupted: Path, tmp_path: Path) -> None:
    more = [*RUN, "--epochs", 3]
    for name in ("whole", "run"):
        shutil.copytree(uninterrupted, tmp_path / name)
    with Ranks(tmp_path, [*more, "--work-dir", "whole"], 3) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.said()
    with Ranks(tmp_path, more, 3) as ranks:
        at = tmp_path / "run" / "checkpoints" / "epoch-00003-step-0000003"
        wait_for(at.exists)
        ranks.kill()
    with Ranks(tmp_path, more, 3) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.said()
    assert "going on from epoch 3 of 3, step 4" in ranks.said()
    assert final_state(tmp_path / "run") == final_state(tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    """No --work-dir: the command that goes on must name the folder that was chosen."""
    command = [sys.executable, "-m", "effdense", "train", *map(str, RUN[: RUN.index("--work-dir")])]
    command += ["--epochs", "500"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    store = tmp_path / "runs" / "fake-1" / "checkpoints"
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        wait_for(lambda: list(store.glob("epoch-*")))
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read().decode()
        assert process.wait(240) == 75
    assert "stopping after this step, with a checkpoint; Ctrl-C again: at once" in said
    last = said.splitlines()[-1]
    assert last.startswith("stopped by SIGINT before step ")
    goes_on = last.partition("this goes on from there: ")[2]
    assert goes_on.startswith("effdense train --data fake ")
    assert goes_on.endswith("--epochs 500 --work-dir runs/fake-1")
