"""Any two options together: a run that is killed goes on and ends with the same bits.

`make chaos` does all of them on one process and on two; here are some.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

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
