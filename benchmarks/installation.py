"""What the two commands of the README cost on a machine that has nothing: time and disk.

    python benchmarks/installation.py
    python benchmarks/installation.py --python python3.13

Clones the repository at its present commit into a temporary folder and runs there what the README
tells a user to run: what `make train` installs, the training itself, then what `make test` installs
besides. How long the downloads take is the network's; pip's cache is used where it is warm.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.case import CIFAR_FAMILY, Case
from harness.kept import ROOT
from harness.results import Recorder

from effdense.commands import front_end
from effdense.errors import UserError
from effdense.machine.environment import headline
from effdense.machine.tables import table

PROCESSES = 4
# what `make train` trains
DIGITS = Case(CIFAR_FAMILY, 22, 12, 64, 8)
STEPS = (
    ("installed for training", (".venv/.runs",)),
    ("training", ("train",)),
    ("installed for tests", ("install",)),
)


@dataclass(frozen=True)
class Options:
    python: str = f"python{sys.version_info.major}.{sys.version_info.minor}"
    """The interpreter that the environment is made of."""
    output: Path = Path("results/installation.csv")
    """Where the rows go."""


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/installation.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> None:
    cells = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Recorder(options.output, "installation", "cpu", 1) as recorder,
    ):
        print(headline(recorder.environment))
        clone = Path(folder) / "clone"
        _run("git", "clone", "--quiet", str(ROOT), str(clone))
        for name, targets in STEPS:
            start = time.monotonic()
            _run("make", *targets, f"PYTHON={options.python}", f"NPROC={PROCESSES}", cwd=clone)
            seconds = time.monotonic() - start
            size = _bytes_below(clone / ".venv")
            recorder.add(name, DIGITS, "time", seconds, "s", processes=PROCESSES)
            recorder.add(name, DIGITS, "environment", size, "bytes", processes=PROCESSES)
            cells.append([name, f"{seconds:.0f}", f"{size / 2**30:.1f}"])
            print(table(["", "s", "environment, GiB"], cells), flush=True)


def _run(*command: str, cwd: Path | None = None) -> None:
    """A command whose words are shown only where it fails."""
    # an active environment must not lend its packages to the new one
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip()
        raise UserError(f"{' '.join(command)} ended with status {done.returncode}:\n{said}")


def _bytes_below(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink())


if __name__ == "__main__":
    main()
