"""What a run writes: its work directory, config.yaml, the two CSV files and the weights.

Files that are written at once appear whole or not at all; CSV rows are on disk before the
checkpoint that counts them.
"""

from __future__ import annotations

import csv
import io
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from yaml import YAMLError

from effdense.machine.environment import source_revision, versions

from ..errors import UserError
from .checkpoint import Position, flush, flush_folder, refuse_newer
from .distributed import World
from .lock import Lock
from .mistakes import Mistake
from .options import ResolvedConfig, renamed
from .scores import Score

LOG_COLUMNS = {
    "train.csv": ("epoch", "step", "lr", "loss", "error"),
    "test.csv": ("epoch", "step", "loss", "error", "samples"),
    # what else the task is measured by, whose names are added; see scores.py
    "scores.csv": ("epoch", "step"),
    # what a clock says; all else is the same bits after a resumption
    "speed.csv": ("epoch", "step", "seconds", "images_per_second", "wait_percent", "memory_mib"),
    # one row per process; see telemetry.py
    "system.csv": (
        *("epoch", "step", "rank", "resident", "resident_peak"),
        *("cuda_allocated", "cuda_allocated_peak", "cuda_reserved", "cuda_reserved_peak"),
        *("gpu_used", "gpu_utilisation_percent", "gpu_celsius", "gpu_watts"),
    ),
}
CHECKPOINTS = "checkpoints"
FORMAT = 1
"""Of config.yaml, and of what exported weights say of their run."""
_RUN_FILES = (
    "config.yaml",
    *LOG_COLUMNS,
    "classes.csv",
    "confusion.csv",
    "mistakes.csv",
    "loss.png",
    "error.png",
    "learning-rate.png",
    "images-per-second.png",
    "memory.png",
    "report.html",
    "model.safetensors",
    "last.safetensors",
    "model.pt",
    CHECKPOINTS,
)

# What write_atomically leaves of them where its process is killed.
_PARTIAL = re.compile(rf"\.[0-9]+-({'|'.join(map(re.escape, _RUN_FILES))})")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it a file system that refuses to write ``path`` is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` write a file beside ``path``, then put it in place: whole or not at all.

    Raises:
        UserError: where the file system refuses.
    """
    # the suffix stays last: matplotlib chooses the format by it
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    with writing(path):
        try:
            write(partial)
            with partial.open("rb") as file:
                flush(file.fileno())
            os.replace(partial, path)
            flush_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_output(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` write a file that a command was told to: whole or not at all.

    A link stays, and a device or a pipe takes what comes.

    Raises:
        UserError: where the file system refuses.
    """
    if path.exists() and not path.is_file():
        with writing(path):
            write(path)
        return
    write_atomically(Path(os.path.realpath(path)) if path.is_symlink() else path, write)


class CsvLog:
    """A CSV file with a header that grows by whole rows.

    Args:
        path: the file.
        columns: its header.
        text: the file as it stood at the checkpoint the run goes on from; empty: a new one.
    """

    def __init__(self, path: Path, columns: Sequence[str], text: str = "") -> None:
        self._path, self._columns = path, tuple(columns)
        start = (text or _csv_line(self._columns)).encode()
        write_atomically(path, lambda partial: partial.write_bytes(start))

    def add(self, **row: float | None) -> None:
        """Append one row and see it on disk; ``row`` names every column, None leaves it empty."""
        assert set(row) == set(self._columns)
        with writing(self._path), self._path.open("a", newline="") as file:
            file.write(_csv_line([row[column] for column in self._columns]))
            file.flush()
            flush(file.fileno())

    def text(self) -> str:
        """The whole file."""
        with writing(self._path), self._path.open(newline="") as file:
            return file.read()


def _is_log(path: Path) -> bool:
    begins = {"classes.csv": b"class,", "confusion.csv": b"class,", "mistakes.csv": b"image,"}
    with path.open("rb") as file:
        return file.readline().startswith(begins.get(path.name, b"epoch,step"))


def _csv_line(cells: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue()


def rows(text: str) -> list[dict[str, str]]:
    """Those of a CSV file, by its header; none of an empty text."""
    return list(csv.DictReader(io.StringIO(text)))


def number(cell: str) -> float:
    """What a cell of a run's CSV files says; those of 0.1 are empty where it is not a number."""
    return float(cell or "nan")


def _csv_text(rows: Iterable[Sequence[object]]) -> bytes:
    return "".join(map(_csv_line, rows)).encode()


@dataclass(frozen=True)
class WorkDir:
    """The folder of one run; held by this process alone until it is closed."""

    path: Path
    _lock: Lock
    _is_new: bool = False

    @classmethod
    def claim(
        cls, config: ResolvedConfig, facts: Mapping[str, Any] | None = None, launch: str = ""
    ) -> WorkDir:
        """Make the folder or take it over, with the run it holds if that has the same options.

        With --overwrite the run it holds is taken away. Processes that torchrun has restarted
        take over what they had begun.

        Args:
            config: the run's options.
            facts: what else the run must have in common with the one it goes on with.
            launch: what processes have in common with those that torchrun restarted them for.

        Raises:
            UserError: if another process is at work in it, if it holds a run that this one
                cannot go on with, or if it cannot be written.
        """
        with writing(config.work_dir or Path("runs")):
            if config.work_dir is None:
                begun = _begun_before(Path("runs"), config, launch)
                path, is_new = begun or _first_free(Path("runs"), config.data), begun is None
            else:
                path, is_new = config.work_dir, not config.work_dir.exists()
                path.mkdir(parents=True, exist_ok=True)
            lock = Lock(path)
            work_dir = cls(path, lock, is_new)
            try:
                if held := [path / name for name in _RUN_FILES if (path / name).exists()]:
                    work_dir._agree(held, config, facts or {}, launch)
                for leftover in path.glob(".[0-9]*-*"):
                    if _PARTIAL.fullmatch(leftover.name):
                        leftover.unlink()
            except BaseException:
                work_dir.close()
                raise
        return work_dir

    def _agree(
        self, held: Sequence[Path], config: ResolvedConfig, facts: Mapping[str, Any], launch: str
    ) -> None:
        """Raise a UserError where the run of these files is another, unless it may be replaced, or
        where they are no run's: such files are somebody else's work, and stay.
        """
        try:
            recorded = read_config(self.path)
        except UserError as error:
            unknown = (self.path / "config.yaml").exists()
            if not unknown and not self._is_begun(held):
                return
            if unknown or not self._has_logs():
                raise UserError(
                    f"{error}; what it holds ({', '.join(file.name for file in held)}) may be no "
                    f"run's, and is not replaced, by --overwrite neither: choose another "
                    f"--work-dir, or take it away"
                ) from None
            differences = [str(error)]
        else:
            differences = config.differences(recorded["options"]) + [
                f"{key} is {value}, was {recorded[key]}"
                for key, value in facts.items()
                if key in recorded and recorded[key] != value
            ]
        if config.overwrite and (differences or not _launched_by(self.path, launch)):
            shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
            # config.yaml, by which they are known for a run's, last
            for file in reversed(held):
                if file.is_file():
                    file.unlink()
        elif differences and self._is_begun(held):
            raise UserError(
                f"{self.path} already holds a run with other options: {'; '.join(differences)} "
                f"({held[0].name}): choose another --work-dir, or add --overwrite to replace it"
            )

    def _is_begun(self, held: Iterable[Path]) -> bool:
        """Whether these files hold anything that a run could be gone on with, that has been learnt,
        or that no run has written.
        """
        for path in held:
            if path.name == CHECKPOINTS:
                if any(path.glob("[!.]*")):
                    return True
            elif path.suffix == ".csv":
                if not _is_log(path) or path.read_bytes().count(b"\n") > 1:
                    return True
            elif path.name != "config.yaml":
                return True
        return False

    def _has_logs(self) -> bool:
        """Whether there are logs of a run, and no other files that are called so."""
        logs = [self.path / name for name in LOG_COLUMNS if (self.path / name).exists()]
        return bool(logs) and all(map(_is_log, logs))

    def close(self) -> None:
        """Let other runs have the folder, which is taken away if it is new and empty."""
        with suppress(OSError):  # somebody may have removed it
            if self._is_new and [path.name for path in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()
                self.path.rmdir()
                if self.path.parent == Path("runs"):
                    # if this would have been the first of them
                    self.path.parent.rmdir()
        self._lock.release()

    def logs(
        self,
        texts: Mapping[str, str],
        names: Iterable[str] = LOG_COLUMNS,
        metrics: Sequence[str] = (),
    ) -> dict[str, CsvLog]:
        """The logs called ``names`` by name; all but system.csv have one row per epoch.

        Error is in per cent, and so is the share of the time that was spent waiting for images;
        memory is the peak of the largest process.

        Args:
            texts: the files as they stood at the checkpoint the run goes on from.
            names: of the files.
            metrics: the columns of scores.csv.
        """
        more = {"scores.csv": tuple(metrics)}
        return {
            name: CsvLog(self.path / name, (*columns, *more.get(name, ())), texts.get(name, ""))
            for name, columns in LOG_COLUMNS.items()
            if name in names
        }

    def write_classes(
        self, score: Score, classes: Sequence[str], name: Callable[[int], str]
    ) -> None:
        """classes.csv, confusion.csv and mistakes.csv: a test's scores of each class, its
        confusions, and the images, by their ``name``, that it is most wrongly sure of.
        """
        header = ["class", *score.per_class]
        rows = zip(classes, *score.per_class.values(), strict=True)
        self.write_file("classes.csv", _csv_text([header, *rows]))
        if score.confusion:
            table = [[name, *row] for name, row in zip(classes, score.confusion, strict=True)]
            self.write_file("confusion.csv", _csv_text([["class", *score.answers], *table]))
        mistakes = [(name(mistake.number), *mistake) for mistake in score.mistakes]
        self.write_file("mistakes.csv", _csv_text([("image", *Mistake._fields), *mistakes]))

    def write_config(self, config: ResolvedConfig, world: World, facts: Mapping[str, Any]) -> None:
        """config.yaml: every option, and what else reproduces the run."""
        options = config.options()
        options["work_dir"] = str(self.path)
        content = {
            "format": FORMAT,
            "command": shlex.join(sys.argv),
            "launch": world.launch,
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
        self._write_yaml(content)

    def write_continuation(self, config: ResolvedConfig, position: Position) -> None:
        """config.yaml with the options that the run goes on with, if some are others."""
        held = read_config(self.path)
        options = {**config.options(), "work_dir": str(self.path)}
        before = held["options"]
        changed = {n: v for n, v in options.items() if n in before and before[n] != v}
        if changed:
            held["options"] = options
            now = {"before": str(position), "command": shlex.join(sys.argv), "options": changed}
            held["continued"] = [*held.get("continued", []), now]
            self._write_yaml(held)

    def _write_yaml(self, content: Mapping[str, Any]) -> None:
        text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
        self.write_file("config.yaml", text.encode())

    def write_file(self, name: str, content: bytes) -> Path:
        """Put a file in place, whole or not at all."""
        path = self.path / name
        write_atomically(path, lambda partial: partial.write_bytes(content))
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


def _begun_before(parent: Path, config: ResolvedConfig, launch: str) -> Path | None:
    """The newest folder of this launch, which torchrun has now restarted."""
    begun = [
        path
        for path in parent.glob(f"{config.data}-*")
        if _launched_by(path, launch) and not config.differences(read_config(path)["options"])
    ]
    return max(begun, key=lambda path: path.stat().st_mtime, default=None)


def _launched_by(path: Path, launch: str) -> bool:
    with suppress(UserError):
        return bool(launch) and read_config(path).get("launch") == launch
    return False


def read_config(path: Path) -> dict[str, Any]:
    """The config.yaml of the run in ``path``.

    Raises:
        UserError: if it is missing or is not what a run writes.
    """
    file = path / "config.yaml"
    try:
        held = yaml.safe_load(file.read_text(encoding="utf-8"))
        refuse_newer(held, FORMAT, path)
        held["options"] = renamed(held["options"])
        # other programs have a config.yaml with options too
        held["command"], held["options"]["data"]
    except FileNotFoundError:
        raise UserError(f"{path} holds no run: there is no config.yaml") from None
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, YAMLError):
        raise UserError(f"cannot read {file}: it is not what a run writes") from None
    return dict(held)


def saved(state: object) -> bytes:
    """What ``torch.save`` writes, for a file system that may refuse it.

    torch's own writer turns a full disk into an error that does not say so.
    """
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device.type}: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {platform.processor() or platform.machine()}"
