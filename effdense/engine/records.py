"""What a run writes: its work directory, config.yaml, the two CSV files and the weights.

Files that are written at once appear whole or not at all; CSV rows are on disk before the next
epoch begins.
"""

from __future__ import annotations

import csv
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from .config import ResolvedConfig
from .distributed import World
from .errors import UserError

TRAIN_COLUMNS = ("epoch", "step", "lr", "loss", "error")
TEST_COLUMNS = ("epoch", "step", "loss", "error", "samples")
_RUN_FILES = (
    "config.yaml",
    "train.csv",
    "test.csv",
    "system.csv",
    "loss.png",
    "error.png",
    "model.pt",
)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` write a file beside ``path``, then put it in place: whole or not at all.

    Raises:
        UserError: where the file system refuses.
    """
    # the suffix stays last: matplotlib chooses the format by it
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    with _writing(path):
        try:
            write(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


class CsvLog:
    """A CSV file with a header that grows by whole rows."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path, self._columns = path, tuple(columns)
        self._write(self._columns, "x")

    def add(self, **row: float | None) -> None:
        """Append one row and see it on disk; ``row`` names every column, None leaves it empty."""
        assert set(row) == set(self._columns)
        self._write([row[column] for column in self._columns], "a")

    def _write(self, cells: Sequence[object], mode: str) -> None:
        with _writing(self._path), self._path.open(mode, newline="") as file:
            csv.writer(file).writerow(cells)
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class WorkDir:
    """The folder of one run."""

    path: Path

    @classmethod
    def claim(cls, config: ResolvedConfig) -> WorkDir:
        """Make the folder; with --overwrite take away the run it holds.

        Raises:
            UserError: if it holds a run already or cannot be written.
        """
        with _writing(config.work_dir or Path("runs")):
            if config.work_dir is None:
                return cls(_first_free(Path("runs"), config.data))
            path = config.work_dir
            path.mkdir(parents=True, exist_ok=True)
            held = [path / name for name in _RUN_FILES if (path / name).exists()]
            if held and not config.overwrite:
                raise UserError(
                    f"{path} already holds a run ({held[0].name}): choose another --work-dir, or "
                    f"add --overwrite to replace it"
                )
            for file in held:
                file.unlink()
            probe = path / f".{os.getpid()}-probe"
            probe.touch()
            probe.unlink()
        return cls(path)

    def train_log(self) -> CsvLog:
        """A fresh train.csv: one row per epoch; error in per cent."""
        return CsvLog(self.path / "train.csv", TRAIN_COLUMNS)

    def test_log(self) -> CsvLog:
        """A fresh test.csv: one row per epoch; error in per cent."""
        return CsvLog(self.path / "test.csv", TEST_COLUMNS)

    def system_log(self, columns: Sequence[str]) -> CsvLog:
        """A fresh system.csv: see telemetry.py."""
        return CsvLog(self.path / "system.csv", columns)

    def write_config(self, config: ResolvedConfig, world: World, facts: Mapping[str, Any]) -> None:
        """config.yaml: every option, and what else reproduces the run."""
        options = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(config).items()
        }
        options["milestones"] = list(config.milestones)
        options["work_dir"] = str(self.path)
        content = {
            "command": shlex.join(sys.argv),
            "options": options,
            "processes": {
                "world_size": world.world_size,
                "local_world_size": world.local_world_size,
                "backend": world.backend,
                "device": _device_name(world.device),
            },
            **facts,
            "source": source_revision(),
            "versions": versions(),
        }
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        write_atomically(self.path / "config.yaml", lambda partial: _write_text(partial, text))

    def save_model(self, model: torch.nn.Module) -> Path:
        """model.pt: the state dict, for ``torch.load(path, weights_only=True)``."""
        path = self.path / "model.pt"
        write_atomically(path, lambda partial: torch.save(model.state_dict(), partial))
        return path


def _first_free(parent: Path, name: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = parent / f"{name}-{number}"
        with suppress(FileExistsError):
            path.mkdir()
            return path
        number += 1


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device.type}: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {platform.processor() or platform.machine()}"


def versions() -> dict[str, str]:
    """Versions of Python, the system and the packages that a result may depend on."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in ("effdense", "torch", "torchvision", "triton", "numpy", "scikit-learn"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def source_revision() -> str | None:
    """The git commit this package is run from, with "+changes" if it differs; None if none.

    None too when it is installed and merely lies inside some other repository.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
