"""Runs that together hold every pair of values of any two options.

Options and their values come from the types of TrainConfig's fields, so a new option takes part
as soon as it is there: a switch or a choice by itself, a number or a path once ``VALUES`` names
some, and what cannot take part is in ``LEFT_OUT`` with its reason.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
import signal
import types
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from effdense import densenet_bc
from effdense.engine.options import TrainConfig
from tests.helpers import meddlers
from tests.helpers.pictures import write_folder, write_shards, write_xrays
from tests.helpers.ranks import Ranks, final_state

Value = object
Run = dict[str, Value]

VALUES: dict[str, tuple[Value, ...]] = {
    "data": ("fake", "digits", "imagefolder", "webdataset", "csv"),
    "augment": ("paper", "mixup", "none"),  # trivial-augment is for some data only
    "lr_batch_size": (0, 100),
    "warmup_epochs": (0.0, 1.5),
    "backend": ("auto", "cpu", "torch"),  # triton is refused where there is no GPU
    "drop_rate": (0.0, 0.3),
    "weights": (None, "weights.pt"),
    "freeze": (None, "1", "features.conv0*"),
    "head_lr_factor": (1.0, 3.0),
    "budget": (None, "2GiB"),
    "lr": (0.01, 0.1),
    "momentum": (0.0, 0.9),
    "weight_decay": (0.0, 0.001),
    "milestones": ((0.4,), (0.3, 0.6)),
    "label_smoothing": (0.0, 0.1),
    "accumulate": (1, 3),
    "clip_grad": (0.0, 0.5),
    "ema": (0.0, 0.9),
    "max_skipped": (0, 3),
    "seed": (0, 7),
    "patience": (0, 1),
    "best_by": (None, "loss"),
    "checkpoint_steps": (1, 4),
    "keep_checkpoints": (1, 3),
    "system_interval": (0, 2),
    "num_workers": (0, 1),
}
"""Of options whose type says no values, or too many of them."""

FIXED: Run = {
    "arch": "densenet_bc",
    "depth": 10,
    "growth_rate": 4,
    "epochs": 2,
    "threads": 1,
    "work_dir": Path("run"),
}
"""The same in every run, which takes a second."""

LEFT_OUT = {
    "data_dir": "goes with --data",
    "image_size": "goes with --data",
    "batch_size": "goes with --data",
    "table": "goes with --data",
    "image_column": "goes with --data",
    "label_columns": "goes with --data",
    "split_column": "goes with --data",
    "group_column": "goes with --data",
    "val_fraction": "goes with --data",
    "task": "goes with --data",
    "channels": "goes with --data: 1 of csv",
    "normalization": "goes with --channels: measured of csv",
    "window": "goes with --data: of csv",
    "spatial_dims": "of volumes: tests/engine/test_volumes.py",
    "spacing": "of volumes",
    "crop": "of volumes",
    "model": "instead of --arch, --depth and --growth-rate",
    "model_args": "goes with --model",
    "download": "there is no network",
    "compile": "half a minute of compilation a process",
    "overwrite": "begins anew, which is its purpose",
    "checkpoint_minutes": "of the clock",
    "hang_timeout": "of the clock",
    "device": "there is no GPU",
    "tensorboard": "writes beside the run",
}
"""Options that take no part, and why."""


def values() -> dict[str, tuple[Value, ...]]:
    """Every option that takes part, with its values.

    Raises:
        LookupError: for an option whose type says no values and that stands in no table.
    """
    hints = get_type_hints(TrainConfig, include_extras=True)
    found: dict[str, tuple[Value, ...]] = {}
    for field in dataclasses.fields(TrainConfig):
        if field.name in LEFT_OUT or field.name in FIXED:
            continue
        chosen = VALUES.get(field.name) or tuple(_values_of(hints[field.name]))
        if not chosen:
            raise LookupError(
                f"--{field.name.replace('_', '-')} is new: name values of it in VALUES, or why it "
                f"takes no part in LEFT_OUT"
            )
        found[field.name] = chosen
    return found


def _values_of(hint: Any) -> Iterator[Value]:
    """Of a switch or a choice; nothing for other types."""
    origin = get_origin(hint)
    if hint is bool:
        yield from (False, True)
    elif origin is Literal:
        yield from get_args(hint)
    elif origin is Annotated:
        yield from _values_of(get_args(hint)[0])
    elif origin in (Union, types.UnionType):
        for part in get_args(hint):
            yield from _values_of(part)


def pairwise(options: dict[str, tuple[Value, ...]], seed: int = 0) -> list[Run]:
    """Few runs in which any two values of two options meet at least once.

    Each run is the best of some random ones, built option by option; what is left of the pairs
    at the end is hit one by one.
    """
    source = random.Random(seed)
    names = list(options)
    left = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(options[a]))
        for j in range(len(options[b]))
    }
    runs = []
    while left:
        first = source.choice(sorted(left))
        drawn = (_drawn(options, first, left, source) for _ in range(20))
        indices = max(drawn, key=lambda found: len(_pairs(names, found) & left))
        left -= _pairs(names, indices)
        runs.append({name: options[name][index] for name, index in indices.items()})
    return runs


def _drawn(
    options: dict[str, tuple[Value, ...]],
    start: Sequence[tuple[str, int]],
    left: set[Any],
    source: random.Random,
) -> dict[str, int]:
    """A run that holds ``start``, its other options chosen greedily in a random order."""
    chosen = dict(start)
    order = [name for name in options if name not in chosen]
    source.shuffle(order)
    position = {name: place for place, name in enumerate(options)}
    for name in order:

        def gain(index: int, name: str = name) -> int:
            pairs = (
                ((name, index), other)
                if position[name] < position[other[0]]
                else (other, (name, index))
                for other in chosen.items()
            )
            return sum(pair in left for pair in pairs)

        candidates = list(range(len(options[name])))
        source.shuffle(candidates)
        chosen[name] = max(candidates, key=gain)
    return {name: chosen[name] for name in options}


def _pairs(names: Sequence[str], indices: dict[str, int]) -> set[Any]:
    return {((a, indices[a]), (b, indices[b])) for a, b in itertools.combinations(names, 2)}


def runs(data: Path, seed: int = 0) -> list[Run]:
    """Every run, whole: the options of :func:`pairwise` and what goes with them.

    ``data`` holds folders of images and shards, by :func:`write_data`. Batches are of odd sizes,
    which two processes share unevenly.
    """
    about: dict[object, Run] = {
        "fake": {"image_size": 8, "batch_size": 63},
        "digits": {"batch_size": 255},
        "imagefolder": {"image_size": 16, "batch_size": 7, "data_dir": data / "folder"},
        "webdataset": {"image_size": 16, "batch_size": 7, "data_dir": data / "shards"},
        "csv": {
            **{"image_size": 16, "batch_size": 7, "data_dir": data / "xrays"},
            **{"table": data / "xrays" / "table.csv", "group_column": "patient", "channels": 1},
            **{"label_columns": ("Edema", "Fracture"), "window": (20_000.0, 30_000.0)},
        },
    }
    found = []
    for chosen in pairwise(values(), seed):
        run = {**FIXED, **chosen, **about[chosen["data"]]}
        if run["weights"] is not None:
            run["weights"] = data / str(run["weights"])
        found.append(run)
    return found


def write_data(root: Path) -> Path:
    """What the runs read, below ``root``."""
    folder = write_folder(root / "folder", train=12, val=3)
    write_shards(root / "shards", folder)
    write_xrays(root / "xrays", 30)
    network = densenet_bc(depth=10, growth_rate=4, num_classes=3)
    torch.save(network.state_dict(), root / "weights.pt")
    return root


def arguments(run: Run) -> list[object]:
    """A run as its command line."""
    words: list[object] = []
    for name, value in run.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, tuple):
            words += [flag, *value]
        elif value is not None and value is not False:
            words += [flag, value]
    return words


def goes_on(folder: Path, run: Run, world_size: int, seed: int) -> str:
    """Kill a run at a random step, go on with it, and hold it against one that was left alone.

    Where options do not go together the one that is named takes its default, so that all others
    meet none the less.

    Returns:
        What happened, in words.

    Raises:
        AssertionError: where the bits differ, or a run was refused otherwise than by one line
            before its first step.
    """
    refused = ""
    for attempt in itertools.count():
        alone, words = folder / f"alone-{attempt}", arguments(run)
        spelled = " ".join(map(str, words))
        alone.mkdir(parents=True)
        with Ranks(alone, words, world_size) as ranks:
            statuses = ranks.wait()
            said = ranks.said()
        if statuses == [0] * world_size:
            break
        assert set(statuses) == {2}, f"{spelled}\n{said}"
        assert said.count("error: ") == 1, f"{spelled}\n{said}"
        assert not (alone / "run" / "checkpoints").exists(), spelled
        named = re.search(r"error: --([a-z-]+)", said)
        assert named is not None, f"{spelled}\n{said}"
        name = named[1].replace("-", "_")
        (default,) = (f.default for f in dataclasses.fields(TrainConfig) if f.name == name)
        assert run[name] != default, f"{spelled}\n{said}"
        run = {**run, name: default}
        refused += f"refused with {named[0].removeprefix('error: ')}, without it "
    killed = folder / "killed"
    killed.mkdir()
    epochs = (alone / "run" / "test.csv").read_text().splitlines()
    steps = int(epochs[-1].split(",")[1])
    step = random.Random(seed).randint(1, steps)
    with Ranks(killed, words, world_size, partial(meddlers.killed_before_step, step=step)) as ranks:
        assert ranks.wait() == [-signal.SIGKILL] * world_size, f"{spelled}\n{ranks.said()}"
    with Ranks(killed, words, world_size) as ranks:
        assert ranks.wait() == [0] * world_size, f"{spelled}\n{ranks.said()}"
    same = final_state(killed / "run") == final_state(alone / "run")
    assert same, f"killed before step {step} of {steps}, other bits: {spelled}"
    return f"{refused}killed before step {step} of {steps}, same bits"
