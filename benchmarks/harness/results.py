"""Results: a CSV that grows row by row, and what their rows hold."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

from effdense.machine.environment import environment

from .case import Case
from .grid import Configuration

Kind = Literal["measured", "formula", "projection"]
Row = dict[str, str]

RESULT_COLUMNS = (
    "benchmark",
    "kind",
    "provider",
    "arch",
    "depth",
    "growth_rate",
    "batch_size",
    "image_size",
    "spatial_dims",
    "dtype",
    "device",
    "processes",
    "steps",
    "metric",
    "unit",
    "sample",
    "statistic",
    "value",
    "status",
    "detail",
)
ENVIRONMENT_COLUMNS = (
    "processor",
    "cores",
    "threads",
    "memory_bytes",
    "gpu",
    "os",
    "python",
    "torch",
    "torchvision",
    "triton",
    "effdense",
    "cuda",
    "git_revision",
    "command",
    "date",
)


class Recorder:
    """A CSV file with one row per sample, each on disk as soon as it is known.

    ``kind`` says where a value comes from: measured here, by a formula, or a projection
    onto hardware that isn't here. ``statistic`` is empty for one sample's value, else the
    quantile of samples that are not in the file, such as 0.5.
    """

    def __init__(self, path: Path, benchmark: str, device: str, threads: int) -> None:
        self.path, self._benchmark = path, benchmark
        self.environment = environment(device, threads)

    def __enter__(self) -> Recorder:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w", newline="")
        self._writer = csv.DictWriter(
            self._file, [*RESULT_COLUMNS, *ENVIRONMENT_COLUMNS], lineterminator="\n"
        )
        self._writer.writeheader()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is KeyboardInterrupt:
            print(f"\nthe rows so far are in {self.path}", file=sys.stderr)

    def add(
        self,
        provider: str,
        case: Case | Configuration,
        metric: str,
        value: float | None,
        unit: str,
        *,
        kind: Kind = "measured",
        sample: int = 0,
        steps: int = 1,
        processes: int = 1,
        status: str | None = None,
        detail: str = "",
    ) -> None:
        self._writer.writerow(
            self.environment
            | case.columns()
            | {
                "benchmark": self._benchmark,
                "kind": kind,
                "provider": provider,
                "processes": processes,
                "steps": steps,
                "metric": metric,
                "unit": unit,
                "sample": sample,
                "statistic": "",
                "value": "" if value is None else value,
                "status": status or ("measured" if kind == "measured" else ""),
                "detail": detail,
            }
        )
        self._file.flush()


def read(path: Path) -> list[Row]:
    """The rows of a results file.

    Raises:
        ValueError: for a file that no benchmark wrote.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = {*RESULT_COLUMNS, *ENVIRONMENT_COLUMNS} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} is no benchmark's result: no column {sorted(missing)[0]!r}")
        return list(reader)


def mebibytes(nbytes: float | None) -> str:
    return "" if nbytes is None else f"{nbytes / 2**20:,.0f}"


def spread(values: Sequence[float], digits: int) -> str:
    """Such as "1.23 [1.20, 1.31]": the median and the quantiles around it."""
    low, middle, high = (f"{value:.{digits}f}" for value in quantiles(values))
    return f"{middle} [{low}, {high}]"


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20 %, 50 % and 80 % quantiles, interpolated.

    Raises:
        ValueError: without any value.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)

    def at(fraction: float) -> float:
        place = fraction * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return at(0.2), at(0.5), at(0.8)
