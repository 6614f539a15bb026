"""Random kills of a short run on the digits: every one must end as if nothing had happened.

    python -m tests.helpers.chaos [--kills 50] [--seed 0] [--output results/chaos.csv]
    python -m tests.helpers.chaos --kills 0 --combinations

A run of three processes is started, one of them or all are killed after a random time, the rest
is waited for, and the same command is given again; after a few kills the run may end. Then its
weights, buffers, optimiser state, random states and CSV files are compared, bit for bit, with
those of a run that was left alone. Every kill's seed says what was killed and when. --output keeps
how many it were, as ``benchmarks/report.py --add`` takes it.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from harness.case import CIFAR_FAMILY, Case
from harness.results import Recorder

from tests.helpers import combinations
from tests.helpers.ranks import Ranks, final_state

WORLD_SIZE = 3
KILLS_PER_RUN = 5
RUN = [
    *("--data", "digits", "--depth", 10, "--growth-rate", 4, "--epochs", 2, "--batch-size", 64),
    *("--drop-rate", 0.2, "--threads", 1, "--checkpoint-steps", 4, "--work-dir", "run"),
]


@dataclass(frozen=True)
class Kill:
    """What one seed did."""

    seed: int
    """Of Python's random."""
    run: int
    """Which run it hit, from 0."""
    victims: str
    """Ranks that were sent SIGKILL."""
    after: float
    """Seconds after the start of the processes."""
    statuses: str
    """How the processes ended; waiting: not within ten seconds of the kill, and killed then."""
    newest: str
    """The newest checkpoint then."""


def kill_once(folder: Path, seed: int, run: int, longest: float) -> Kill | None:
    """Start the run and kill it; None if what was to be killed had ended before."""
    source = random.Random(seed)
    everyone = source.random() < 0.3
    victims = list(range(WORLD_SIZE)) if everyone else [source.randrange(WORLD_SIZE)]
    after = source.uniform(0, longest)
    with Ranks(folder, RUN, WORLD_SIZE) as ranks:
        ended = time.monotonic() + after
        while time.monotonic() < ended and ranks.running():
            time.sleep(0.002)
        if not ranks.running():
            return None
        for rank in victims:
            ranks.send(rank, signal.SIGKILL)
        # those that had not met the killed one yet wait for it, as long as torchrun lets them
        statuses = ranks.wait(10)
    if not any(statuses[rank] == -signal.SIGKILL for rank in victims):
        return None
    store = folder / "run" / "checkpoints"
    newest = max((path.name for path in store.glob("epoch-*")), default="none")
    return Kill(
        seed,
        run,
        " ".join(map(str, victims)),
        round(after, 3),
        " ".join("waiting" if status is None else str(status) for status in statuses),
        newest,
    )


def chaos(folder: Path, kills: int, seed: int = 0) -> tuple[list[Kill], int]:
    """Kill runs ``kills`` times.

    Returns:
        The kills, and how many runs were compared with the undisturbed one.

    Raises:
        AssertionError: where a run did not end with the same bits.
    """
    (folder / "undisturbed").mkdir(parents=True)
    with Ranks(folder, ["--help"]) as ranks:  # starts the server of processes
        ranks.wait()
    began = time.monotonic()
    _finish(folder / "undisturbed")
    longest = time.monotonic() - began
    expected = final_state(folder / "undisturbed" / "run")
    done: list[Kill] = []
    runs = 0
    while len(done) < kills:
        here = folder / f"run-{runs}"
        here.mkdir()
        for _ in range(min(KILLS_PER_RUN, kills - len(done))):
            killed = kill_once(here, seed, runs, longest)
            seed += 1
            if killed is None:
                break
            done.append(killed)
        _finish(here)
        assert final_state(here / "run") == expected, f"run {runs} differs: {done[-5:]}"
        runs += 1
    return done, runs


def _finish(folder: Path) -> None:
    with Ranks(folder, RUN, WORLD_SIZE) as ranks:
        assert ranks.wait() == [0] * WORLD_SIZE, ranks.said()


def _combinations(folder: Path, seed: int) -> None:
    data = combinations.write_data(folder / "data")
    for number, run in enumerate(combinations.runs(data, seed)):
        for world_size in (1, 2):
            here = folder / f"{number}-{world_size}"
            happened = combinations.goes_on(here, run, world_size, seed + number)
            print(f"combination {number}, {world_size} processes: {happened}", flush=True)
            shutil.rmtree(here)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how many (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the first kill (default 0)")
    parser.add_argument("--output", type=Path, help="CSV file for the counts")
    parser.add_argument(
        "--combinations", action="store_true", help="also runs that hold any two options together"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done, runs = chaos(Path(folder), options.kills, options.seed)
    if options.output is not None:
        case = Case(CIFAR_FAMILY, 10, 4, 64, 8)
        with Recorder(options.output, "chaos", "cpu", 1) as recorder:
            counted = {"kills": len(done), "runs": runs, "first seed": options.seed}
            for metric, number in counted.items():
                recorder.add("digits", case, metric, number, "", processes=WORLD_SIZE)
    for kill in done:
        print(kill)
    if options.combinations:
        with tempfile.TemporaryDirectory() as folder:
            _combinations(Path(folder), options.seed)
    print(f"{len(done)} kills, {runs} runs, every one ended with the bits of the undisturbed run")


if __name__ == "__main__":
    main()
