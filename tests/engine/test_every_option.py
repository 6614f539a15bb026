"""Every option: values that cannot be, made from its type, and any two options together.

A run with two options that is killed goes on and ends with the same bits: `make chaos` does all of
them on one process and on two; here are some.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from effdense.engine import training
from effdense.engine.options import TrainConfig
from effdense.errors import TrainingError, UserError
from tests.helpers import combinations


def test_every_pair_of_values_is_in_some_run() -> None:
    options = combinations.values()
    runs = combinations.pairwise(options)
    for a, b in itertools.combinations(options, 2):
        met = {(run[a], run[b]) for run in runs}
        assert met == set(itertools.product(options[a], options[b])), (a, b)
    assert len(runs) < 50


@pytest.mark.slow
@pytest.mark.parametrize(("number", "world_size"), [(3, 1), (11, 2)])
def test_a_killed_run_goes_on(number: int, world_size: int, tmp_path: Path) -> None:
    data = combinations.write_data(tmp_path / "data")
    run = combinations.runs(data)[number]
    assert "same bits" in combinations.goes_on(tmp_path, run, world_size, seed=number)


SMALL: dict[str, Any] = {"data": "fake", "depth": 10, "growth_rate": 4, "image_size": 8}
NAMES = [field.name for field in dataclasses.fields(TrainConfig)]
KINDS: dict[str, tuple[object, ...]] = {
    "of another type": ([3.5, "x"], "nonsense", object(), True),
    "negative": (-1, -0.5, (-1.0,), (-1.0, -2.0), (-1, -1, -1), "-1"),
    "zero": (0, 0.0, (0.0,), (0.0, 0.0), (0, 0, 0)),
    "huge": (2**70, 1e308, (1e308,), (0.0, 1e308), (1e308,) * 3, (2**70,) * 3, "x" * 5000),
    "empty": ("", (), ("",), Path()),
    "not a number": (math.nan, math.inf, (math.nan,), (math.nan, 1.0), (math.nan,) * 3, "nan"),
}
"""Values of every type that an option can have; those of other types are refused too."""


def refusal(work: Callable[[], object]) -> str:
    """What is said of options that cannot be, in one line; empty where it is done."""
    try:
        work()
    except UserError as error:
        said = str(error)
    else:
        return ""
    assert said
    assert "\n" not in said
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_cannot_be_is_refused_before_anything_is_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is taken on its own is taken together, and comes to the first step, or is refused there
    for what the data or the network say.
    """
    nothing = SimpleNamespace(best=None, tests=[])
    monkeypatch.setattr(training, "_train", lambda *given: nothing)
    monkeypatch.chdir(tmp_path)
    taken: dict[str, Any] = {}
    for name, value in itertools.product(NAMES, KINDS[kind]):
        said = refusal(TrainConfig(**{**SMALL, name: value}).resolved)
        assert not said or f"--{name.replace('_', '-')}" in said or name == "data", (value, said)
        if not said:
            taken[name] = value
    assert len(taken) < len(NAMES) / 2, "a type is refused nowhere"
    whole = {**SMALL, **taken, "work_dir": "run", "epochs": 1}
    while said := refusal(partial(training.train, TrainConfig(**whole))):
        (named,) = re.findall(r"--([a-z-]+)", said)[:1]
        assert named.replace("-", "_") in taken, (said, taken)
        del whole[named.replace("-", "_")]
        assert not list(tmp_path.iterdir()), said


def test_memory_that_nobody_has_is_said_in_words(tmp_path: Path) -> None:
    whole = {**SMALL, "work_dir": tmp_path / "run", "image_size": 65_536}
    with pytest.raises(TrainingError, match=r"out of memory .*reduce --batch-size or"):
        training.train(TrainConfig(**whole))
    assert not list(tmp_path.iterdir())
