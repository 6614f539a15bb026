"""All that the documentation shows, measured in one go at one revision.

    python benchmarks/bench.py          # or make bench, which writes the documentation anew too
    python benchmarks/bench.py --list
    python benchmarks/bench.py --only 'throughput-*' scaling

Each measurement is a command of benchmarks/, whose rows are kept in
benchmarks/results/MACHINE-DATE-REVISION/ once it has ended. Those that are there are not
measured again: interrupted, the same command goes on where it was. A revision is one that
is committed.
"""

from __future__ import annotations

import fnmatch
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

from harness import results
from harness.kept import KEPT, ROOT, kept_folder, machine, note_environment, seconds_of
from tyro.conf import arg

from effdense.commands import front_end
from effdense.errors import UserError
from effdense.machine.environment import environment, headline
from effdense.machine.tables import table

_RACE = (
    "--providers naive naive-channels-last checkpoint effdense-bottlenecks effdense-features "
    "effdense-input"
)
_SMALL_RACE = "--providers naive naive-channels-last effdense-bottlenecks effdense-features"
_COMPILED = (
    "--no-strict --providers naive-channels-last compile-channels-last "
    "compile-channels-last:max-autotune effdense-bottlenecks effdense-features"
)


class Measurement(NamedTuple):
    """What is measured by one command."""

    name: str
    """Of its file of results."""
    command: str
    """Of Python, without --output."""
    minutes: float
    """About what it takes on two cores, for the remaining time until it has been measured once."""


MEASUREMENTS = (
    Measurement("memory-250", "benchmarks/memory.py --depth 250 --all", 6),
    Measurement(
        "memory-100",
        "benchmarks/memory.py --depth 100 --growth-rate 12 --batch-size 64 --threads 1 --all",
        3,
    ),
    Measurement(
        "memory-1000",
        "benchmarks/memory.py --depth 1000 --growth-rate 12 --batch-size 8 --memory-limit 8GiB "
        "--providers naive effdense-features effdense-input effdense-step-in-backward",
        5,
    ),
    Measurement(
        "memory-190", "benchmarks/memory.py --depth 190 --growth-rate 40 --batch-size 16 --all", 8
    ),
    Measurement(
        "memory-121",
        "benchmarks/memory.py --arch densenet121 --batch-size 16 --threads 1 --all",
        3,
    ),
    Measurement(
        "memory-volume",
        "benchmarks/memory.py --arch densenet121 --spatial-dims 3 --image-size 256",
        4,
    ),
    Measurement(
        "memory-512",
        "benchmarks/memory.py --arch densenet121 --spatial-dims 3 --image-size 512 "
        "--dtype bfloat16 --device cuda --predict",
        1,
    ),
    Measurement(
        "memory-121-256",
        "benchmarks/memory.py --arch densenet121 --batch-size 256 --dtype float16 --device cuda "
        "--predict --providers naive effdense-bottlenecks effdense-features effdense-slabs",
        1,
    ),
    Measurement(
        "memory-depth",
        "benchmarks/memory.py --sweep depth --growth-rate 12 --batch-size 8 --providers naive "
        "checkpoint effdense-bottlenecks effdense-features",
        6,
    ),
    Measurement(
        "throughput-22",
        f"benchmarks/throughput.py --depth 22 --growth-rate 12 --batch-size 8 {_SMALL_RACE}",
        1,
    ),
    Measurement(
        "throughput-40",
        f"benchmarks/throughput.py --depth 40 --growth-rate 12 --batch-size 64 {_SMALL_RACE}",
        2,
    ),
    Measurement(
        "throughput-100",
        "benchmarks/throughput.py --depth 100 --growth-rate 12 --batch-size 64 --threads 1 "
        f"{_RACE} torchvision-memory-efficient",
        9,
    ),
    Measurement(
        "throughput-100-compiled",
        "benchmarks/throughput.py --depth 100 --growth-rate 12 --batch-size 64 --rounds 3 "
        f"{_COMPILED}",
        12,
    ),
    Measurement(
        "throughput-190",
        "benchmarks/throughput.py --depth 190 --growth-rate 40 --batch-size 8 --rounds 3 "
        f"--no-strict {_SMALL_RACE}",
        8,
    ),
    Measurement(
        "throughput-250",
        "benchmarks/throughput.py --depth 250 --growth-rate 24 --batch-size 16 --rounds 5 "
        f"--no-strict {_RACE}",
        7,
    ),
    Measurement(
        "throughput-121-1",
        f"benchmarks/throughput.py --arch densenet121 --batch-size 1 {_SMALL_RACE}",
        1,
    ),
    Measurement(
        "throughput-121",
        f"benchmarks/throughput.py --arch densenet121 --image-size 224 --batch-size 8 {_RACE}",
        4,
    ),
    Measurement(
        "throughput-3d",
        "benchmarks/throughput.py --depth 40 --growth-rate 12 --spatial-dims 3 --batch-size 2 "
        f"{_SMALL_RACE}",
        3,
    ),
    *(
        Measurement(
            f"revisions-{name}", f"benchmarks/revisions.py --against 83be760 {options}", minutes
        )
        for name, options, minutes in (
            ("3d", "--arch densenet121 --spatial-dims 3 --image-size 96", 2),
            ("121", "--arch densenet121 --batch-size 8", 2),
            ("250", "--depth 250 --growth-rate 24 --batch-size 16", 4),
        )
    ),
    Measurement("scaling", "benchmarks/scaling.py --processes 1 2 4", 8),
    Measurement("conversion", "benchmarks/conversion.py --threads 1", 15),
    Measurement(
        "conversion-96",
        "benchmarks/conversion.py --models monai-densenet121-3d --image-size 96 --batch-size 2",
        5,
    ),
    Measurement(
        "conversion-128",
        "benchmarks/conversion.py --models monai-densenet121-3d --image-size 128 --batch-size 1 "
        "--providers original converted converted-slabs",
        4,
    ),
    Measurement(
        "conversion-128-2",
        "benchmarks/conversion.py --models monai-densenet121-3d --image-size 128 --batch-size 2 "
        "--providers original converted converted-slabs --timed no",
        2,
    ),
    Measurement(
        "conversion-256",
        "benchmarks/conversion.py --models monai-densenet121-3d --image-size 256 --batch-size 1 "
        "--providers original converted converted-slabs --timed no",
        5,
    ),
    Measurement("estimates", "benchmarks/estimates.py --threads 1", 12),
    Measurement(
        "pareto",
        "benchmarks/pareto.py --depth 250 --growth-rate 24 --batch-size 16 --steps 1",
        15,
    ),
    Measurement("timeline", "benchmarks/timeline.py", 2),
    Measurement(
        "timeline-volume",
        "benchmarks/timeline.py --arch densenet121 --spatial-dims 3 --image-size 128 "
        "--batch-size 1 --providers naive effdense-features effdense-slabs",
        3,
    ),
    Measurement("convergence", "benchmarks/convergence.py", 30),
    Measurement("precision", "benchmarks/precision.py", 2),
    Measurement("installation", "benchmarks/installation.py", 6),
    Measurement("waiting", "benchmarks/waiting.py", 3),
    Measurement("chaos", "-m tests.helpers.chaos", 20),
    Measurement("soak", "-m tests.helpers.soak", 125),
)


FLOORS = {"throughput-100": 1.5, "throughput-121": 1.05}
"""How many times as fast as naive channels-last save="features" is at least on a CPU: the median
of what is formed within each round. Less is measured again, and said."""


@dataclass(frozen=True)
class Options:
    only: Annotated[
        tuple[str, ...], arg(metavar="NAME", help_behavior_hint="(default: all of --list)")
    ] = ()
    """What is measured; * stands for anything."""
    list: bool = False
    """Say what there is to be measured, and measure nothing."""
    results: Annotated[
        Path, arg(metavar="FOLDER", help_behavior_hint="(default: benchmarks/results)")
    ] = KEPT
    """Where the results' folder is, or is made."""

    def __post_init__(self) -> None:
        for pattern in self.only:
            if not fnmatch.filter([each.name for each in MEASUREMENTS], pattern):
                raise UserError(f"nothing is called {pattern!r}; --list says what there is")

    @property
    def chosen(self) -> Sequence[Measurement]:
        """In the order in which they are measured."""
        return [
            each
            for each in MEASUREMENTS
            if not self.only or any(fnmatch.fnmatch(each.name, name) for name in self.only)
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/bench.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> int:
    here = environment("cpu", 1)
    known = known_seconds(options.results, machine(here))
    if options.list:
        rows = [[e.name, f"{minutes(e, known):.0f}", f"python {e.command}"] for e in options.chosen]
        print(table(["", "minutes", "command"], rows))
        return 0
    folder = kept_folder(here, options.results)
    folder.mkdir(parents=True, exist_ok=True)
    print(headline(here))
    missing = [each for each in options.chosen if not (folder / f"{each.name}.csv").exists()]
    print(f"{folder}: {len(options.chosen) - len(missing)} of {len(options.chosen)} are there")
    failed = []
    for number, each in enumerate(missing):
        own, rest = (sum(minutes(e, known) for e in m) for m in ([each], missing[number:]))
        print(
            f"\n{number + 1} of {len(missing)}: {each.name}, about {own:.0f} minutes; with all "
            f"that follow {rest:.0f}\npython {each.command}",
            flush=True,
        )
        start = time.monotonic()
        if measure(each, folder, here["git_revision"]) and reaches_its_floor(each.name, folder):
            known[each.name] = time.monotonic() - start
            note_environment(folder, here, **{each.name: known[each.name]})
        else:
            failed.append(each.name)
    if failed:
        print(f"\nfailed, and not kept: {' '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def reaches_its_floor(name: str, folder: Path) -> bool:
    """Whether what was measured is as fast as is promised; what isn't is not kept."""
    path = folder / f"{name}.csv"
    if name not in FLOORS:
        return True
    ratio = times_as_fast(results.read(path))
    slow = ROOT / "results" / "bench" / f"{name}-slow.csv"
    if ratio < FLOORS[name]:
        print(
            f'{name}: save="features" is {ratio:.2f} times as fast as naive channels-last, less '
            f"than {FLOORS[name]}; its rows are in {slow}",
            file=sys.stderr,
        )
        path.rename(slow)
    return ratio >= FLOORS[name]


def times_as_fast(rows: Sequence[results.Row]) -> float:
    """naive channels-last's time over that of save="features", the median over the rounds."""
    times = {
        (row["provider"], row["sample"]): float(row["value"])
        for row in rows
        if row["metric"] == "step time" and row["value"] and not row["statistic"]
    }
    return median(
        seconds / times["effdense-features", sample]
        for (name, sample), seconds in times.items()
        if name == "naive-channels-last" and ("effdense-features", sample) in times
    )


def minutes(each: Measurement, known: dict[str, float]) -> float:
    """What it took on this machine, else what it is thought to take."""
    return known.get(each.name, 60 * each.minutes) / 60


def known_seconds(folder: Path, own: str) -> dict[str, float]:
    """What measurements took on this machine, the newest last."""
    found: dict[str, float] = {}
    for path in sorted(folder.glob(f"{own}-????-??-??-*")):
        found |= seconds_of(path)
    return found


def measure(each: Measurement, folder: Path, revision: str) -> bool:
    """Run its command; its results are there whole, or not at all.

    Raises:
        UserError: where the revision has changed meanwhile.
    """
    # not yet among the results, and seen by no report
    partial = ROOT / "results" / "bench" / f"{each.name}.csv"
    partial.parent.mkdir(parents=True, exist_ok=True)
    # as anybody would write it: rows say by which command they were measured
    output = str(partial.relative_to(ROOT))
    command = [sys.executable, *shlex.split(each.command), "--output", output]
    paths = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    if subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}).returncode != 0:
        return False
    rows = results.read(partial)
    if any(row["git_revision"] != revision for row in rows):
        raise UserError(
            f"{each.name} is not of revision {revision}, at which this began; measure again"
        )
    os.replace(partial, folder / f"{each.name}.csv")
    return True


if __name__ == "__main__":
    main()
