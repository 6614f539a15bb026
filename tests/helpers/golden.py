"""Fifty steps of small runs, whose every loss is on record in ``tests/engine/golden/``.

    python -m tests.helpers.golden [NAME ...]    # records this machine's bits

Weights begin as exact fractions, and nothing is drawn that differs between processors, so that
machines differ by rounding alone: of the losses by 7e-13 at most in float64, seen between our two
backends, and between AVX-512 and AVX2; by 6 %, and of the test errors by 10 %, in bfloat16, which
rounds to 8 bits. (With neither of those instructions torch resizes 8-bit images otherwise.) A
record holds the bits of each machine it was made on, by backend: there every bit must be the same.
Elsewhere the curve must be, to TOLERANCE. Where the curve itself is no longer what it was,
recording drops the other machines' bits, and the commit says why it had to change.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import effdense
from effdense import TrainConfig
from effdense.backends.cpu_library import DTYPES as LOOP_DTYPES
from effdense.backends.cpu_library import find_compiler
from effdense.choices import BackendName
from effdense.engine.trainer import Step, Trainer
from effdense.machine.environment import processor
from tests.helpers.pictures import write_folder, write_xrays

Curve = dict[str, Any]
RECORDS = Path(__file__).parents[1] / "engine" / "golden"
STEPS = 50
TOLERANCE = {torch.float64: 1e-10, torch.bfloat16: 0.15}
"""Relative, of losses in what the products are in."""


@dataclass(frozen=True)
class Family:
    """One kind of run."""

    options: dict[str, Any]
    """Besides those of all; paths are in the folder of the run."""
    channels: int
    classes: int
    spatial_dims: int = 2

    @property
    def dtype(self) -> torch.dtype:
        """Of the products; of bfloat16, weights are float32."""
        return torch.bfloat16 if "dtype" in self.options else torch.float64

    @property
    def backends(self) -> tuple[BackendName, ...]:
        return ("torch", "cpu") if self.dtype in LOOP_DTYPES else ("torch",)


DIGITS: dict[str, Any] = {"data": "digits", "batch_size": 57, "epochs": 2}
TABLE: dict[str, Any] = {"data": "csv", "data_dir": "data", "table": "data/table.csv"}
FAMILIES = {
    "digits": Family(DIGITS | {"label_smoothing": 0.1, "ema": 0.9, "warmup_epochs": 0.5}, 1, 10),
    "imagefolder": Family(
        {
            **{"data": "imagefolder", "data_dir": "data", "image_size": 16, "num_workers": 0},
            **{"batch_size": 6, "epochs": 5, "optimizer": "adamw", "lr": 0.003, "clip_grad": 1.0},
        },
        *(3, 2),
    ),
    "labels": Family(
        TABLE
        | {
            **{"label_columns": ("Edema", "Fracture", "Mass"), "group_column": "patient"},
            **{"image_size": 16, "channels": 1, "num_workers": 0, "balance": "loss"},
            **{"window": (20_000.0, 30_000.0), "batch_size": 8, "epochs": 5, "accumulate": 2},
        },
        *(1, 3),
    ),
    "volumes": Family(
        TABLE
        | {
            **{"label_columns": ("finding",), "image_column": "volume", "spatial_dims": 3},
            **{"crop": (8, 8, 8), "window": (-200.0, 600.0), "num_workers": 0, "channels": 1},
            **{"group_column": "patient", "batch_size": 4, "epochs": 5},
        },
        *(1, 2, 3),
    ),
    "bfloat16": Family(DIGITS | {"dtype": "bfloat16"}, 1, 10),
}


class InDouble(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.network(images.double())
        return answer


def network(family: Family, backend: BackendName) -> nn.Module:
    """Small, with weights that every machine draws alike: multiples of 2^-20."""
    made = effdense.densenet_bc(
        depth=16,
        growth_rate=4,
        num_classes=family.classes,
        in_channels=family.channels,
        spatial_dims=family.spatial_dims,
        backend=backend,
    )
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            drawn = torch.randint(-(2**20), 2**20 + 1, parameter.shape, generator=source)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            # powers of two, so that nothing is rounded
            parameter.copy_(drawn / 2**20 * 2.0 ** -round(np.log2(fan_in) / 2 - 1))
    return InDouble(made.double()) if family.dtype == torch.float64 else made


def _write_data(name: str, root: Path) -> None:
    if name == "imagefolder":
        write_folder(root, train=30, val=6)
    elif name == "labels":
        write_xrays(root, 100)
    elif name == "volumes":
        root.mkdir()
        generator = np.random.default_rng(0)
        rows = ["volume,patient,finding"]
        for i in range(50):
            values = generator.integers(-100, 100, (11, 10 + i % 3, 9))
            finding = ("none", "mass")[i % 4 // 2]
            values[3:8, 3:8, 3:8] += 400 * (finding == "mass")
            np.save(root / f"{i}.npy", values.astype(np.int16))
            rows.append(f"{i}.npy,{i // 2},{finding}")
        (root / "table.csv").write_text("\n".join(rows))


def curve(name: str, backend: BackendName, folder: Path) -> Curve:
    """A run in ``folder``: the loss of every step; of each epoch's test loss and error."""
    family = FAMILIES[name]
    _write_data(name, folder / "data")
    config = TrainConfig(
        threads=1, backend=backend, seed=3, work_dir=folder / "run", **family.options
    )
    with _in(folder), _losses() as losses:
        result = effdense.train(config, model=network(family, backend))
    tests = [figure for score in result.tests.values() for figure in (score.loss, score.error)]
    return {"losses": losses, "tests": tests}


@contextmanager
def _in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _losses() -> Iterator[list[float]]:
    """Of every step within."""
    seen: list[float] = []
    step = Trainer.step

    def watched(self: Trainer, *arguments: Any) -> Step:
        result = step(self, *arguments)
        seen.append(float(result.loss))
        return result

    with mock.patch.object(Trainer, "step", watched):
        yield seen


def facts(backend: str) -> dict[str, str]:
    """What the bits depend on besides the code."""
    about = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    found = re.findall(r"^(cpu family|model|stepping|flags)\s*: (.*)$", about, re.MULTILINE)
    cpu = dict(found[:4])
    # what torch's and the vendor's libraries choose their code by
    wide = [flag for flag in cpu.get("flags", "").split() if re.match("avx|amx|fma", flag)]
    environment = {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": f"{processor()}, {' '.join(list(cpu.values())[:3])}",
        "instructions": " ".join(wide),
    }
    packages = ("torch", "torchvision", "numpy", "pillow", "scikit-learn")
    environment |= {package: metadata.version(package) for package in packages}
    if backend == "cpu":
        said = subprocess.run(
            [*find_compiler(), "--version"], capture_output=True, text=True, check=True
        )
        environment["compiler"] = said.stdout.splitlines()[0]
    return environment


def expected(name: str) -> dict[str, Any]:
    """The record of a family."""
    record: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text())
    return record


def bits(found: Curve) -> Curve:
    """As they are written: every bit of them."""
    return {what: [float(value).hex() for value in values] for what, values in found.items()}


def distance(found: Curve, record: dict[str, Any]) -> float:
    """The largest of the relative differences from a record's curve."""
    pairs = [
        (new, float.fromhex(old))
        for what, values in record["curve"].items()
        for new, old in zip(found[what], values, strict=True)
    ]
    return max(abs(new - old) / max(abs(old), 1e-3) for new, old in pairs)


def recorded(name: str, found: Mapping[BackendName, Curve]) -> str:
    """Write what a machine found with each backend; what that changes."""
    path, machine = RECORDS / f"{name}.json", []
    record: dict[str, Any] = {}
    said = "new"
    if path.exists():
        record = expected(name)
        apart = max(distance(curve, record) for curve in found.values())
        said = f"{apart:.1e} from the record"
        if apart <= TOLERANCE[FAMILIES[name].dtype]:
            ours = [(facts(backend), backend) for backend in found]
            machine = [m for m in record["bits"] if (m["facts"], m["backend"]) not in ours]
        else:
            record = {}
            said += ": another curve"
    for backend, curve in found.items():
        machine.append({"facts": facts(backend), "backend": backend, **bits(curve)})
    curve = record.get("curve") or bits(next(iter(found.values())))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"curve": curve, "bits": machine}, indent=1) + "\n")
    return said


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or FAMILIES:
        found: dict[BackendName, Curve] = {}
        for backend in FAMILIES[name].backends:
            with tempfile.TemporaryDirectory() as folder:
                found[backend] = curve(name, backend, Path(folder))
        print(f"{name}: {recorded(name, found)}")


if __name__ == "__main__":
    main()
