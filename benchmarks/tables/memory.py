"""Peaks of memory: measured, predicted, and how near predictions are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness import counts
from harness.case import Case
from harness.kept import Kept, case_of
from harness.results import Row, mebibytes

from .parts import NAMES, middle_and_spread, network, seconds, with_sources

DEEP = Case("densenet_bc", 250, 24, 32, 32)
THOUSAND = Case("densenet_bc", 1000, 12, 8, 32)
# what the README's six rows are of
FRONT = Case("densenet_bc", 100, 12, 64, 32)
SIX = (
    "naive",
    "torchvision-memory-efficient",
    "checkpoint",
    "effdense-bottlenecks",
    "effdense-features",
    "effdense-input",
)


def peaks(case: Case, names: Sequence[str] = tuple(NAMES)) -> Callable[[Kept], str]:
    """Peak memory of one network by provider, beside its floor; its time where the run has it."""

    def make(kept: Kept) -> str:
        found, times = kept.of("memory", "peak", case), kept.of("throughput", "step time", case)
        newest = {name: own for name in names if (own := found.newest(provider=name))}
        peak = {name: middle_and_spread(own)[0] for name, own in newest.items()}
        floor, naive = counts.floor(case), peak.get("naive")
        sources = [row for own in newest.values() for row in own]
        rows = [["floor (parameters, gradients, momentum, features, one gradient buffer)"]]
        rows[0] += [mebibytes(floor.total), "1", "", ""]
        for name, nbytes in peak.items():
            run = {n: newest[name][0][n] for n in ("processor", "gpu", "git_revision")}
            share = f"1/{naive / nbytes:.1f}" if naive and naive != nbytes else ""
            row = [NAMES[name], mebibytes(nbytes), f"{nbytes / floor.total:.2f}", share]
            races = times.of("throughput", "step time", None, **run).runs()
            # the one with most of them: threads may differ, and what they share the processor with
            race = max(
                races, key=lambda each: len({*names} & {*each.values("provider")}), default=None
            )
            timed = race.newest(provider=name) if race else []
            rows.append([*row, seconds(timed)])
            sources += timed
        if naive is None:
            for predicted in kept.of("memory", "predicted peak", case).newest(provider="naive"):
                size = mebibytes(float(predicted["value"]))
                rows.append([f"{NAMES['naive']}, predicted, not run", size, "", "", ""])
        header = [network(case), "peak, MiB", "of the floor", "of naive", "s/step"]
        width = len(header) if any(row[-1] for row in rows) else len(header) - 1
        return with_sources(header[:width], [row[:width] for row in rows], sources)

    return make


def by_provider(found: Kept, case: Case, names: Sequence[str]) -> tuple[list[str], list[Row]]:
    """MiB of each provider's newest run of a case, empty where there is none; and their rows."""
    own = Kept(row for row in found.rows if case_of(row) == case)
    runs = [own.newest(provider=name) for name in names]
    cells = [mebibytes(middle_and_spread(rows)[0]) if rows else "" for rows in runs]
    return cells, [row for rows in runs for row in rows]


def other_peaks(kept: Kept) -> str:
    """Of the networks that have no table of their own."""
    found, cells, sources = kept.of("memory", "peak"), [], []
    swept = {row["command"] for row in found.rows if "--sweep" in row["command"]}
    cases = dict.fromkeys(case_of(row) for row in found.rows if row["command"] not in swept)
    for case in cases:
        if case in (DEEP, THOUSAND, FRONT):
            continue
        names = [f"effdense-{save}" for save in ("features", "slabs", "input", "bottlenecks")]
        own, rows = by_provider(found, case, names)
        cells.append([network(case), mebibytes(counts.floor(case).total), *own])
        sources += rows
    header = ["peak, MiB", "floor", '`"features"`', '`"slabs"`', '`"input"`', '`"bottlenecks"`']
    return with_sources(header, cells, sources)


def steps_in_backward(kept: Kept) -> str:
    """Peaks with and without steps in backward, of the networks that were measured with them."""
    found, cells, sources = kept.of("memory", "peak"), [], []
    names = ("effdense-features", "effdense-step-in-backward")
    for case in dict.fromkeys(case_of(r) for r in found.rows if r["provider"] == names[1]):
        own, rows = by_provider(found, case, names)
        cells.append([network(case), mebibytes(counts.floor(case).total), *own])
        sources += rows
    header = ["peak, MiB", "floor", "gradients kept", "steps in backward"]
    return with_sources(header, cells, sources)


def predictions(kept: Kept) -> str:
    """What effdense.estimate said of steps that no machine here has taken."""
    found, cells, sources = kept.of("memory", "estimate"), [], []
    names = ("naive", "effdense-bottlenecks", "effdense-features", "effdense-slabs")
    for case in dict.fromkeys(case_of(row) for row in found.rows):
        about = f"{network(case)}, {case.dtype}, {case.device}"
        own, rows = by_provider(found, case, names)
        cells.append([about, mebibytes(counts.floor(case).total), *own])
        sources += rows
    header = ["predicted, not measured, MiB", "floor", "naive"]
    header += ['`"bottlenecks"`', '`"features"`', '`"slabs"`']
    return with_sources(header, cells, sources)


def timelines(kept: Kept) -> str:
    """The highest moments of live tensors of a volume's step."""
    about = {"benchmark": "timeline", "spatial_dims": "3"}
    found = Kept(row for row in kept.rows if about.items() <= row.items())
    cells, sources = [], []
    for name in found.values("provider"):
        rows = found.newest(provider=name)
        live: dict[str, float] = {}
        for row in rows:
            if row["metric"].startswith("live "):
                live[row["sample"]] = live.get(row["sample"], 0.0) + float(row["value"])
        cells.append([NAMES[name], mebibytes(max(live.values()))])
        sources += rows
    return with_sources(
        [f"{network(case_of(sources[0]))}, MiB", "live at the most"], cells, sources
    )


def buckets(kept: Kept) -> str:
    """Resident size beside its prediction, of one of two processes that train together."""
    found = kept.of("estimates", "peak")
    run = [row for row in found.newest() if ", gradients " in row["arch"]]
    cells = []
    for row in run:
        of = kept.of("estimates", "predicted peak", arch=row["arch"])
        (known,) = of.newest(git_revision=row["git_revision"])
        sizes = (mebibytes(float(each["value"])) for each in (known, row))
        cells.append([row["arch"], *sizes])
    return with_sources(["MiB", "predicted", "measured"], cells, run)


def growth(kept: Kept) -> str:
    """Along depth, with the exponent of what is not parameters, gradients or momentum."""
    metric = "growth exponent along depth"
    exponents = kept.of("memory", metric)
    run = exponents.newest()
    command = run[0]["command"]
    found = kept.of("memory", "peak", command=command)
    cases = list(dict.fromkeys(case_of(row) for row in found.rows))
    floors = [counts.floor(case) for case in cases]
    exponent = counts.growth_exponent(
        [case.depth for case in cases], [floor.total - floor.state for floor in floors]
    )
    cells = [["floor", *(mebibytes(floor.total) for floor in floors), f"{exponent:.2f}"]]
    for name in found.values("provider"):
        own = [found.of("memory", "peak", case).newest(provider=name) for case in cases]
        last = exponents.newest(provider=name)
        sizes = [mebibytes(middle_and_spread(rows)[0]) if rows else "" for rows in own]
        cells.append([NAMES[name], *sizes, f"{float(last[0]['value']):.2f}" if last else ""])
    case = cases[0]
    header = [f"k {case.growth_rate}, batch {case.batch_size}, MiB at depth"]
    return with_sources([*header, *(str(c.depth) for c in cases), "exponent"], cells, run)


def estimates(kept: Kept) -> str:
    """The largest errors of predictions, in float32 and float64 and in 16 bits."""
    run = kept.of("estimates", "live").newest()
    revision = run[0]["git_revision"]
    cells = []
    for title, narrow in (("float32, float64", False), ("16 bits", True)):
        row = [title]
        for metric in ("live", "peak"):
            found = kept.of("estimates", metric, git_revision=revision)
            errors, number = [0.0], 0
            for each in found.rows:
                if (each["dtype"] in ("bfloat16", "float16")) != narrow or not each["value"]:
                    continue
                (known,) = kept.of(
                    "estimates", f"predicted {metric}", git_revision=revision, arch=each["arch"]
                ).rows
                errors.append(float(known["value"]) / float(each["value"]) - 1)
                number += 1
            worst = max(errors, key=abs)
            row.append(f"{100 * worst:+.{3 if metric == 'live' else 1}f} %")
        cells.append([row[0], str(number), *row[1:]])
    header = ["", "configurations", "live bytes, largest error", "resident size, largest error"]
    return with_sources(header, cells, run)
