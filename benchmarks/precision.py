"""The digits run in 16 bits beside float32: test errors and losses by epoch.

    python benchmarks/precision.py
    python benchmarks/precision.py --epochs 30

Each is a run of train_ddp.py in a process and a folder of its own, from the same seed. ``steps``
of the rows by epoch is the epoch.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.case import CIFAR_FAMILY, Case
from harness.case import Options as CommonOptions
from harness.kept import ROOT
from harness.pictures import picture
from harness.results import Recorder, Row

from effdense.choices import DtypeName
from effdense.commands import front_end
from effdense.engine import plots
from effdense.errors import UserError
from effdense.machine.environment import headline
from effdense.machine.tables import table

OPTIONS: dict[DtypeName, list[str]] = {"float32": [], "bfloat16": ["--dtype", "bfloat16"]}
DEPTH, GROWTH_RATE, BATCH_SIZE = 22, 12, 64


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    epochs: int = 12
    """Of each run."""


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/precision.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> None:
    path = options.output or Path("results") / "precision.csv"
    cells = []
    with Recorder(path, "precision", "cpu", options.threads) as recorder:
        print(headline(recorder.environment))
        for dtype in OPTIONS:
            loss, error = measure(dtype, options, recorder)
            cells.append([dtype, f"{error:.2f}", f"{loss:.4f}"])
    print()
    print(table(["digits", "test error, %", "last training loss"], cells))
    picture(draw, [path], path.with_suffix(".png"))
    print(f"\n{path}")


def measure(dtype: DtypeName, options: Options, recorder: Recorder) -> tuple[float, float]:
    """The last epoch's training loss and test error; those of all are recorded."""
    size = {"depth": DEPTH, "growth-rate": GROWTH_RATE, "batch-size": BATCH_SIZE}
    given = {"data": "digits", **size, "epochs": options.epochs, "threads": options.threads}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train_ddp.py"), *words, *OPTIONS[dtype]]
        done = subprocess.run(
            [*command, "--work-dir", folder], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        if done.returncode != 0:
            raise UserError(f"the run in {dtype} failed: {done.stderr.decode().strip()[-300:]}")
        train = plots.read(Path(folder) / "train.csv", ["loss"])
        test = plots.read(Path(folder) / "test.csv", ["error"])
    case = Case(CIFAR_FAMILY, DEPTH, GROWTH_RATE, BATCH_SIZE, 8, dtype)
    for epoch, (loss, error) in enumerate(zip(train["loss"], test["error"], strict=True), 1):
        recorder.add("effdense-features", case, "training loss", loss, "nat", steps=epoch)
        recorder.add("effdense-features", case, "error after an epoch", error, "%", steps=epoch)
    recorder.add("effdense-features", case, "test error", test["error"][-1], "%")
    recorder.add("effdense-features", case, "last training loss", train["loss"][-1], "nat")
    return train["loss"][-1], test["error"][-1]


def draw(figure: Any, rows: list[Row]) -> None:
    """Losses over the epochs, and beside them the test errors."""
    for axes, metric, label in zip(
        figure.subplots(1, 2),
        ("training loss", "error after an epoch"),
        ("training loss", "test error, %"),
        strict=True,
    ):
        for dtype, style in (("float32", "-"), ("bfloat16", "--")):
            own = [row for row in rows if (row["metric"], row["dtype"]) == (metric, dtype)]
            epochs = [int(row["steps"]) for row in own]
            axes.plot(epochs, [float(row["value"]) for row in own], style, label=dtype)
        axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()


if __name__ == "__main__":
    main()
