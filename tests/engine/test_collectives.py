"""Failures within what the processes of a run do together: named, ended, gone on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import meddlers
from tests.helpers.ranks import RUN, Ranks, final_state

pytestmark = pytest.mark.slow


def errors(ranks: Ranks, world_size: int) -> list[str]:
    """Every line of an error that a rank has printed; none prints a traceback."""
    said = [ranks.said(rank) for rank in range(world_size)]
    assert not any("Traceback" in words for words in said), said
    return [line for words in said for line in words.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("failure", [meddlers.failing_collective, meddlers.broken_pipe])
def test_a_collective_that_fails_on_one_rank_ends_the_run_by_name(
    failure: Callable[[int], None], uninterrupted: Path, tmp_path: Path
) -> None:
    with Ranks(tmp_path, [*RUN, "--hang-timeout", 15], 3, meddle=failure) as ranks:
        statuses = ranks.wait()
        assert all(status == 1 for status in statuses), (statuses, ranks.said())
        found = errors(ranks, 3)
    assert any("lost the other processes in step 8 of epoch 1" in line for line in found), found
    with Ranks(tmp_path, RUN, 3) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.said()
        assert "going on from epoch" in ranks.said()
    assert final_state(tmp_path / "run") == final_state(uninterrupted)


def test_a_rank_that_comes_late_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    with Ranks(tmp_path, RUN, 3, meddle=meddlers.late) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.said()
    assert final_state(tmp_path / "run") == final_state(uninterrupted)


def test_the_disk_of_another_rank_fills_up(uninterrupted: Path, tmp_path: Path) -> None:
    """Rank 0 writes every share, so it is nobody else's disk that counts."""
    with Ranks(tmp_path, RUN, 3, meddle=meddlers.small_files_of_another) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.said()
    assert final_state(tmp_path / "run") == final_state(uninterrupted)
