"""Which epoch of a run is the best, and when there is no hope for a better one.

Both follow from the rows of the CSV files, which a run that goes on has back as they were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .records import number, rows
from .scores import METRICS, Score


class Standings:
    """The tests so far, the same on every process.

    Args:
        metric: of :data:`.scores.METRICS`.
        texts: the CSV files as they stand, by name.
    """

    def __init__(self, metric: str, texts: Mapping[str, str]) -> None:
        self.metric = metric
        self.tests: dict[int, Score] = {}
        """By epoch; of those before this process began no more than test.csv says."""
        self._badness: dict[int, float] = {}
        others = {row["epoch"]: row for row in rows(texts.get("scores.csv", ""))}
        for row in rows(texts.get("test.csv", "")):
            found = row if metric in row else others.get(row["epoch"], {})
            value = number(found.get(metric, ""))
            loss, error = number(row["loss"]), number(row["error"])
            score = Score(loss, error, int(row["samples"]))
            self.add(int(row["epoch"]), score, value)

    def add(self, epoch: int, test: Score, value: float | None = None) -> float:
        """Another test; returns how bad it is, less being better."""
        if value is None:
            value = test.value(self.metric)
        self.tests[epoch] = test
        self._badness[epoch] = badness = _badness(self.metric, value)
        return badness

    @property
    def best(self) -> int:
        """The best epoch; of several as good the first."""
        return min(self._badness, key=lambda epoch: (self._badness[epoch], epoch))

    def is_over(self, patience: int) -> bool:
        """Whether so many epochs have brought nothing better; 0 is endless patience."""
        return bool(patience and self.tests) and max(self.tests) - self.best >= patience


def _badness(metric: str, value: float) -> float:
    if math.isnan(value):
        return math.inf
    return -value if METRICS[metric] else value
