"""A small run for hours, killed and gone on with: does it take more and more of anything?

    python -m tests.helpers.soak [--minutes 120] [--kills 10] [--output results/soak.csv]

Two processes, each with a loader process, train on image files and write a checkpoint every few
seconds. At random times one of them or both are killed, and the same command is given again. Every
few seconds it is counted what all processes of the run hold: memory, file descriptors, threads;
and what lies on disk. At the end each is judged: flat, or growing by more than its noise.
--output keeps the judgement, as ``benchmarks/report.py --add`` takes it; all samples go beside it.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean

from harness.case import CIFAR_FAMILY, Case
from harness.results import Recorder

from effdense.engine.checkpoint import CheckpointStore
from tests.helpers.pictures import write_folder
from tests.helpers.ranks import Ranks, wait_for

WORLD_SIZE = 2
HANG_SECONDS = 120
SECONDS_TO_DIE = 20
"""In which a run's processes must be gone once its ranks have ended, loaders too."""
STANDARD_ERRORS = 4
MATERIAL = 0.01
"""A slope counts where it is so many standard errors, and adds such a share of the level in an
hour."""
# of the processes, which begin anew after a kill; the others of the disk, which does not
HELD = {"processes": "", "memory": "B", "descriptors": "", "threads": ""}
LEFT = {"disk": "B", "files": "", "temporary files": ""}
# a row an epoch, by design
RECORDS = ("records", "B")


@dataclass(frozen=True)
class Sample:
    seconds: float
    """Since the start."""
    life: int
    """How many kills there were before."""
    values: dict[str, float]


@dataclass(frozen=True)
class Judgement:
    mean: float
    least: float
    most: float
    slope: float
    """An hour."""
    error: float
    """Standard error of the slope."""

    @property
    def grows(self) -> bool:
        is_clear = self.slope > STANDARD_ERRORS * self.error
        return is_clear and self.slope > MATERIAL * self.mean


def judged(lives: Sequence[Sequence[tuple[float, float]]], block: float = 30) -> Judgement:
    """One slope of all lives' (seconds, value), each with a level of its own.

    Neighbouring samples resemble each other, so means of ``block`` seconds stand for them: else
    noise that lasts would pass for a slope.

    Raises:
        ValueError: for too few samples to tell a slope from noise.
    """
    values = [value for life in lives for _, value in life]
    square = product = 0.0
    centred, number = [], 0
    for life in lives:
        grouped = groupby(life, key=lambda sample: sample[0] // block)
        blocks = [[fmean(column) for column in zip(*group, strict=True)] for _, group in grouped]
        if not blocks:
            continue
        when, level = (fmean(column) for column in zip(*blocks, strict=True))
        centred += [(seconds - when, value - level) for seconds, value in blocks]
        number += 1
    square = sum(seconds**2 for seconds, _ in centred)
    product = sum(seconds * value for seconds, value in centred)
    free = len(centred) - number - 1
    if free < 1 or not square:
        raise ValueError(f"{len(centred)} blocks of {number} lives are too few for a slope")
    slope = product / square
    rest = sum((value - slope * seconds) ** 2 for seconds, value in centred)
    error = math.sqrt(rest / free / square)
    return Judgement(fmean(values), min(values), max(values), 3600 * slope, 3600 * error)


def processes_in(folder: Path) -> list[int]:
    """Every process whose working directory this is: ranks, their loaders, and orphans of both."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(folder):
                found.append(int(entry.name))
    return found


def usage(folder: Path, temporary: Path, known: set[int]) -> dict[str, float]:
    """What the processes in ``folder`` hold, and what lies there.

    Args:
        folder: where the run was started.
        temporary: where it puts temporary files.
        known: every process that was ever seen, for what it may have left in shared memory;
            grows.
    """
    found = dict.fromkeys([*HELD, *LEFT, RECORDS[0]], 0.0)
    for process in processes_in(folder):
        known.add(process)
        about = Path("/proc") / str(process)
        # one that ends meanwhile is as good as not there
        with suppress(OSError, TypeError):
            # what forks share is shared out among them
            shared_out = re.search(r"^Pss:\s+(\d+)", (about / "smaps_rollup").read_text(), re.M)
            threads = re.search(r"^Threads:\s+(\d+)", (about / "status").read_text(), re.M)
            held = {
                "processes": 1,
                "memory": 1024 * int(shared_out[1]),  # type: ignore[index]
                "descriptors": len(os.listdir(about / "fd")),
                "threads": int(threads[1]),  # type: ignore[index]
            }
            for name, number in held.items():
                found[name] += number
    for path in _files(folder / "run"):
        with suppress(OSError):
            nbytes = path.stat().st_blocks * 512
            if path.suffix == ".csv" or path.name == "run.json":
                found["records"] += nbytes
            else:
                found["disk"] += nbytes
                found["files"] += 1
    found["temporary files"] = sum(1 for _ in _files(temporary)) + sum(
        any(f"_{process}_" in name for process in known) for name in os.listdir("/dev/shm")
    )
    return found


def _files(folder: Path) -> Iterator[Path]:
    for where, _, names in os.walk(folder):
        yield from (Path(where, name) for name in names)


def all_of(ranks: Ranks) -> bool:
    """Whether no rank has ended."""
    return len(ranks.running()) == WORLD_SIZE


@dataclass
class Soak:
    """A run that is being soaked.

    Args:
        folder: an empty one.
        seconds: how long; less what it takes to start again. Afterwards what it took in all.
        kills: how many, spread over that time.
        interval: seconds between samples.
        seed: of times and victims.
        images: of each of two classes.
    """

    folder: Path
    seconds: float
    kills: int
    interval: float = 5
    seed: int = 0
    images: int = 1000
    samples: list[Sample] = field(default_factory=list)
    orphans: int = 0
    """Processes that outlived their run."""
    endings: list[str] = field(default_factory=list)
    """What the run said where it ended though nobody had killed it: it is started again then."""

    def run(self) -> None:
        """Do it.

        Raises:
            AssertionError: where the run does not go on after a kill.
        """
        source = random.Random(self.seed)
        self._home = (self.folder / "home").resolve()
        self._temporary = self.folder / "temporary"
        for folder in (self._home, self._temporary):
            folder.mkdir(parents=True)
        write_folder(self.folder / "images", train=self.images, val=10)
        self._known: set[int] = set()
        share = self.seconds / (self.kills + 1)
        # not in step with checkpoints or epochs
        lengths = [share * source.uniform(0.7, 1.3) for _ in range(self.kills + 1)]
        self._began = time.monotonic()
        life = resumed = 0
        while lengths:
            resumed += bool(CheckpointStore(self._home / "run" / "checkpoints", 1).positions())
            with Ranks(self._home, self._command(), WORLD_SIZE) as ranks:
                if not self._watch(ranks, life, lengths[0]):
                    self._wait_briefly(ranks)
                    self.endings.append("".join(map(ranks.said, range(WORLD_SIZE)))[-4000:])
                elif len(lengths) > 1:
                    both = source.random() < 0.3
                    for rank in range(WORLD_SIZE) if both else [source.randrange(WORLD_SIZE)]:
                        ranks.send(rank, signal.SIGKILL)
                    self._wait_briefly(ranks)
                    lengths.pop(0)
                else:
                    ranks.send(0, signal.SIGTERM)
                    statuses = ranks.wait()
                    if statuses != [75] * WORLD_SIZE:
                        self.endings.append(f"{statuses} {ranks.said()[-4000:]}")
                    lengths.pop(0)
            life += 1
            self._see_them_gone()
        said = (self._home / "rank-0.txt").read_text()
        assert said.count("going on from") == resumed, said[-4000:]
        self.seconds = time.monotonic() - self._began

    def _command(self) -> list[object]:
        return [
            *("--data", "imagefolder", "--data-dir", self.folder / "images", "--image-size", 16),
            *("--arch", "densenet_bc", "--depth", 10, "--growth-rate", 4),
            *("--batch-size", 16, "--epochs", 1_000_000),
            *("--num-workers", 1, "--threads", 1, "--drop-rate", 0.2),
            *("--checkpoint-minutes", 0.05, "--hang-timeout", HANG_SECONDS, "--work-dir", "run"),
        ]

    def _watch(self, ranks: Ranks, life: int, seconds: float) -> bool:
        """Sample as long, from where the run is under way; whether it was to the end."""
        wait_for(lambda: ranks.said().count(" training and ") > life or not all_of(ranks), 120)
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            time.sleep(min(self.interval, until - now))
            if not all_of(ranks):
                return False
            values = usage(self._home, self._temporary, self._known)
            self.samples.append(Sample(time.monotonic() - self._began, life, values))
        return True

    def _wait_briefly(self, ranks: Ranks) -> None:
        """For the others, who wait for a launcher's word and are killed if they still do."""
        with suppress(TimeoutError):
            wait_for(lambda: not ranks.running(), 10)

    def _see_them_gone(self) -> None:
        try:
            wait_for(lambda: not processes_in(self._home), SECONDS_TO_DIE)
        except TimeoutError:
            self.orphans += len(processes_in(self._home))

    def judgements(self, settling: float = 60, block: float = 30) -> dict[str, Judgement]:
        """Of each quantity; what the first ``settling`` seconds of a life bring is no growth."""
        names = (*HELD, *LEFT, RECORDS[0])
        return {name: judged(self._lives(name, settling), block) for name in names}

    def _lives(self, name: str, settling: float) -> list[list[tuple[float, float]]]:
        lives: list[list[tuple[float, float]]] = []
        for _, group in groupby(self.samples, key=lambda sample: sample.life):
            whole = [(sample.seconds, sample.values[name]) for sample in group]
            lives.append([(at, value) for at, value in whole if at - whole[0][0] >= settling])
        # what lies on the disk outlives the processes
        return lives if name in HELD else [[sample for life in lives for sample in life]]


def _record(soak: Soak, found: dict[str, Judgement], output: Path) -> None:
    case = Case(CIFAR_FAMILY, 10, 4, 16, 16)
    units = HELD | LEFT | dict([RECORDS])
    with Recorder(output, "soak", "cpu", 1) as recorder:
        counted = {
            "minutes": soak.seconds / 60,
            "kills": soak.kills,
            "samples": len(soak.samples),
            "orphans": soak.orphans,
            "ended by itself": len(soak.endings),
        }
        for metric, number in counted.items():
            recorder.add("images", case, metric, number, "", processes=WORLD_SIZE)
        for name, judgement in found.items():
            for what, value in vars(judgement).items():
                recorder.add(
                    *("images", case, f"{name} {what}", value, units[name]),
                    processes=WORLD_SIZE,
                    status="growing" if judgement.grows else "flat",
                )
    with output.with_name(f"{output.stem}-samples.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seconds", "life", *units])
        for sample in soak.samples:
            writer.writerow(
                [f"{sample.seconds:.1f}", sample.life, *(f"{sample.values[n]:.0f}" for n in units)]
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120, help="how long (default 120)")
    parser.add_argument("--kills", type=int, default=10, help="how many (default 10)")
    parser.add_argument("--interval", type=float, default=5, help="seconds between samples (5)")
    parser.add_argument("--seed", type=int, default=0, help="of times and victims (default 0)")
    parser.add_argument("--output", type=Path, help="CSV file for the judgement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # before the server of processes is started: theirs go where they are counted
        os.environ["TMPDIR"] = str(Path(folder, "temporary"))
        soak = Soak(
            Path(folder), 60 * options.minutes, options.kills, options.interval, options.seed
        )
        soak.run()
    found = soak.judgements()
    for name, judgement in found.items():
        print(
            f"{name:16} {judgement.least:14,.0f} to {judgement.most:14,.0f}, an hour "
            f"{judgement.slope:+14,.1f} ± {judgement.error:10,.1f}: "
            f"{'growing' if judgement.grows else 'flat'}"
        )
    if options.output is not None:
        _record(soak, found, options.output)
    growing = [name for name, judgement in found.items() if judgement.grows]
    growing = [name for name in growing if name != RECORDS[0]]
    for said in soak.endings:
        print(f"ended by itself:\n{said}")
    if growing or soak.orphans or soak.endings:
        sys.exit(
            f"growing: {', '.join(growing) or 'nothing'}; orphans: {soak.orphans}; ended by "
            f"itself: {len(soak.endings)} times"
        )
    print(
        f"{soak.seconds / 60:.0f} minutes, {options.kills} kills, {len(soak.samples)} samples: flat"
    )


if __name__ == "__main__":
    main()
