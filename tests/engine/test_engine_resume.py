"""A run that goes on from a checkpoint ends with the bits of one that was never interrupted."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import flags
from ranks import Ranks, final_state, wait_for

SMALL: dict[str, Any] = {
    "data": "fake",
    "depth": 10,
    "growth_rate": 4,
    "image_size": 8,
    "epochs": 2,
    "drop_rate": 0.2,
    "augment": "standard",
    "threads": 1,
    "checkpoint_steps": 3,
    "work_dir": "run",
}
RUN = flags(**SMALL)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run of three processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with Ranks(folder, RUN, 3) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.said()
    return folder / "run"


@pytest.mark.parametrize("published", ["epoch-00001-step-0000006", "epoch-00002-step-0000000"])
def test_killed_and_started_again(published: str, uninterrupted: Path, tmp_path: Path) -> None:
    with Ranks(tmp_path, RUN, 3) as ranks:
        wait_for(lambda: (tmp_path / "run" / "checkpoints" / published).exists())
        ranks.kill()
        assert set(ranks.wait()) == {-signal.SIGKILL}
    with Ranks(tmp_path, RUN, 3) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.said()
        assert "going on from epoch" in ranks.said()
    assert final_state(tmp_path / "run") == final_state(uninterrupted)


def test_a_finished_run_is_left_as_it_is(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "model.pt").unlink()  # as if killed just before
    with Ranks(tmp_path, RUN, 3) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.said()
        assert "going on from the end of the training" in ranks.said()
    assert final_state(tmp_path / "run") == final_state(uninterrupted)
