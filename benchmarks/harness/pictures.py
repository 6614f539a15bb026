"""What the benchmarks' pictures share; each benchmark has its own ``draw``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from effdense.machine.environment import threads_in_words

from . import results
from .results import Row

# One colour per provider in every picture; Okabe and Ito's set, safe for the colour-blind.
_COLOURS = {
    "naive": "#000000",
    "naive-channels-last": "#666666",
    "torchvision": "#999999",
    "torchvision-memory-efficient": "#CC79A7",
    "checkpoint": "#D55E00",
    "compile": "#E69F00",
    "compile-channels-last": "#8C6D1F",
    "compile-budget": "#F0E442",
    "effdense-all": "#56B4E9",
    "effdense-bottlenecks": "#009E73",
    "effdense-features": "#0072B2",
    "effdense-slabs": "#882255",
    "effdense-input": "#56B4E9",
    "effdense-step-in-backward": "#332288",
}

# None of the providers': the floor belongs to nobody.
FLOOR_COLOUR = "#AA3377"

Draw = Callable[[Any, "list[Row]"], None]
"""Draws rows into a matplotlib figure; ValueError where there is nothing to draw."""


def picture(draw: Draw, paths: Sequence[Path], output: Path) -> None:
    """Draw the rows of results files.

    Raises:
        ValueError: where there is nothing to draw.
    """
    rows = [row for path in paths for row in results.read(path)]
    if not rows:
        raise ValueError(f"no rows in {', '.join(map(str, paths))}")
    if any(row["kind"] == "projection" for row in rows):
        raise ValueError("a projection is not drawn: it is no measurement")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(8, 4.5), layout="constrained")
    try:
        draw(figure, rows)
        # Where the figures come from, in the picture itself.
        figure.supxlabel(_origin(rows), fontsize=7, color="#666666")
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
    finally:
        plt.close(figure)


def _origin(rows: Sequence[Row]) -> str:
    row = rows[0]
    threads = " or ".join(sorted({row["threads"] for row in rows}))
    machine = row["gpu"] or f"{row['processor']}, {threads_in_words(threads)}"
    return (
        f"{machine}; torch {row['torch']}; effdense {row['effdense']} ({row['git_revision']}); "
        f"{row['date'][:10]}"
    )


def describe(row: Row, but: str = "") -> str:
    """The case in words, without the dimension that is on an axis."""
    parts = [row["arch"]]
    if row["arch"] == "densenet_bc":
        parts = ["DenseNet-BC"]
        parts += [] if but == "depth" else [f"depth {row['depth']}"]
        parts += [] if but == "growth_rate" else [f"k {row['growth_rate']}"]
    parts += [] if but == "batch_size" else [f"batch {row['batch_size']}"]
    size = "x".join([row["image_size"]] * int(row["spatial_dims"]))
    return ", ".join([*parts, size, row["dtype"]])


def colour(provider: str) -> str:
    return _COLOURS.get(provider.partition(":")[0], "#F0E442")


def plain_numbers(axis: Any) -> None:
    """Numbers as people write them on a logarithmic axis, at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())
