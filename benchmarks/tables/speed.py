"""Seconds of steps, and what they are of other steps."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

from harness import counts
from harness.case import Case
from harness.kept import Kept, case_of, source_of
from harness.results import Row, mebibytes
from waiting import PLACES, SETTINGS

from effdense.machine.tables import table

from .parts import NAMES, middle_and_spread, network, seconds, spread, threads_of, with_sources

# the columns of the table of steps
RACED = {
    "naive": "naive",
    "naive-channels-last": "naive, channels-last",
    "checkpoint": "checkpointed",
    "effdense-bottlenecks": '`"bottlenecks"`',
    "effdense-features": '`"features"`',
    "effdense-input": '`"input"`',
}
SHARE = "speed, of naive-channels-last's"


def _shares(kept: Kept, case: Case, provider: str) -> list[Row]:
    """naive-channels-last's time over a provider's: formed within each round, or as stated."""
    times = kept.of("throughput", "step time", case)
    own = times.newest(provider=provider)
    rivals = {
        row["sample"]: float(row["value"])
        for row in times.newest(provider="naive-channels-last")
        if own and source_of(row) == source_of(own[0]) and not row["statistic"]
    }
    formed = [
        row | {"value": str(rivals[row["sample"]] / float(row["value"]))}
        for row in own
        if row["sample"] in rivals and not row["statistic"]
    ]
    run = {"git_revision": own[0]["git_revision"]} if own else {}
    return formed or kept.of("throughput", SHARE, case).newest(provider=provider, **run)


def _of_a_product(kept: Kept, case: Case, provider: str) -> str:
    """The naive network's arithmetic by a provider's time, of the same run's matrix product."""
    own = kept.of("throughput", "step time", case).newest(provider=provider)
    if not own:
        return ""
    run = {"git_revision": own[0]["git_revision"], "command": own[0]["command"]}
    stated = kept.of("throughput", "speed, of a matrix product's", case)
    share = [float(row["value"]) for row in stated.newest(provider=provider, **run)]
    for row in kept.of("throughput", "matrix product", case).newest(provider="machine", **run):
        flops = counts.training_flops(case) / middle_and_spread(own)[0]
        share.append(flops / float(row["value"]))
    return f"{100 * share[-1]:.0f} %" if share else ""


class Race(NamedTuple):
    """A run of one network's steps."""

    title: str
    case: Case
    run: Kept


def _races(kept: Kept) -> list[Race]:
    """The newest of each network; of one with several, by their threads."""
    found, races = kept.of("throughput", "step time"), []
    for case in dict.fromkeys(case_of(row) for row in found.rows):
        own = found.of("throughput", "step time", case)
        newest = {row["git_revision"] for row in own.newest()}
        runs = [each for each in own.runs() if each.rows[0]["git_revision"] in newest]
        for run in runs:
            threads = f", {threads_of(run.rows[0])}" if len(runs) > 1 else ""
            whole = kept.run(source_of(run.rows[0]))
            races.append(Race(f"{network(case)}{threads}", case, whole))
    return races


def _step_times(race: Race, names: Iterable[str]) -> list[list[Row]]:
    return [race.run.of("throughput", "step time", race.case).newest(provider=n) for n in names]


def speed(kept: Kept) -> str:
    """Seconds per step of the networks that have them."""
    cells, sources = [], []
    for race in _races(kept):
        times = _step_times(race, RACED)
        cells.append([race.title, *map(seconds, times)])
        sources += [row for rows in times for row in rows]
    return with_sources(["s/step", *RACED.values()], cells, sources)


def shares(kept: Kept) -> str:
    """Of the same runs as ``speed``: of a rival's speed, and of what the processor can do."""
    names, cells = ("effdense-features", "effdense-bottlenecks"), []
    for race in _races(kept):
        row = [spread(_shares(race.run, race.case, name)) for name in names]
        row += [_of_a_product(race.run, race.case, name) for name in names]
        cells.append([race.title, *row])
    columns = [RACED[name] for name in names]
    header = [f"{name}, times as fast" for name in columns]
    return table(["", *header, *(f"{name}, of a product's speed" for name in columns)], cells)


def compiled(kept: Kept) -> str:
    """Steps beside those of networks that torch.compile made."""
    races = [
        race
        for race in _races(kept)
        if any(name.startswith("compile") for name in race.run.values("provider"))
    ]
    cells, sources = [], []
    for name in NAMES:
        times = [_step_times(race, [name])[0] for race in races]
        if any(times):
            cells.append([NAMES[name], *map(seconds, times)])
            sources += [row for rows in times for row in rows]
    return with_sources(["s/step", *(race.title for race in races)], cells, sources)


def ratios(kept: Kept) -> str:
    """How many times as fast as naive channels-last, of runs that ``shares`` doesn't show."""
    found = kept.of("throughput", SHARE)
    shown = {(race.case, race.run.rows[0]["git_revision"]) for race in _races(kept)}
    runs = dict.fromkeys((case_of(row), row["git_revision"]) for row in found.rows)
    own = [
        found.of("throughput", SHARE, case, git_revision=revision)
        for case, revision in runs
        if (case, revision) not in shown
    ]
    names = [name for name in NAMES if any(name in run.values("provider") for run in own)]
    cells, sources = [], []
    for run in own:
        rows = [run.newest(provider=name) for name in names]
        first = run.rows[0]
        about = [network(case_of(first)), f"{first['processor']}, {first['git_revision'][:7]}"]
        cells.append([*about, *map(spread, rows)])
        sources += [row for each in rows for row in each]
    return with_sources(["times as fast", "", *(NAMES[name] for name in names)], cells, sources)


def revisions(kept: Kept) -> str:
    """Steps of a revision against an older one's, by round."""
    found, cells, sources = kept.of("revisions", "step time"), [], []
    for case in dict.fromkeys(case_of(row) for row in found.rows):
        own = Kept(found.of("revisions", "step time", case).newest())
        for name in own.values("provider"):
            older = next((n for n in own.values("provider") if n.startswith(f"{name}@")), None)
            if older is None:
                continue
            new, old = (own.newest(provider=each) for each in (name, older))
            pairs = zip(new, old, strict=True)
            ratios = [a | {"value": str(float(a["value"]) / float(b["value"]))} for a, b in pairs]
            what = f"{network(case)}, {name.removeprefix('effdense-')}"
            cells.append([what, older.partition("@")[2], *map(seconds, (old, new)), spread(ratios)])
            sources += new
    header = ["s/step", "older revision", "there", "here", "of its time, per round"]
    return with_sources(header, cells, sources)


def scaling(kept: Kept) -> str:
    """Images per second by processes, and the efficiency against one."""
    rates = kept.of("scaling", "weak images per second")
    times = kept.of("scaling", "weak step time")
    found = times if times.rows else rates
    case = case_of(found.newest()[0])
    numbers = sorted({int(row["processes"]) for row in found.rows})
    cells, sources = [], []
    for name in found.values("provider"):
        row, first = [NAMES[name]], 0.0
        for n in numbers:
            own = found.newest(provider=name, processes=str(n))
            sources += own
            value = middle_and_spread(own)[0]
            rate = value if found is rates else case.batch_size * n / value
            first = first or rate / n
            stated = kept.of("scaling", "weak efficiency").newest(provider=name, processes=str(n))
            share = float(stated[0]["value"]) if stated and found is rates else rate / n / first
            row.append(f"{rate:.1f}" + (f" ({100 * share:.0f} %)" if n > numbers[0] else ""))
        cells.append(row)
    header = [f"images/s, {network(case)} each, processes", *map(str, numbers)]
    return with_sources(header, cells, sources)


def plans(kept: Kept) -> str:
    """Memory and time of plans, predicted and measured, the fastest by prediction first."""
    rows = kept.of("pareto", "step time").newest()
    run = kept.run(source_of(rows[0]))
    slowdowns = {
        row["provider"]: float(row["value"]) for row in run.of("pareto", "predicted slowdown").rows
    }
    first, cells = 0.0, []
    for name in sorted(slowdowns, key=lambda name: (slowdowns[name], name)):
        times = run.of("pareto", "step time").newest(provider=name)
        if not times:
            continue
        sizes = [
            mebibytes(float(row["value"]))
            for metric in ("predicted peak", "peak")
            for row in run.of("pareto", metric).newest(provider=name)
        ]
        time = middle_and_spread(times)[0]
        first = first or time
        shown = f"`{name.replace('+', ' ')}`"
        cells.append([shown, *sizes, f"{slowdowns[name]:.2f}", f"{time / first:.2f}"])
    header = ["save, a mode a block", "predicted MiB", "measured"]
    return with_sources([*header, "predicted time, of the fastest's", "measured"], cells, rows)


def waiting(kept: Kept) -> str:
    """Of each way to wait, the median of its processes."""
    settings = [setting or "default" for setting in SETTINGS]
    run = Kept(kept.of("waiting", "throughput").newest())
    cells = []
    for place in PLACES:
        rows = [run.newest(provider=setting, detail=place) for setting in settings]
        speeds = (median(float(row["value"]) for row in own) for own in rows)
        cells.append([place, *(f"{speed:,.0f}" for speed in speeds)])
    header = ["images/s, two threads on two cores", *(f"`{name}`" for name in settings)]
    return with_sources(header, cells, run.rows)
