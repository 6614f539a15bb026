"""The estimates' grid: what it spans, and some of it measured."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import estimates
import memory
import pareto
import pytest
import torch
from harness import results
from harness.grid import GRID, from_request

from effdense.memory.planning import Choice


def test_the_grid_spans_what_it_is_to_span():
    assert len(GRID) >= 40
    assert len({each.label() for each in GRID}) == len(GRID)
    assert {len(each.shape) - 2 for each in GRID} == {1, 2, 3}
    assert {each.dtype for each in GRID} == {"float32", "float64", "bfloat16"}
    assert "bfloat16" in {each.amp for each in GRID}
    saves = {each.save for each in GRID}
    assert {"naive", "all", "bottlenecks", "features", "input"} <= saves
    assert sum("+" in save for save in saves) >= 4
    assert len({each.family for each in GRID}) >= 12
    assert all(from_request(each.request()) == each for each in GRID)


# one of each kind, the quick ones
CHOSEN = ("float64", "3-D (4+6+4, k 16), bottlenecks", "1-D (4+6+4, k 16), features")


@pytest.mark.slow
@pytest.mark.parametrize("part", CHOSEN)
def test_predictions_hold(part):
    each = next(each for each in GRID if part in each.label())
    answer = estimates.measured(each, threads=1)
    assert "error" not in answer, answer["error"]
    assert estimates.within(each, each.predicted(), answer["live"], answer["peak"]), answer
    # 5 % and 4 MiB of these 26 to 130 would be noticed
    predicted = each.predicted()
    assert predicted.resident is not None
    other = predicted.resident + predicted.resident // 20 + (4 << 20)
    assert not estimates.within(each, predicted, answer["live"], other), answer


def test_the_plans_that_are_measured_beat_each_other():
    found = [
        Choice(("bottlenecks", "bottlenecks"), 50, 1.0),
        Choice(("features", "bottlenecks"), 55, 1.1),
        Choice(("bottlenecks", "features"), 40, 1.1),
        Choice(("features", "features"), 45, 1.2),
        Choice(("slabs", "slabs"), 42, 1.3),
        Choice(("input", "input"), 30, 1.5),
    ]
    assert pareto.chosen(found) == [
        "bottlenecks+bottlenecks",
        "bottlenecks+features",
        "input+input",
        "features+features",
        "slabs+slabs",
    ]


@pytest.mark.slow
def test_plans_are_measured_and_drawn(tmp_path, capsys):
    arguments = ["--depth", "22", "--growth-rate", "6", "--batch-size", "4", "--image-size", "8"]
    path = tmp_path / "pareto.csv"
    pareto.main([*arguments, "--steps", "1", "--threads", "1", "--output", str(path)])
    rows = results.read(path)
    assert len({row["provider"] for row in rows if row["metric"] == "predicted peak"}) == 64 + 1
    timed = {row["provider"] for row in rows if row["metric"] == "step time" and row["value"]}
    assert "naive" in timed
    assert len(timed) >= 4
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "naive" in capsys.readouterr().out


class _Began(Exception):
    pass


@pytest.fixture
def _threads_of_this_process() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads_of_this_process")
@pytest.mark.parametrize("module", [estimates, memory, pareto], ids=lambda module: module.__name__)
def test_predictions_are_of_as_many_threads_as_are_measured(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled loops' memory goes by threads, a simulation's of this process."""

    def begun(*arguments: Any) -> None:
        raise _Began

    monkeypatch.setattr(module, "Recorder", begun)
    threads = torch.get_num_threads() + 2
    with pytest.raises(_Began):
        module.run(module.Options(threads=threads))
    assert torch.get_num_threads() == threads
