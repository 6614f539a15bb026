"""Tables and pictures of the documentation, from the results kept in benchmarks/results/.

    python benchmarks/report.py                       # writes every table, draws every picture
    python benchmarks/report.py --add results/*.csv   # keeps new results first

A table stands in a page between <!-- table: NAME --> and <!-- end -->; nothing between them is
written by hand. A folder of results is of one machine, date and revision; of the same figure
measured in several, the newest is shown, and below each table stands where its figures are from.
"""

from __future__ import annotations

import csv
import importlib
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Annotated, NamedTuple

from harness import counts, results
from harness.case import Case
from harness.kept import KEPT, ROOT, kept_folder, note_environment
from harness.packages import MODELS
from harness.pictures import picture
from harness.results import Row, mebibytes, quantiles
from installation import STEPS
from tyro.conf import arg
from waiting import PLACES, SETTINGS

from effdense.commands import front_end
from effdense.errors import UserError
from effdense.machine.tables import table

FIGURES = ROOT / "benchmarks" / "figures"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

NAMES = {
    "naive": "naive (`effdense.reference`)",
    "naive-channels-last": "naive, channels-last",
    "torchvision": "torchvision",
    "torchvision-memory-efficient": "torchvision, `memory_efficient=True`",
    "checkpoint": "checkpointed (`torch.utils.checkpoint` per layer)",
    "compile": "`torch.compile` of naive",
    "compile-channels-last": "`torch.compile` of naive, channels-last",
    "compile-channels-last:max-autotune": "`torch.compile` of naive, channels-last, `max-autotune`",
    "effdense-bottlenecks": 'effdense, `save="bottlenecks"`',
    "effdense-features": 'effdense, `save="features"`',
    "effdense-input": 'effdense, `save="input"`',
    "effdense-slabs": 'effdense, `save="slabs"`',
    "effdense-step-in-backward": 'effdense, `save="features"`, steps in backward',
}
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
DEEP = Case("densenet_bc", 250, 24, 32, 32)
THOUSAND = Case("densenet_bc", 1000, 12, 8, 32)
# a picture's name, and the measurements of bench.py that it shows
PICTURES = {
    "memory-depth": ("memory-depth",),
    "throughput": ("throughput-100", "throughput-250", "throughput-121"),
    "timeline": ("timeline",),
    "timeline-volume": ("timeline-volume",),
    "memory-volume": ("memory-volume",),
    "convergence": ("convergence",),
    "precision": ("precision",),
    "estimates": ("estimates",),
    "pareto": ("pareto",),
}
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

# what `make soak` says of each quantity
SOAKED = ("mean", "least", "most", "slope", "error")


@dataclass(frozen=True)
class Options:
    add: Annotated[
        tuple[Path, ...], arg(metavar="CSV", help_behavior_hint="(default: nothing new)")
    ] = ()
    """Results to be kept: in the folder of their machine, date and revision, where they take the
    place of the same figures."""


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/report.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> None:
    for path in options.add:
        try:
            print(keep(results.read(path), path.stem))
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from None
    for page, text in written().items():
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            print(page.relative_to(ROOT))
    for path in drawn():
        print(path.relative_to(ROOT))


def keep(rows: Sequence[Row], name: str, folder: Path = KEPT) -> Path:
    """Add rows of one run to the results of their machine, date and revision, under a name.

    Raises:
        UserError: where nobody could measure them again.
    """
    if not rows:
        raise UserError("no rows to keep")
    if any(row["kind"] == "projection" for row in rows):
        raise UserError("projections are not kept: they are no measurements")
    own = kept_folder(rows[0], folder)
    own.mkdir(parents=True, exist_ok=True)
    new = {_figure(row) for row in rows}
    path = own / f"{name}.csv"
    for other in {*own.glob("*.csv"), path}:
        before = results.read(other) if other.exists() else []
        still = [row for row in before if _figure(row) not in new]
        if other == path or len(still) < len(before):
            _write_rows(other, [*still, *(rows if other == path else ())])
    note_environment(own, rows[0])
    return path


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        columns = [*results.RESULT_COLUMNS, *results.ENVIRONMENT_COLUMNS]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def drawn() -> Iterator[Path]:
    """Draw every picture of which some machine's results hold all that it shows, the newest's."""
    for name, measured in PICTURES.items():
        folders = [
            folder
            for folder in KEPT.iterdir()
            if all((folder / f"{each}.csv").exists() for each in measured)
        ]
        if folders:
            newest = max(folders, key=lambda folder: _date(folder / f"{measured[0]}.csv"))
            paths = [newest / f"{each}.csv" for each in measured]
            benchmark = importlib.import_module(results.read(paths[0])[0]["benchmark"])
            picture(benchmark.draw, paths, FIGURES / f"{name}.png")
            yield FIGURES / f"{name}.png"
    if shutil.which("dot"):
        graph = ["graph", "densenet_bc", "--depth", "40", "--output", str(FIGURES / "graph.svg")]
        subprocess.run([sys.executable, "-m", "effdense", *graph], check=True, cwd=ROOT)
    else:
        print("graph.svg stays as it is: Graphviz's dot is not installed", file=sys.stderr)


def _date(path: Path) -> str:
    return results.read(path)[0]["date"]


def written() -> dict[Path, str]:
    """Every page with the tables that the kept results make.

    Raises:
        UserError: for a table that is none of ``TABLES``.
    """
    kept = Kept.read()
    found = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):

        def filled(mark: re.Match[str], page: Path = page) -> str:
            if mark[2] not in TABLES:
                raise UserError(f"{page.name}: no table {mark[2]}; there are {', '.join(TABLES)}")
            return f"{mark[1]}\n{TABLES[mark[2]](kept)}\n\n{mark[3]}"

        found[page] = MARKED.sub(filled, page.read_text(encoding="utf-8"))
    return found


def _case(row: Row) -> Case:
    numbers = {name: int(row[name]) for name in ("depth", "growth_rate", "batch_size")}
    numbers |= {name: int(row[name]) for name in ("image_size", "spatial_dims")}
    return Case(row["arch"], **numbers, dtype=row["dtype"], device=row["device"])  # type: ignore[arg-type]


def _figure(row: Row) -> tuple[str, ...]:
    """What a row is a sample of."""
    about: tuple[str, ...] = (
        "benchmark",
        "arch",
        "depth",
        "growth_rate",
        "batch_size",
        "image_size",
        "dtype",
    )
    about += ("spatial_dims", "device", "provider", "metric", "processes", "steps")
    return tuple(row[name] for name in about)


class Kept:
    """Rows of all results files, the oldest first."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = sorted(rows, key=lambda row: row["date"])

    @classmethod
    def read(cls, folder: Path = KEPT) -> Kept:
        return cls(row for path in sorted(folder.glob("*/*.csv")) for row in results.read(path))

    def of(self, benchmark: str, metric: str, case: Case | None = None, **columns: str) -> Kept:
        """The rows of a metric that have these values."""
        columns |= {"benchmark": benchmark, "metric": metric}
        return Kept(
            row
            for row in self.rows
            if all(row[name] == value for name, value in columns.items())
            and (case is None or _case(row) == case)
        )

    def newest(self, **columns: str) -> list[Row]:
        """The rows of the newest run among those that have these values."""
        rows = [row for row in self.rows if all(row[n] == v for n, v in columns.items())]
        rows = [row for row in rows if row["value"]]
        return [row for row in rows if _source(row) == _source(rows[-1])]

    def runs(self) -> list[Kept]:
        """Those of each run that has a value, the newest last: times of two are not compared."""
        sources = dict.fromkeys(_source(row) for row in self.rows if row["value"])
        return [self.run(source) for source in sources]

    def run(self, source: tuple[str, ...]) -> Kept:
        """Those of one run."""
        return Kept(row for row in self.rows if _source(row) == source)

    def values(self, column: str) -> list[str]:
        """What is in a column, each once."""
        return list(dict.fromkeys(row[column] for row in self.rows))


def _quantiles(rows: Sequence[Row]) -> tuple[float, float, float]:
    """(median, 20 %, 80 %): of samples, or as stated; where a median alone is, thrice that."""
    stated = {row["statistic"]: float(row["value"]) for row in rows if row["statistic"]}
    if "0.5" in stated:
        return stated["0.5"], stated.get("0.2", stated["0.5"]), stated.get("0.8", stated["0.5"])
    low, middle, high = quantiles([float(row["value"]) for row in rows])
    return middle, low, high


def _spread(rows: Sequence[Row], digits: int = 2) -> str:
    if not rows:
        return ""
    middle, low, high = (f"{value:.{digits}f}" for value in _quantiles(rows))
    return middle if low == middle == high else f"{middle} [{low}, {high}]"


def _seconds(rows: Sequence[Row]) -> str:
    """To three digits, as clocks and neighbours allow."""
    return _spread(rows, 2 if rows and _quantiles(rows)[0] >= 1 else 3)


def _source(row: Row) -> tuple[str, ...]:
    about = ("processor", "gpu", "git_revision", "command", "threads", "torch")
    return tuple(row[name] for name in about)


def _threads(row: Row) -> str:
    """Such as "2 threads"; nothing where it isn't known."""
    plural = "" if row["threads"] == "1" else "s"
    return f"{row['threads']} thread{plural}" if row["threads"] else ""


def _sources(rows: Iterable[Row]) -> str:
    """Where figures are from: each machine and revision, and a line for each run there."""
    found: dict[str, list[str]] = {}
    for row in {_source(row): row for row in rows}.values():
        memory = f", {float(row['memory_bytes']) / 2**30:.1f} GiB" if row["memory_bytes"] else ""
        where = (
            f"{row['gpu'] or row['processor']}, {row['cores']} cores{memory}, "
            f"torch {row['torch']}, Python {row['python']}, "
            f"revision {row['git_revision'][:7]}, {row['date'][:10]}"
        )
        command = re.sub(r" --output \S+", "", row["command"])
        threads = f", {_threads(row)}" if row["threads"] else ""
        found.setdefault(where, []).append(f"- `{command}`{threads}")
    return "\n\n".join("\n".join([f"{where}:", "", *runs]) for where, runs in found.items())


def _with_sources(header: Sequence[str], cells: Sequence[Sequence[str]], rows: list[Row]) -> str:
    return f"{table(header, cells)}\n\n{_sources(rows)}"


def _network(case: Case) -> str:
    name = f"DenseNet-BC ({case.depth}, k {case.growth_rate})" if case.is_cifar else case.arch
    return f"{name}, {case.size}, batch {case.batch_size}"


def peaks(case: Case, names: Sequence[str] = tuple(NAMES)) -> Callable[[Kept], str]:
    """Peak memory of one network by provider, beside its floor; its time where the run has it."""

    def make(kept: Kept) -> str:
        found, times = kept.of("memory", "peak", case), kept.of("throughput", "step time", case)
        newest = {name: own for name in names if (own := found.newest(provider=name))}
        peak = {name: _quantiles(own)[0] for name, own in newest.items()}
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
            rows.append([*row, _seconds(timed)])
            sources += timed
        if naive is None:
            for predicted in kept.of("memory", "predicted peak", case).newest(provider="naive"):
                size = mebibytes(float(predicted["value"]))
                rows.append([f"{NAMES['naive']}, predicted, not run", size, "", "", ""])
        header = [_network(case), "peak, MiB", "of the floor", "of naive", "s/step"]
        width = len(header) if any(row[-1] for row in rows) else len(header) - 1
        return _with_sources(header[:width], [row[:width] for row in rows], sources)

    return make


def _by_provider(found: Kept, case: Case, names: Sequence[str]) -> tuple[list[str], list[Row]]:
    """MiB of each provider's newest run of a case, empty where there is none; and their rows."""
    own = Kept(row for row in found.rows if _case(row) == case)
    runs = [own.newest(provider=name) for name in names]
    cells = [mebibytes(_quantiles(rows)[0]) if rows else "" for rows in runs]
    return cells, [row for rows in runs for row in rows]


def other_peaks(kept: Kept) -> str:
    """Of the networks that have no table of their own."""
    found, cells, sources = kept.of("memory", "peak"), [], []
    swept = {row["command"] for row in found.rows if "--sweep" in row["command"]}
    cases = dict.fromkeys(_case(row) for row in found.rows if row["command"] not in swept)
    for case in cases:
        if case in (DEEP, THOUSAND, FRONT):
            continue
        names = [f"effdense-{save}" for save in ("features", "slabs", "input", "bottlenecks")]
        own, rows = _by_provider(found, case, names)
        cells.append([_network(case), mebibytes(counts.floor(case).total), *own])
        sources += rows
    header = ["peak, MiB", "floor", '`"features"`', '`"slabs"`', '`"input"`', '`"bottlenecks"`']
    return _with_sources(header, cells, sources)


def steps_in_backward(kept: Kept) -> str:
    """Peaks with and without steps in backward, of the networks that were measured with them."""
    found, cells, sources = kept.of("memory", "peak"), [], []
    names = ("effdense-features", "effdense-step-in-backward")
    for case in dict.fromkeys(_case(r) for r in found.rows if r["provider"] == names[1]):
        own, rows = _by_provider(found, case, names)
        cells.append([_network(case), mebibytes(counts.floor(case).total), *own])
        sources += rows
    header = ["peak, MiB", "floor", "gradients kept", "steps in backward"]
    return _with_sources(header, cells, sources)


def volumes(kept: Kept) -> str:
    """Peaks of MONAI's network at large volumes."""
    found, cells, sources = kept.of("conversion", "peak", spatial_dims="3"), [], []
    cases = dict.fromkeys(_case(row) for row in found.rows)
    for case in sorted(cases, key=lambda case: (case.image_size, case.batch_size)):
        names = ("original", "converted", "converted-slabs")
        own, rows = _by_provider(found, case, names)
        if own[-1]:
            cells.append([f"{case.size}, batch {case.batch_size}", *own])
            sources += rows
    header = ["MONAI's DenseNet121, MiB", "as it comes", "converted", 'and `save="slabs"`']
    return _with_sources(header, cells, sources)


def predictions(kept: Kept) -> str:
    """What effdense.estimate said of steps that no machine here has taken."""
    found, cells, sources = kept.of("memory", "estimate"), [], []
    names = ("naive", "effdense-bottlenecks", "effdense-features", "effdense-slabs")
    for case in dict.fromkeys(_case(row) for row in found.rows):
        about = f"{_network(case)}, {case.dtype}, {case.device}"
        own, rows = _by_provider(found, case, names)
        cells.append([about, mebibytes(counts.floor(case).total), *own])
        sources += rows
    header = ["predicted, not measured, MiB", "floor", "naive"]
    header += ['`"bottlenecks"`', '`"features"`', '`"slabs"`']
    return _with_sources(header, cells, sources)


def growth(kept: Kept) -> str:
    """Along depth, with the exponent of what is not parameters, gradients or momentum."""
    metric = "growth exponent along depth"
    exponents = kept.of("memory", metric)
    run = exponents.newest()
    command = run[0]["command"]
    found = kept.of("memory", "peak", command=command)
    cases = list(dict.fromkeys(_case(row) for row in found.rows))
    floors = [counts.floor(case) for case in cases]
    exponent = counts.growth_exponent(
        [case.depth for case in cases], [floor.total - floor.state for floor in floors]
    )
    cells = [["floor", *(mebibytes(floor.total) for floor in floors), f"{exponent:.2f}"]]
    for name in found.values("provider"):
        own = [found.of("memory", "peak", case).newest(provider=name) for case in cases]
        last = exponents.newest(provider=name)
        sizes = [mebibytes(_quantiles(rows)[0]) if rows else "" for rows in own]
        cells.append([NAMES[name], *sizes, f"{float(last[0]['value']):.2f}" if last else ""])
    case = cases[0]
    header = [f"k {case.growth_rate}, batch {case.batch_size}, MiB at depth"]
    return _with_sources([*header, *(str(c.depth) for c in cases), "exponent"], cells, run)


def _shares(kept: Kept, case: Case, provider: str) -> list[Row]:
    """naive-channels-last's time over a provider's: formed within each round, or as stated."""
    times = kept.of("throughput", "step time", case)
    own = times.newest(provider=provider)
    rivals = {
        row["sample"]: float(row["value"])
        for row in times.newest(provider="naive-channels-last")
        if own and _source(row) == _source(own[0]) and not row["statistic"]
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
        flops = counts.training_flops(case) / _quantiles(own)[0]
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
    for case in dict.fromkeys(_case(row) for row in found.rows):
        own = found.of("throughput", "step time", case)
        newest = {row["git_revision"] for row in own.newest()}
        runs = [each for each in own.runs() if each.rows[0]["git_revision"] in newest]
        for run in runs:
            threads = f", {_threads(run.rows[0])}" if len(runs) > 1 else ""
            whole = kept.run(_source(run.rows[0]))
            races.append(Race(f"{_network(case)}{threads}", case, whole))
    return races


def _step_times(race: Race, names: Iterable[str]) -> list[list[Row]]:
    return [race.run.of("throughput", "step time", race.case).newest(provider=n) for n in names]


def speed(kept: Kept) -> str:
    """Seconds per step of the networks that have them."""
    cells, sources = [], []
    for race in _races(kept):
        times = _step_times(race, RACED)
        cells.append([race.title, *map(_seconds, times)])
        sources += [row for rows in times for row in rows]
    return _with_sources(["s/step", *RACED.values()], cells, sources)


def shares(kept: Kept) -> str:
    """Of the same runs as ``speed``: of a rival's speed, and of what the processor can do."""
    names, cells = ("effdense-features", "effdense-bottlenecks"), []
    for race in _races(kept):
        row = [_spread(_shares(race.run, race.case, name)) for name in names]
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
            cells.append([NAMES[name], *map(_seconds, times)])
            sources += [row for rows in times for row in rows]
    return _with_sources(["s/step", *(race.title for race in races)], cells, sources)


def ratios(kept: Kept) -> str:
    """How many times as fast as naive channels-last, of runs that ``shares`` doesn't show."""
    found = kept.of("throughput", SHARE)
    shown = {(race.case, race.run.rows[0]["git_revision"]) for race in _races(kept)}
    runs = dict.fromkeys((_case(row), row["git_revision"]) for row in found.rows)
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
        about = [_network(_case(first)), f"{first['processor']}, {first['git_revision'][:7]}"]
        cells.append([*about, *map(_spread, rows)])
        sources += [row for each in rows for row in each]
    return _with_sources(["times as fast", "", *(NAMES[name] for name in names)], cells, sources)


def revisions(kept: Kept) -> str:
    """Steps of a revision against an older one's, by round."""
    found, cells, sources = kept.of("revisions", "step time"), [], []
    for case in dict.fromkeys(_case(row) for row in found.rows):
        own = Kept(found.of("revisions", "step time", case).newest())
        for name in own.values("provider"):
            older = next((n for n in own.values("provider") if n.startswith(f"{name}@")), None)
            if older is None:
                continue
            new, old = (own.newest(provider=each) for each in (name, older))
            pairs = zip(new, old, strict=True)
            ratios = [a | {"value": str(float(a["value"]) / float(b["value"]))} for a, b in pairs]
            what = f"{_network(case)}, {name.removeprefix('effdense-')}"
            cells.append(
                [what, older.partition("@")[2], *map(_seconds, (old, new)), _spread(ratios)]
            )
            sources += new
    header = ["s/step", "older revision", "there", "here", "of its time, per round"]
    return _with_sources(header, cells, sources)


def scaling(kept: Kept) -> str:
    """Images per second by processes, and the efficiency against one."""
    rates = kept.of("scaling", "weak images per second")
    times = kept.of("scaling", "weak step time")
    found = times if times.rows else rates
    case = _case(found.newest()[0])
    numbers = sorted({int(row["processes"]) for row in found.rows})
    cells, sources = [], []
    for name in found.values("provider"):
        row, first = [NAMES[name]], 0.0
        for n in numbers:
            own = found.newest(provider=name, processes=str(n))
            sources += own
            value = _quantiles(own)[0]
            rate = value if found is rates else case.batch_size * n / value
            first = first or rate / n
            stated = kept.of("scaling", "weak efficiency").newest(provider=name, processes=str(n))
            share = float(stated[0]["value"]) if stated and found is rates else rate / n / first
            row.append(f"{rate:.1f}" + (f" ({100 * share:.0f} %)" if n > numbers[0] else ""))
        cells.append(row)
    header = [f"images/s, {_network(case)} each, processes", *map(str, numbers)]
    return _with_sources(header, cells, sources)


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
    return _with_sources(header, cells, sources)


def _mean(rows: Sequence[Row]) -> str:
    """Mean and standard deviation: of samples, or as they were stated."""
    if not rows:
        return ""
    stated = {row["statistic"]: float(row["value"]) for row in rows}
    values = [float(row["value"]) for row in rows]
    middle = stated.get("mean", fmean(values))
    spread = stated.get("standard deviation", stdev(values) if len(values) > 1 else math.nan)
    return f"{middle:.2f} ± {spread:.2f}"


def conversion(kept: Kept) -> str:
    """Other packages' models as they come and converted."""
    cells, sources = [], []
    for case in dict.fromkeys(_case(row) for row in kept.of("conversion", "peak").rows):
        model = MODELS[case.arch]  # type: ignore[index]
        row = [f"`{model.line}`, {case.batch_size} x {case.size}"]
        for metric in ("peak", "inference peak", "training seconds", "inference seconds"):
            both = []
            for provider in ("original", "converted"):
                own = kept.of("conversion", metric, case).newest(provider=provider)
                sources += own
                both.append(_quantiles(own)[0] if own else None)
            if None in both:
                row.append("")
            elif "seconds" in metric:
                row.append(f"{both[0]:.2f} → {both[1]:.2f}")
            else:
                share = f" (1/{both[0] / both[1]:.1f})" if metric == "peak" else ""  # type: ignore
                row.append(f"{mebibytes(both[0])} → {mebibytes(both[1])}{share}")
        cells.append(row)
    header = ["model, input", "training step, MiB", "inference, MiB", "s/step", "s/inference"]
    return _with_sources(header, cells, sources)


def plans(kept: Kept) -> str:
    """Slowdowns of plans against the fastest, predicted and measured."""
    rows = kept.of("pareto", "slowdown").newest() or kept.of("pareto", "step time").newest()
    run = Kept(row for row in kept.rows if _source(row) == _source(rows[0]))
    times = {
        name: _quantiles(Kept(rows).newest(provider=name))[0]
        for name in Kept(rows).values("provider")
    }
    predicted = {
        row["provider"]: float(row["value"]) for row in run.of("pareto", "predicted slowdown").rows
    }
    names = sorted(times.keys() & predicted.keys(), key=lambda name: predicted[name])
    cells = [
        ["predicted", *(f"{predicted[name]:.2f}" for name in names)],
        ["measured", *(f"{times[name] / times[names[0]]:.2f}" for name in names)],
    ]
    return _with_sources(["time of a plan, of the fastest's", *names], cells, rows)


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
    return _with_sources(header, cells, run)


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
    return _with_sources(["digits, 12 epochs", "test error, %", "last loss"], cells, sources)


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
    return _with_sources(["in a fresh clone", "s", "`.venv` then, GiB"], cells, sources)


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
    return _with_sources(header, cells, run.rows)


def kills(kept: Kept) -> str:
    """Of `make chaos`: a run that did not end with the bits of the undisturbed one has no row."""
    found = {metric: kept.of("chaos", metric).newest() for metric in ("kills", "runs")}
    cells = [[f"{float(rows[0]['value']):.0f}" for rows in found.values()]]
    header = ["kills", "runs that ended with the bits of the undisturbed one"]
    return _with_sources(header, cells, found["kills"])


def soak(kept: Kept) -> str:
    """Of `make soak`: what a run of hours held, and by how much more an hour."""
    found = kept.of("soak", "memory mean").newest()
    run = Kept(row for row in kept.rows if _source(row) == _source(found[0]))
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
    return _with_sources(header, cells, found)


TABLES: dict[str, Callable[[Kept], str]] = {
    "readme": peaks(FRONT, SIX),
    "memory": peaks(DEEP),
    "memory-thousand": peaks(THOUSAND),
    "memory-others": other_peaks,
    "steps-in-backward": steps_in_backward,
    "volumes": volumes,
    "predictions": predictions,
    "growth": growth,
    "speed": speed,
    "shares": shares,
    "compiled": compiled,
    "ratios": ratios,
    "revisions": revisions,
    "scaling": scaling,
    "convergence": convergence,
    "conversion": conversion,
    "plans": plans,
    "estimates": estimates,
    "sync-bytes": sync_bytes,
    "precision": precision,
    "installation": installation,
    "waiting": waiting,
    "kills": kills,
    "soak": soak,
}


if __name__ == "__main__":
    main()
