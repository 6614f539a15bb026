"""Runs tests/kernels/interpreted in processes that import Triton as an interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from effdense.machine.environment import usable_cores

pytest.importorskip("triton")

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def run(file: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, str(HERE / "interpreted" / file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def started(
    request: pytest.FixtureRequest,
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Every file that is asked for, one a core at a time: each takes half a minute or so."""
    items: list[Any] = [
        item
        for item in request.session.items
        if item.path == Path(__file__) and hasattr(item, "callspec")
    ]
    with ThreadPoolExecutor(usable_cores()) as pool:
        yield {
            file: pool.submit(run, file)
            for file in dict.fromkeys(item.callspec.params["file"] for item in items)
        }


@pytest.mark.parametrize("file", sorted(p.name for p in (HERE / "interpreted").glob("test_*.py")))
def test_under_the_interpreter(
    file: str, started: dict[str, Future[subprocess.CompletedProcess[str]]]
) -> None:
    done = started[file].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


def test_named_without_the_interpreter_they_say_what_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / "interpreted" / "test_operations.py")],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4
    assert "need TRITON_INTERPRET=1" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
