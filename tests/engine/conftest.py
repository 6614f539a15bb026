from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from effdense.engine.distributed import World, joined_world
from tests.helpers.launch import REPOSITORY, Launch
from tests.helpers.ranks import RUN, Ranks


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Run a script in N processes under torchrun (0: without it), in a folder of the test's."""

    def launch(
        processes: int, script: Path, *arguments: object, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        launcher = [*torchrun, str(processes)] if processes else []
        # the tests' own scripts import each other, as a user's does not
        own = {"PYTHONPATH": str(REPOSITORY)} if script.parent != REPOSITORY else {}
        return subprocess.run(
            [sys.executable, *launcher, str(script), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=tmp_path,
            env={**os.environ, **own, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )

    return launch


@pytest.fixture
def alone() -> Iterator[World]:
    """This process, without others."""
    with joined_world("cpu", threads=1) as world:
        yield world


def _uninterrupted(folder: Path, world_size: int) -> Path:
    with Ranks(folder, RUN, world_size) as ranks:
        assert ranks.wait() == [0] * world_size, ranks.said()
    return folder / "run"


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run of three processes that nothing happened to."""
    return _uninterrupted(tmp_path_factory.mktemp("uninterrupted"), 3)


@pytest.fixture(scope="session")
def uninterrupted_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run of one process that nothing happened to."""
    return _uninterrupted(tmp_path_factory.mktemp("uninterrupted-alone"), 1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Runs inside the test process set the number of threads; small ones are faster with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
