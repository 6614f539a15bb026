"""The benchmark of `make train` and `make test`, with commands that do nothing."""

from __future__ import annotations

import csv

import installation
import pytest
from harness import results
from harness.kept import Kept
from tables import runs

from effdense.errors import UserError


@pytest.fixture
def commands(monkeypatch):
    """What was called; each call of make adds a kibibyte to the environment."""
    called = []

    def run(*command, cwd=None):
        called.append(command)
        if command[0] == "make":
            environment = cwd / ".venv"
            environment.mkdir(parents=True, exist_ok=True)
            (environment / str(len(called))).write_bytes(bytes(1024))

    monkeypatch.setattr(installation, "_run", run)
    return called


def test_each_step_is_timed_and_its_environment_weighed(commands, tmp_path):
    path = tmp_path / "installation.csv"
    installation.main(["--output", str(path)])
    assert [command[:2] for command in commands] == [
        ("git", "clone"),
        ("make", ".venv/.runs"),
        ("make", "train"),
        ("make", "install"),
    ]
    with path.open() as file:
        rows = list(csv.DictReader(file))
    sizes = [float(row["value"]) for row in rows if row["metric"] == "environment"]
    assert sizes == [1024, 2048, 3072]
    table = runs.installation(Kept(results.read(path)))
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:5]] == [
        "installed for training",
        "training",
        "installed for tests",
    ]


def test_a_command_that_fails_is_shown_with_its_words(tmp_path):
    with pytest.raises(
        UserError, match=r"make nothing-of-the-kind ended with status 2:[\s\S]*No rule"
    ):
        installation._run("make", "nothing-of-the-kind", cwd=tmp_path)
