"""A run's network with its weights, used on images."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..weights import read_metadata, read_safetensors
from .checkpoint import CheckpointStore, Position, refuse_newer
from .data.datasets import load as load_data
from .data.image_files import Preparation, image_preparation
from .data.images import Normalization
from .networks import build
from .options import TrainConfig
from .recipes import OWN
from .records import CHECKPOINTS, FORMAT, read_config
from .resumption import weights_in
from .tasks import Classification, MultiLabel, Task


@dataclass(frozen=True)
class Trained:
    """The network of a finished run, in eval mode, and what it takes and says."""

    network: nn.Module
    prepare: Preparation | None
    """None for data that were given in Python, of which there are no files."""
    classes: Sequence[str]
    shape: tuple[int, ...]
    """Of what it takes, without the batch."""
    task: Task

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Of each class, (N, classes), from what the network says."""
        return self.task.probabilities(outputs)


def trained(source: Path, model: nn.Module | None = None) -> Trained:
    """The network of a run's best epoch so far, or of a file that a run has exported.

    Args:
        source: the run's folder, or the file.
        model: what the run was given in Python, which takes the weights.

    Raises:
        UserError: if there is none.
    """
    recorded, state = held(source)
    options, classes = recorded["options"], recorded["classes"]
    prepare = None if options["data"] == OWN else image_preparation(recorded)
    channels = recorded["channels"] if prepare is None else prepare.channels
    # it is used on whatever there is, which may not be what it learnt on
    network = build({**options, "backend": "auto"}, len(classes), channels, model)
    try:
        network.load_state_dict({name: state[name] for name in network.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise UserError(f"the weights in {source} are not its network's: {error}") from None
    spatial = options.get("crop") or [options["image_size"]] * options.get("spatial_dims", 2)
    kind = MultiLabel if recorded.get("task") == MultiLabel.kind else Classification
    shape = (channels, *spatial)
    return Trained(network.eval(), prepare, classes, shape, kind(tuple(classes)))


def load(source: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The network of a run's best epoch, or of a file that a run has exported, ready to be asked.

    Args:
        source: the folder of a run, which may still be under way, or a ``.safetensors`` file of it.
        model: what the run was given in Python, if it was; it takes the weights.

    Returns:
        The network in eval mode on the CPU. ``classes`` are the names of what it tells apart,
        ``preprocess(path)`` reads an image as (channels, height, width), but of data that were
        given in Python there are no files, and it is None, and
        ``probabilities(outputs)`` says (N, classes) what its outputs mean::

            model = effdense.load("runs/digits-1")
            outputs = model(model.preprocess("image.png")[None])
            print(dict(zip(model.classes, model.probabilities(outputs)[0].tolist())))

    Raises:
        ValueError: if there is none; says what there is.
    """
    found = trained(Path(source), model)
    network: Any = found.network
    network.classes = tuple(found.classes)
    network.preprocess = found.prepare
    network.probabilities = found.probabilities
    return network


# What a file need not know of the machine that it was made on.
_PLACES = ("data_dir", "work_dir", "table", "weights")


def described(work_dir: Path, epoch: int, last: int) -> dict[str, str]:
    """What a run's exported file says of itself: all that :func:`load` needs.

    Args:
        work_dir: of the run.
        epoch: whose weights they are.
        last: the run's last epoch.
    """
    recorded = read_config(work_dir)
    facts = {name: recorded[name] for name in _FACTS if name in recorded}
    options = {n: v for n, v in recorded["options"].items() if n not in _PLACES}
    return {
        "format": "pt",
        "arch": recorded["model"]["name"],
        "classes": json.dumps(facts["classes"]),
        "run": json.dumps(
            {"format": FORMAT, **facts, "options": options, "epoch": epoch, "last": last}
        ),
    }


# Of config.yaml, besides the options.
_FACTS = ("channels", "classes", "task", "normalization")


def held(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is recorded of a run's network, and its weights.

    Raises:
        UserError: if there is none.
    """
    if not source.is_dir():
        about = read_metadata(source).get("run")
        if about is None:
            raise UserError(
                f"{source} does not say what network it is for: give the folder of a run or a "
                f".safetensors file that a run has exported, or build the network yourself, with "
                f"weights={str(source)!r}"
            )
        try:
            recorded: dict[str, Any] = dict(json.loads(about))
        except (ValueError, TypeError, RecursionError):
            raise UserError(
                f"cannot read {source}: what it says of its run is not what a run writes"
            ) from None
        refuse_newer(recorded, FORMAT, source)
        return recorded, read_safetensors(source)
    recorded = read_config(source)
    exported, store = source / "model.safetensors", CheckpointStore(source / CHECKPOINTS, keep=1)
    positions = store.positions()
    if exported.exists():
        last = json.loads(read_metadata(exported).get("run", "{}")).get("last")
        # unless the run has gone on since
        if last is None or not positions or positions[-1] <= Position(last + 1, 0):
            return recorded, read_safetensors(exported)
    best = store.best()
    if best is None:
        raise UserError(f"the run in {source} has no checkpoint yet, and no weights")
    return recorded, weights_in(best)


def first_tested(source: Path, count: int) -> Tensor:
    """The first images of a run's test set, as its network takes them.

    Raises:
        UserError: where they are not there, or not there any more.
    """
    recorded = held(source)[0]
    options = recorded["options"]
    if options["data"] == OWN:
        raise UserError("the run's data were given in Python")
    known = {field.name for field in fields(TrainConfig)} & options.keys()
    chosen = TrainConfig(**{name: options[name] for name in known})
    data = load_data(replace(chosen, num_workers=0).resolved(), download=False)
    if recorded.get("normalization"):
        data.normalize_by(Normalization.recorded(recorded["normalization"]))
    first = torch.arange(min(count, len(data.test)))
    (found,) = (images for images, _ in data.test.batches([first], None, torch.device("cpu")))
    return found


def images_in(paths: Sequence[Path], model: Trained) -> list[Path]:
    """The files that a network reads among ``paths`` and in the folders among them, in order.

    Raises:
        UserError: if there are none.
    """
    if model.prepare is None:
        raise UserError("the run's data were given in Python: there are no files to be read")
    kinds, found = model.prepare.kinds, []
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [p for p in inside if p.name.lower().endswith(kinds) and p.is_file()]
    if not found:
        raise UserError(
            f"there is no image in {', '.join(map(str, paths))}: none of {', '.join(kinds)}"
        )
    return found


@torch.no_grad()
def predictions(
    model: Trained, paths: Sequence[Path], batch_size: int = 64
) -> Iterator[tuple[Path, Tensor]]:
    """The class probabilities (classes,) of each of the images of :func:`images_in`.

    Raises:
        UserError: for a file that cannot be read as an image.
    """
    prepare = model.prepare
    assert prepare is not None
    for begin in range(0, len(paths), batch_size):
        some = paths[begin : begin + batch_size]
        images = torch.stack([prepare(path) for path in some])
        yield from zip(some, model.probabilities(model.network(images)), strict=True)


def evaluated(model: Trained, folder: Path, batch_size: int = 64) -> tuple[float, float, int]:
    """Mean loss, error in per cent and number of the images in ``folder``/CLASS/.

    Raises:
        UserError: where a folder is not named after one of the run's classes.
    """
    numbers = {name: number for number, name in enumerate(model.classes)}
    paths = images_in([folder], model)
    for path in paths:
        name = path.relative_to(folder).parts[0]
        if name not in numbers or path.parent == folder:
            raise UserError(
                f"{path} is not in a folder of {folder} that is named after one of the run's "
                f"classes, {', '.join(list(numbers)[:5])}{', ...' if len(numbers) > 5 else ''}"
            )
    loss = wrong = 0.0
    for path, probabilities in predictions(model, paths, batch_size):
        label = numbers[path.relative_to(folder).parts[0]]
        loss -= float(probabilities[label].clamp_min(1e-30).log())
        wrong += int(probabilities.argmax()) != label
    return loss / len(paths), 100 * wrong / len(paths), len(paths)
