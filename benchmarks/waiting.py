"""How threads should wait for each other: steps of a small network, alone and among other work.

    python benchmarks/waiting.py
    python benchmarks/waiting.py --seconds 8 --rounds 5

Threads that wait spin before they sleep, by GNU OpenMP's GOMP_SPINCOUNT and OMP_WAIT_POLICY. Every
setting runs in a process of its own, in turn, with nothing beside it and beside two processes a
core that compute without end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from harness.case import CIFAR_FAMILY, Case
from harness.results import Recorder

from effdense.commands import front_end
from effdense.machine.environment import headline, usable_cores
from effdense.machine.tables import table

# what `make train` trains
DIGITS = Case(CIFAR_FAMILY, 22, 12, 64, 8)
SETTINGS = ("", "GOMP_SPINCOUNT=3000", "OMP_WAIT_POLICY=passive")
"""Variables of the environment; the first is the default."""
PLACES = ("alone", "among others")
_BUSY = "while True: pass"


@dataclass(frozen=True)
class Options:
    threads: int = 2
    """Of each process that is measured."""
    seconds: float = 4.0
    """Of steps that a process takes after the first three."""
    rounds: int = 3
    """Of all settings, in turn."""
    output: Path = Path("results/waiting.csv")
    """Where the rows go."""


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/waiting.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> None:
    speeds: dict[tuple[str, str], list[float]] = {}
    with Recorder(options.output, "waiting", "cpu", options.threads) as recorder:
        print(headline(recorder.environment))
        for sample in range(options.rounds):
            for place in PLACES:
                for setting in SETTINGS:
                    neighbours = 2 * usable_cores() if place == "among others" else 0
                    with busy(neighbours):
                        speed = images_per_second(setting, options.threads, options.seconds)
                    speeds.setdefault((place, setting), []).append(speed)
                    recorder.add(
                        setting or "default",
                        DIGITS,
                        "throughput",
                        speed,
                        "images/s",
                        sample=sample,
                        detail=place,
                    )
            print(_table(speeds), flush=True)


def _table(speeds: dict[tuple[str, str], list[float]]) -> str:
    cells = [
        [place, *(f"{median(speeds[place, setting]):,.0f}" for setting in SETTINGS)]
        for place in PLACES
    ]
    return table(["images/s", *(setting or "default" for setting in SETTINGS)], cells)


@contextmanager
def busy(processes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes that compute without end, within the body."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(processes):
            started.append(subprocess.Popen([sys.executable, "-c", _BUSY]))
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def images_per_second(setting: str, threads: int, seconds: float) -> float:
    """Of training steps in a fresh process, which has ``setting`` in its environment."""
    left = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in left}
    environment |= dict(part.split("=") for part in [setting] if part)
    words = [sys.executable, __file__, _CHILD, str(threads), str(seconds)]
    said = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(said.stdout)


_CHILD = "--in-this-process"


def _take_steps(threads: int, seconds: float) -> float:
    import torch
    from harness import providers

    torch.set_num_threads(threads)
    step = providers.setup("effdense-bottlenecks", DIGITS).step
    for _ in range(3):
        step()
    taken, began = 0, time.monotonic()
    while (elapsed := time.monotonic() - began) < seconds or not taken:
        step()
        taken += 1
    return DIGITS.batch_size * taken / elapsed


if __name__ == "__main__":
    if sys.argv[1:2] == [_CHILD]:
        print(_take_steps(int(sys.argv[2]), float(sys.argv[3])))
    else:
        main()
