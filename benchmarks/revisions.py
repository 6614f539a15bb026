"""Training steps of this revision and of an older one, in turn: is anything slower than it was?

    python benchmarks/revisions.py --against 83be760 --arch densenet121 --batch-size 8
    python benchmarks/revisions.py --against 83be760 --arch densenet121 --spatial-dims 3

The older one is taken out of git into a folder of its own, where its own benchmarks build its own
network. Each revision steps in a process of its own; a ratio is formed within each round. Seconds
mean something on a quiet machine only.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from harness import providers
from harness.case import CaseOptions
from harness.kept import ROOT
from harness.results import Recorder, spread
from harness.speed import WorkerError, WorkerProcess
from tyro.conf import arg

from effdense.commands import front_end
from effdense.errors import UserError
from effdense.machine.environment import headline
from effdense.machine.measurement import process_environment
from effdense.machine.tables import table

DEFAULT = ("effdense-features",)


@dataclass(frozen=True, kw_only=True)
class Options(CaseOptions):
    against: Annotated[str, arg(metavar="REVISION")]
    """What this revision is compared with: a commit's name."""
    providers: Annotated[tuple[str, ...], providers.argument(DEFAULT)] = ()
    """Of both revisions."""
    rounds: int = 9
    """Samples of each."""
    seconds: float = 1.0
    """Shortest sample."""

    @property
    def names(self) -> list[str]:
        return providers.selected(self.providers, DEFAULT, self.case)


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/revisions.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> int:
    case = options.case
    path = options.output or Path("results") / f"revisions-{case.label()}.csv"
    rows = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        older = take_out(options.against, Path(folder))
        recorder = stack.enter_context(Recorder(path, "revisions", case.device, options.threads))
        print(headline(recorder.environment), flush=True)
        for name in options.names:
            try:
                times = race(options, name, Path(folder))
            except WorkerError as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 1
            for provider, samples in zip((name, f"{name}@{older}"), times, strict=True):
                for i, seconds in enumerate(samples):
                    recorder.add(provider, case, "step time", seconds, "s", sample=i)
            ratios = [new / old for new, old in zip(*times, strict=True)]
            rows.append([name, *(spread(each, 3) for each in (times[1], times[0], ratios))])
    print(f"\n{case.describe()}: s/step, median [20 %, 80 %]\n")
    print(table(["", f"at {older}", "here", "of its time"], rows))
    print(f"\n{path}")
    return 0


def take_out(revision: str, folder: Path) -> str:
    """A revision's code in a folder, where it is imported from; its short name.

    Raises:
        UserError: where git has no such revision, or another's code would be imported.
    """
    git = ["git", "-C", str(ROOT)]
    named = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", "--short", f"{revision}^{{commit}}"],
        capture_output=True,
        text=True,
    )
    if named.returncode != 0:
        raise UserError(f"--against must be a commit of this repository, got {revision!r}")
    archive = subprocess.run(
        [*git, "archive", revision, "effdense", "kernels", "benchmarks"],
        capture_output=True,
        check=True,
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder)
    # as it is packaged
    (folder / "effdense" / "kernels").symlink_to(folder / "kernels")
    code = "import effdense, effdense.kernels as k, harness; print(effdense.__file__, k.__file__)"
    env = process_environment(1) | {"PYTHONPATH": _paths(folder)}
    asked = [sys.executable, "-c", code]
    found = subprocess.run(asked, cwd=folder, env=env, capture_output=True, text=True)
    if found.stdout.count(os.path.realpath(folder)) + found.stdout.count(str(folder)) < 2:
        raise UserError(f"{revision} can't be run beside this revision: {found.stderr[-300:]}")
    return named.stdout.strip()


def _paths(folder: Path) -> str:
    return os.pathsep.join([str(folder / "benchmarks"), str(folder), *sys.path])


def race(options: Options, name: str, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds per step of this revision and of the older one, round by round."""
    with ExitStack() as stack:
        here, there = (
            stack.enter_context(WorkerProcess(options.threads, *older))
            for older in ((), (folder, _paths(folder)))
        )
        steps = 1
        for worker in (here, there):
            case = options.case.columns()
            worker.ask("setup", provider=name, case=case, threads=options.threads)
            steps = max(steps, worker.ask("warm_up", seconds=options.seconds)["steps"])
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(options.rounds):
            # neither always goes first
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                seconds = (here, there)[which].ask("sample", steps=steps)["seconds"]
                times[which].append(seconds)
    return times


if __name__ == "__main__":
    main()
