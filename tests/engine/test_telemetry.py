"""system.csv, and NVML through the real nvidia-ml-py on a stub of NVIDIA's library."""

from __future__ import annotations

import csv
import json
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from effdense.engine import distributed, telemetry
from effdense.engine.distributed import World
from effdense.engine.options import TrainConfig
from effdense.engine.telemetry import SYSTEM_COLUMNS, Gpu, Telemetry
from effdense.engine.training import train
from effdense.errors import UserError
from effdense.machine.memory import peak_resident_bytes, resident_bytes
from tests.helpers.launch import REPOSITORY, Launch

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
ALL = {
    "gpu_used": 3 << 30,
    "gpu_utilisation_percent": 93,
    "gpu_celsius": 57,
    "gpu_watts": 312.5,
}

# Asks one GPU as often as there are names, each with that NVML function failing.
_ASK = """
import json, os, sys
from effdense.engine.telemetry import Gpu
found = []
uuid, *failing = sys.argv[1:]
for name in failing:
    os.environ["NVML_STUB"] = "init" if name == "init" else ""
    gpu = Gpu(uuid)
    os.environ["NVML_STUB"] = name
    found.append([gpu.failure, gpu.figures()])
print(json.dumps(found))
"""


def ask(library: Path | None, uuid: str, *failing: str) -> list[Any]:
    """(failure, figures) for each failing function, from a fresh process."""
    path = {} if library is None else {"LD_LIBRARY_PATH": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", _ASK, uuid, *failing],
        capture_output=True,
        text=True,
        env={**os.environ, **path},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stub under the name by which nvidia-ml-py loads the real one."""
    if COMPILER is None:
        pytest.skip("no C compiler (cc, gcc, clang) to build the stub of NVML with")
    if not sys.platform.startswith("linux"):
        pytest.skip("the loader's LD_LIBRARY_PATH is Linux's")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).parent / "nvml_stub.c"
    output = folder / "libnvidia-ml.so.1"
    command = [COMPILER, "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(output), str(source)]
    subprocess.run(command, check=True)
    return folder


def test_the_driver_s_figures_and_each_one_s_absence(nvml: Path) -> None:
    names = ("memory", "utilisation", "temperature", "power")
    answers = ask(nvml, "0123", "none", *names, "lost", "init")
    assert answers[0] == ["", ALL]
    for (failure, figures), missing in zip(answers[1:5], ALL, strict=True):
        assert failure == ""
        assert figures == {name: value for name, value in ALL.items() if name != missing}
    assert answers[5] == ["", {}]
    assert answers[6] == ["Driver Not Loaded", {}]


def test_a_gpu_that_the_driver_does_not_know(nvml: Path) -> None:
    assert ask(nvml, "GPU-9", "none") == [["Not Found", {}]]


def test_without_the_library(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("no library")
    assert ask(tmp_path, "0123", "none") == [["NVML Shared Library Not Found", {}]]


def test_without_nvidia_ml_py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpu = Gpu("0123")
    assert "pynvml" in gpu.failure
    assert gpu.figures() == {}


def test_resident_memory_is_this_process_s() -> None:
    before = resident_bytes()
    # from the system itself: the allocator may have that much left, resident already
    with mmap.mmap(-1, 64 << 20) as block:
        block.write(bytes(64 << 20))
        assert resident_bytes() - before >= 60 << 20
    assert peak_resident_bytes() >= before + (60 << 20)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames or ()) == SYSTEM_COLUMNS
        return list(reader)


@pytest.mark.slow
def test_every_rank_s_rows_at_the_interval_and_the_epochs_ends(
    launch: Launch, tmp_path: Path
) -> None:
    options = "--data fake --depth 10 --growth-rate 4 --image-size 8 --epochs 2 --batch-size 200"
    process = launch(
        2,
        REPOSITORY / "train_ddp.py",
        *options.split(),
        "--system-interval",
        2,
        "--work-dir",
        "run",
    )
    assert process.returncode == 0, process.stderr
    with (tmp_path / "run" / "train.csv").open() as file:
        (first, second) = (int(row["step"]) for row in csv.DictReader(file))
    expected = sorted({*range(2, second + 1, 2), first, second})
    found = rows(tmp_path / "run" / "system.csv")
    assert [(int(r["step"]), int(r["rank"])) for r in found] == [
        (step, rank) for step in expected for rank in (0, 1)
    ]
    for row in found:
        assert int(row["epoch"]) == (1 if int(row["step"]) <= first else 2)
        assert 0 < int(row["resident"]) <= int(row["resident_peak"]) < 4 << 30
        # no GPU, no figure: not a zero
        if not torch.cuda.is_available():
            assert all(row[name] == "" for name in SYSTEM_COLUMNS[5:])


def test_no_interval_no_file(tmp_path: Path) -> None:
    small: dict[str, Any] = {"data": "fake", "depth": 10, "growth_rate": 4, "image_size": 8}
    work_dir = tmp_path / "run"
    train(TrainConfig(**small, epochs=1, device="cpu", system_interval=0, work_dir=work_dir))
    assert not (work_dir / "system.csv").exists()


def test_a_disk_that_refuses_a_row_stops_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def add(self, **row: Any) -> None:
            raise UserError("cannot write system.csv: No space left on device")

    said: list[str] = []

    def gathered(own: str) -> list[str]:
        said.append(own)
        return [said[0], own]

    monkeypatch.setattr(distributed, "gathered", gathered)
    log: Any = Full()
    for rank, its_log in enumerate((log, None)):
        world = World(rank, 2, rank, 2, torch.device("cpu"), "gloo")
        with pytest.raises(UserError, match="No space left"):
            Telemetry(world, 1, its_log).after_step(1, 1, False)
    assert said[1] == ""


class _Log:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        self.rows.append(row)


def test_a_gpu_s_figures_and_its_driver_s_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a CUDA device, with torch's and the driver's answers put in."""

    class Silent:
        failure = "Driver Not Loaded"

        def figures(self) -> dict[str, float]:
            return {}

    allocated = {"memory_allocated": 1, "max_memory_allocated": 2}
    allocated |= {"memory_reserved": 3, "max_memory_reserved": (1 << 53) - 1}
    for name, value in allocated.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(telemetry.Gpu, "of", lambda device: Silent())
    world = World(0, 1, 0, 1, torch.device("cuda", 0), None)
    log: Any = _Log()
    recorder = Telemetry(world, 1, log)
    assert "Driver Not Loaded" in recorder.warning
    recorder.after_step(1, 1, False)
    (row,) = log.rows
    assert [row[name] for name in SYSTEM_COLUMNS[5:9]] == [1, 2, 3, (1 << 53) - 1]
    assert all(row[name] is None for name in telemetry._OF_DRIVER)
