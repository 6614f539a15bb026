"""Images that a CSV file lists, with their labels, splits and groups."""

from __future__ import annotations

import csv
import hashlib
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ..options import ResolvedConfig
from .order import random_key

# What the values of a split column mean; a test split is left alone where there is another.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    "test": "test",
}
_SPLIT = "split"
"""The column that need not be there."""
_LABELS = {"": math.nan, "nan": math.nan, "1": 1.0, "0": 0.0, "-1": -1.0}
_LABELS |= {f"{value}.0": _LABELS[value] for value in ("1", "0", "-1")}
_UNCERTAIN = {"zeros": 0.0, "ones": 1.0, "ignore": math.nan}


@dataclass(frozen=True)
class Part:
    """One split of a table."""

    names: np.ndarray
    """In UTF-8, and one piece: loader processes that share it would copy a list of strings bit by
    bit, as they count references."""
    labels: Tensor
    """See :class:`.images.Split`."""


@dataclass(frozen=True)
class Table:
    """What a table says."""

    train: Part
    val: Part
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    digest: str


def read_table(config: ResolvedConfig) -> Table:
    """The table of ``--table``.

    Raises:
        UserError: where it says something that cannot be; names the line.
    """
    path = config.table
    assert path is not None
    wanted = [config.image_column, *config.label_columns]
    wanted += [config.group_column] * bool(config.group_column)
    rows = _rows(path)
    _, header = next(rows)
    alike = [column for column in header if column.strip().lower() == _SPLIT]
    if config.split_column != _SPLIT or alike:
        wanted.append(config.split_column)
    if absent := [column for column in wanted if header.count(column) != 1]:
        raise UserError(
            f"{path} must have one column {absent[0]}, its header has {', '.join(header[:20])}: "
            f"name columns with --image-column, --label-columns, --split-column, --group-column"
        )
    image = header.index(config.image_column)
    labels = [header.index(column) for column in config.label_columns]
    group = header.index(config.group_column or config.image_column)
    split = header.index(config.split_column) if config.split_column in header else None
    names, groups, splits, said = [], [], [], []
    # most cells repeat others: kept once
    different: dict[tuple[str, ...], int] = {}
    for line, row in rows:
        names.append(row[image].encode())
        groups.append(sys.intern(row[group] or row[image]))
        cells = tuple(row[column].strip() for column in labels)
        said.append(different.setdefault(cells, len(different)))
        if split is not None:
            part = _SPLITS.get(row[split].strip().lower())
            if part is None:
                raise UserError(
                    f"{path}, line {line}: {config.split_column} must be train, val or test, got "
                    f"{row[split]!r}"
                )
            splits.append(part)
    if not names:
        raise UserError(f"{path} lists no image")
    notes = []
    if not splits:
        splits = _drawn(groups, config.val_fraction)
        notes.append(
            f"there is no column {_SPLIT}: {splits.count('val'):,} of {len(splits):,} images are "
            f"drawn at random to test on, --val-fraction {config.val_fraction:g}"
        )
    if config.group_column:
        _see_apart(path, f"{config.group_column}s", groups, splits)
    # one file may have several names, such as a.png and ./a.png
    _see_apart(path, "images", [os.path.normpath(name).decode() for name in names], splits)
    held_out = "test" if {"val", "test"} <= set(splits) else ""
    if held_out:
        notes.append(f"{splits.count('test'):,} test images are left alone")
    meanings, classes = _meanings(config, different)
    values = meanings[said]
    known = ~values.isnan().all(1) if values.ndim == 2 else values >= 0
    if unlabelled := int((~known).sum()):
        notes.append(f"{unlabelled:,} images without any label are left out")
    uncertain = torch.tensor([cells.count("-1") + cells.count("-1.0") for cells in different])
    if values.ndim == 2 and uncertain.any():
        count = int(uncertain[said].sum())
        notes.append(f"{count:,} uncertain labels are taken for {config.uncertain}")
    parts = {}
    in_split = np.array(splits)
    for part in ("train", "val"):
        there = in_split == part
        if part == "val" and not held_out:
            there |= in_split == "test"
        chosen = torch.from_numpy(there) & known
        if not chosen.any():
            raise UserError(f"{path} lists no image with a label in the {part} split")
        places = chosen.nonzero()[:, 0]
        parts[part] = Part(np.array([names[i] for i in places.tolist()]), values[places])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Table(parts["train"], parts["val"], classes, tuple(notes), digest)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row, the header's first."""
    width = None
    try:
        # Excel begins its files with a byte-order mark
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                if row and width is not None and len(row) != width:
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(row)} cells, the header has {width}"
                    )
                if row:
                    width = len(row)
                    yield reader.line_num, row
    except OSError as error:
        raise UserError(f"cannot read the table {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from None
    if width is None:
        raise UserError(f"{path} is empty: expected a header and an image a row")


def _drawn(groups: Sequence[str], fraction: float) -> list[str]:
    """A split of each sample: the same for every seed and order of the table."""
    keys = {group: random_key("split", group) for group in groups}
    order = sorted(keys, key=lambda group: (keys[group], group))
    testing = set(order[: max(1, round(fraction * len(order)))])
    return ["val" if group in testing else "train" for group in groups]


def _see_apart(path: Path, kind: str, groups: Sequence[str], splits: Sequence[str]) -> None:
    """Raise a UserError where one of ``groups``, which are of that kind, is in two splits."""
    pairs = set(zip(groups, splits, strict=True))
    if len(pairs) > len(set(groups)):
        counts = Counter(group for group, _ in pairs)
        apart = [group for group, count in counts.items() if count > 1]
        raise UserError(
            f"{path}: {len(apart):,} of {len(counts):,} {kind} are in two splits, such "
            f"as {apart[0]}: what is tested on must not be trained on"
        )


def _meanings(
    config: ResolvedConfig, said: Iterable[tuple[str, ...]]
) -> tuple[Tensor, tuple[str, ...]]:
    """The labels, as of :class:`.images.Split` or -1 for no class, that cells say; the classes."""
    columns, cells = config.label_columns, list(said)
    odd = {cell for row in cells for cell in row} - set(_LABELS)
    task = config.task
    if task == "auto":
        task = "multilabel" if len(columns) > 1 else "classification"
    if len(columns) > 1 and (odd or task == "classification"):
        raise UserError(
            f"{config.table}: the labels of several columns, each a class, must be 1, 0, -1 or "
            f"empty, got {min(odd)!r}"
            if odd
            else "--task classification takes the classes from one of --label-columns"
        )
    if task == "classification":
        classes = _sorted({name for (name,) in cells if name})
        return torch.tensor([classes.index(name) if name else -1 for (name,) in cells]), classes
    if not odd:
        meaning = _LABELS | dict.fromkeys(("-1", "-1.0"), _UNCERTAIN[config.uncertain])
        return torch.tensor([[meaning[cell] for cell in row] for row in cells]), columns
    names = [{name.strip() for name in row[0].split("|")} - {""} for row in cells]
    classes = _sorted(set().union(*names))
    return torch.tensor([[float(name in has) for name in classes] for has in names]), classes


def _sorted(names: set[str]) -> tuple[str, ...]:
    """In the order of numbers where all of them are."""
    numbers = all(map(str.isdecimal, names))
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))
