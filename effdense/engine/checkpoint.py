"""Checkpoints on disk: there whole or not at all, and checked before they are used.

Each is a folder of its own, ``epoch-00003-step-0000012`` after twelve steps of the third epoch,
``epoch-00003-tested`` after its end. It holds

- ``run.json``: the position, the configuration and the rows of the CSV files,
- ``state.pt``: what is the same on every process, such as parameters and optimiser,
- ``rank-N.pt``: what is process N's own, such as its buffers and random state,
- ``manifest.json``: the size and SHA-256 of each of these, written last.

It is written under another name, every file and the folder itself are flushed to the disk, and
then it is renamed. What a reader finds under a checkpoint's name has therefore been complete;
the manifest shows what has happened to it since.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

MANIFEST = "manifest.json"
_NAME = re.compile(r"epoch-(\d+)-(?:step-(\d+)|tested)")
_FORMAT = 1


@dataclass(frozen=True, order=True)
class Position:
    """What comes next: a step, counted from 0, of an epoch, counted from 1."""

    epoch: int
    step: int

    def __str__(self) -> str:
        if self.epoch > 1 and not self.step:
            # sorted by name, it comes behind the epoch's steps
            return f"epoch-{self.epoch - 1:05d}-tested"
        return f"epoch-{self.epoch:05d}-step-{self.step:07d}"

    @classmethod
    def of(cls, name: str) -> Position | None:
        """What a checkpoint of this name was taken at; None if it is no checkpoint's.

        Older runs called the end of an epoch step 0 of the next.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        return cls(int(found[1]), int(found[2])) if found[2] else cls(int(found[1]) + 1, 0)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are those that were written."""

    path: Path
    files: Mapping[str, bytes]
    """Their contents by name."""


class Damaged(Exception):
    """A checkpoint that is not what was written; says how."""


def flush_folder(path: Path) -> None:
    """See on disk which names the folder holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def flush(descriptor: int) -> None:
    """See a file's content on disk, where the file system can promise that at all."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: where they are; made with the first one.
        keep: how many of the newest stay; the one with the best test stays besides.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def positions(self) -> list[Position]:
        """What has been published, oldest first."""
        return sorted(self._published())

    def _published(self) -> dict[Position, Path]:
        if not self.folder.is_dir():
            return {}
        found = ((Position.of(path.name), path) for path in self.folder.iterdir())
        return {position: path for position, path in found if position is not None}

    def publish(
        self, position: Position, files: Mapping[str, bytes], badness: float | None = None
    ) -> Path:
        """Write a checkpoint, and take away those that are no longer kept.

        One that is there already stays as it is: a run comes to a position in one way only.

        Args:
            position: what comes next.
            files: name to content.
            badness: of the test, where there has just been one: less is better.

        Raises:
            UserError: where the disk refuses; what had been published is untouched.
        """
        path = self.folder / str(position)
        if position in (published := self._published()):
            return published[position]
        partial = self.folder / f".{path.name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            # one that could not be deleted stays where it is
            partial = _free_name(partial)
            partial.mkdir()
            manifest = {
                "format": _FORMAT,
                "badness": badness,
                "files": {
                    name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                    for name, content in files.items()
                },
            }
            for name, content in files.items():
                _write(partial / name, content)
            _write(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
            flush_folder(partial)
            os.rename(partial, path)
            flush_folder(self.folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"cannot write the checkpoint {path}: {error.strerror or error}; {self.left()}"
            ) from None
        self._prune()
        return path

    def left(self) -> str:
        """What a run that has to stop can go on from, in words."""
        published = self._published()
        if not published:
            return "there is no checkpoint yet"
        return f"the newest checkpoint is {published[max(published)]}"

    def newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is what was written; None if there is none.

        Those that are not are set aside as ``damaged-...``, and said, with the reason.

        Raises:
            UserError: for one that a newer version of this package has written; nothing has
                been touched then.
        """
        published = self._published()
        for path in published.values():
            _refuse_newer(path)
        if not published and self.folder.is_dir():
            strange = [
                path
                for path in self.folder.iterdir()
                if path.is_dir() and not path.name.startswith((".", "damaged-"))
            ]
            if strange:
                raise UserError(
                    f"{strange[0]} is no checkpoint that this effdense knows: go on with the one "
                    f"that wrote it, or choose another --work-dir"
                )
        for leftover in self.folder.glob(".epoch-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for _, path in sorted(self._published().items(), reverse=True):
            try:
                return Checkpoint(path, verified(path))
            except Damaged as damage:
                aside = _free_name(path.with_name(f"damaged-{path.name}"))
                with suppress(OSError):
                    os.rename(path, aside)
                say(f"passed over the checkpoint {path}: {damage}")
        return None

    def best(self) -> Checkpoint | None:
        """The one with the best test, or where there is none yet the newest, of those that are what
        was written; None if there is none.
        """
        published, tested = self._published(), self._tested()
        untested = sorted(published.keys() - tested.keys(), reverse=True)
        for position in [*sorted(tested, key=lambda p: (tested[p], p)), *untested]:
            path = published[position]
            with suppress(Damaged):
                return Checkpoint(path, verified(path))
        return None

    def _tested(self) -> dict[Position, float]:
        """The badness of those that were taken after a test."""
        found: dict[Position, float] = {}
        for position, path in self._published().items():
            with suppress(OSError, ValueError, KeyError, TypeError):
                manifest = json.loads((path / MANIFEST).read_bytes())
                # what it was before there was a choice
                found[position] = float(manifest.get("badness", manifest.get("test_error")))
        return found

    def _prune(self) -> None:
        published = self._published()
        kept = set(sorted(published)[-self._keep :])
        tested = self._tested()
        if tested:
            kept.add(min(tested, key=lambda position: (tested[position], position)))
        for position in published.keys() - kept:
            # renamed first: half of a checkpoint must not have a checkpoint's name
            removed = self.folder / f".{published[position].name}"
            with suppress(OSError):
                os.rename(published[position], removed)
            shutil.rmtree(removed, ignore_errors=True)


def verified(path: Path) -> dict[str, bytes]:
    """The contents of a checkpoint's files, each seen to be what was written.

    Raises:
        Damaged: says which file is not, and how.
        UserError: for one that a newer version of this package has written.
    """

    def content(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror or error}") from None

    _refuse_newer(path)
    try:
        manifest: dict[str, Any] = json.loads(content(MANIFEST))
        facts = manifest["files"].items()
        expected = {str(name): (int(fact["bytes"]), str(fact["sha256"])) for name, fact in facts}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{MANIFEST} cannot be understood") from None
    files = {}
    for name, (size, digest) in expected.items():
        files[name] = content(name)
        if len(files[name]) != size:
            raise Damaged(f"{name} has {len(files[name]):,} bytes instead of {size:,}")
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise Damaged(f"{name} has changed since it was written (its SHA-256 differs)")
    return files


def _refuse_newer(path: Path) -> None:
    """Raise a UserError for a checkpoint of a format that this version does not read.

    One whose manifest says no format is damaged, not newer.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    refuse_newer(manifest, _FORMAT, path)


def refuse_newer(recorded: Any, known: int, path: Path) -> None:
    """Raise a UserError where what is recorded is of a format after ``known``, or of none we had.

    Args:
        recorded: what a file says of itself; where it says no format, it is as old as any.
        known: the newest format that is read.
        path: of the file, for the message.
    """
    written = recorded.get("format", 1) if isinstance(recorded, dict) else 1
    if isinstance(written, int) and 1 <= written <= known:
        return
    raise UserError(
        f"{path} was written by a newer effdense (format {written}, this one reads {known}): go on "
        f"with that one, or choose another --work-dir"
    )


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        flush(file.fileno())


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
