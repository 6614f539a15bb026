"""Whole training runs, and what they take and hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from harness import counts
from harness.case import Case
from harness.kept import Kept, source_of
from harness.results import Row
from installation import STEPS

from effdense.machine.tables import table

from .parts import NAMES, with_sources

# what `make soak` says of each quantity
SOAKED = ("mean", "least", "most", "slope", "error")


def convergence(kept: Kept) -> str:
    """Test errors at the end of whole training runs, and how far the weights are apart."""
    run = kept.of("convergence", "test error").newest(provider="naive")[0]["git_revision"]
    cells, sources = [], []

    def last(metric: str, name: str, dtype: str) -> list[Row]:
        rows = kept.of("convergence", metric, dtype=dtype).newest(provider=name, git_revision=run)
        sources.extend(rows)
        steps = max((int(row["steps"]) for row in rows), default=0)
        return [row for row in rows if int(row["steps"]) == steps]

    naive = {row["sample"]: float(row["value"]) for row in last("test error", "naive", "float32")}
    for name in ("naive", "naive-channels-last", "effdense-features"):
        errors = last("test error", name, "float32")
        gaps = last("test error minus naive's", name, "float32") or [
            row | {"value": str(float(row["value"]) - naive[row["sample"]])}
            for row in errors
            if not row["statistic"] and name != "naive"
        ]
        weights = [float(row["value"]) for row in last("weight difference", name, "float64")]
        largest = f"{max(weights):.1e}" if weights and name != "naive" else ""
        cells.append([NAMES[name], _mean(errors), _mean(gaps), largest])
    header = ["at the end of a run; mean ± standard deviation over the seeds", "test error, %"]
    header += ["minus naive's, by seed", "distance of weights in float64, largest"]
    return with_sources(header, cells, sources)


def _mean(rows: Sequence[Row]) -> str:
    """Mean and standard deviation: of samples, or as they were stated."""
    if not rows:
        return ""
    stated = {row["statistic"]: float(row["value"]) for row in rows}
    values = [float(row["value"]) for row in rows]
    middle = stated.get("mean", fmean(values))
    spread = stated.get("standard deviation", stdev(values) if len(values) > 1 else math.nan)
    return f"{middle:.2f} ± {spread:.2f}"


def precision(kept: Kept) -> str:
    """The digits run in 16 bits beside float32."""
    found = kept.of("precision", "test error")
    cells, sources = [], []
    for dtype in found.values("dtype"):
        row = [dtype]
        for metric, digits in (("test error", 2), ("last training loss", 4)):
            own = kept.of("precision", metric, dtype=dtype).newest()
            row.append(f"{float(own[0]['value']):.{digits}f}")
            sources += own
        cells.append(row)
    return with_sources(["digits, 12 epochs", "test error, %", "last loss"], cells, sources)


def sync_bytes(kept: Kept) -> str:
    """What synchronised norms hand over in a step; by formula, which a test holds to a count."""
    case = Case("densenet_bc", 100, 12, 64, 32)
    blocks = counts.blocks(case)
    cells = []
    for title, shared, per_layer in (
        ("`torch.nn.SyncBatchNorm`, layer by layer", False, "8 (c_l + B)"),
        ("effdense", True, "8 (k + B)"),
    ):
        backward = counts.statistics_bytes(case, shared) // 2
        # forward also a count: 4 bytes from each norm, or 8 from each block
        norms = sum(2 * block.num_layers for block in blocks) + len(blocks)
        forward = backward + (8 * len(blocks) if shared else 4 * norms)
        cells.append(
            [title, *(f"{n:,}" for n in (forward, backward, forward + backward)), per_layer]
        )
    header = ["bytes a step, DenseNet-BC (100, k 12)", "forward", "backward", "together"]
    return table([*header, "backward, a layer"], cells)


def installation(kept: Kept) -> str:
    """What the README's two commands take in a fresh clone."""
    cells, sources = [], []
    for name, _ in STEPS:
        own = kept.of("installation", "time").newest(provider=name)
        size = kept.of("installation", "environment").newest(provider=name)
        if own and size:
            gibibytes = float(size[0]["value"]) / 2**30
            cells.append([name, f"{float(own[0]['value']):.0f}", f"{gibibytes:.1f}"])
            sources += own
    return with_sources(["in a fresh clone", "s", "`.venv` then, GiB"], cells, sources)


def kills(kept: Kept) -> str:
    """Of `make chaos`: a run that did not end with the bits of the undisturbed one has no row."""
    found = {metric: kept.of("chaos", metric).newest() for metric in ("kills", "runs")}
    cells = [[f"{float(rows[0]['value']):.0f}" for rows in found.values()]]
    header = ["kills", "runs that ended with the bits of the undisturbed one"]
    return with_sources(header, cells, found["kills"])


def soak(kept: Kept) -> str:
    """Of `make soak`: what a run of hours held, and by how much more an hour."""
    found = kept.of("soak", "memory mean").newest()
    run = Kept(row for row in kept.rows if source_of(row) == source_of(found[0]))
    about = {name: run.of("soak", name).newest()[0]["value"] for name in ("minutes", "kills")}
    names = [row["metric"].removesuffix(" slope") for row in run.rows if "slope" in row["metric"]]
    cells = []
    for name in names:
        rows = {what: run.of("soak", f"{name} {what}").newest()[0] for what in SOAKED}
        title, scale = (f"{name}, MiB", 2**20) if rows["mean"]["unit"] == "B" else (name, 1)
        mean, least, most, slope, error = (float(row["value"]) / scale for row in rows.values())
        change = f"{slope:+,.2f} ± {error:.2f}"
        ends = f"{least:,.1f} to {most:,.1f}"
        cells.append([title, f"{mean:,.1f}", ends, change, rows["mean"]["status"]])
    title = f"{float(about['minutes']):.0f} minutes, {float(about['kills']):.0f} kills"
    header = [title, "mean", "range", "slope an hour, ± standard error", ""]
    return with_sources(header, cells, found)
