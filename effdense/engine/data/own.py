"""Data sets of the user's own: anything with a length that gives (image, label) by number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import UserError
from .image_files import loaded
from .images import Batch, ImageData, Normalization
from .order import drawing_in_any_way


def own_data(
    train: Any, test: Any, seed: int, num_workers: int, num_classes: int | None = None
) -> ImageData:
    """Two data sets of torch's protocol as a run's data.

    Args:
        train, test: of (image, label): float tensors (channels, *spatial), all of one shape, and
            numbers of classes, or of labels that don't exclude each other float tensors (classes,).
        seed: of what the data set draws for training images from the global generators of torch,
            NumPy and Python.
        num_workers: loader processes.
        num_classes: where the labels don't say.

    Raises:
        UserError: where a data set is no such thing.
    """
    splits = [
        OwnSplit(given, name, seed, num_workers)
        for given, name in ((train, "training"), (test, "test"))
    ]
    labels = splits[0].labels
    if labels.is_floating_point():
        count = labels.shape[1]
    else:
        largest = max(int(split.labels.max()) for split in splits)
        count = num_classes or largest + 1
        if largest >= count:
            raise UserError(f"there is a label {largest}, but the model answers {count} classes")
    if num_classes not in (None, count):
        raise UserError(f"there are {count} labels, but the model answers {num_classes}")
    names, tested = (split.class_names for split in splits)
    if names and tested and names != tested:
        raise UserError(
            f"the classes of the training data, {', '.join(names[:10])}, must be those of the test "
            f"data, {', '.join(tested[:10])}: their numbers mean others"
        )
    return ImageData(
        splits[0],
        splits[1],
        count,
        splits[0].shape[0],
        class_names=names if len(names) == count else (),
    )


class OwnSplit:
    """A :class:`.images.Split` of a data set of the user's own.

    What it draws from the global generators of torch, NumPy and Python is a function of seed, epoch
    and number for a training image, for a test image of its number.
    """

    def __init__(self, dataset: Any, name: str, seed: int, num_workers: int) -> None:
        try:
            image, _ = dataset[0]
            self.shape = tuple(image.shape)
            self.labels, named = _labels(dataset)
        except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            raise UserError(
                f"the {name} data must be a data set of (image, label), images as tensors "
                f"(channels, height, width): {error}"
            ) from None
        names = getattr(dataset, "classes", None) if named else None
        self.class_names = tuple(map(str, names or ()))
        self._name = name
        self._keyed, self._num_workers = _Keyed(dataset, seed), num_workers
        self.normalization = Normalization.none(1)
        self.unreadable: set[str] = set()

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, indices: Sequence[Tensor], epoch: int | None, device: torch.device
    ) -> Iterator[Batch]:
        def finished(read: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
            for chosen, (images, given) in zip(indices, read, strict=True):
                numbers = chosen % len(self)
                labels = self.labels[numbers]
                self._see_same(numbers, labels, given)
                yield images.to(device, torch.float32), labels.to(device)

        keyed = self._keyed
        return loaded(keyed, keyed.seed, indices, epoch, device, self._num_workers, finished)

    def _see_same(self, numbers: Tensor, labels: Tensor, given: Tensor) -> None:
        """Raise a UserError where images come with other labels than are known."""
        if given.is_floating_point():
            given = given.float()
        if _same(labels, given):
            return
        for number, label, now in zip(numbers.tolist(), labels, given, strict=True):
            if not _same(label, now):
                raise UserError(
                    f"item {number} of the {self._name} data comes with the label {now.tolist()}, "
                    f"its label was {label.tolist()}: each must have one label, the same whenever "
                    f"it is asked for, and the same in targets or tensors, if the data set has such"
                )


@dataclass(frozen=True)
class _Keyed(Dataset[tuple[Tensor, Tensor]]):
    dataset: Any
    seed: int

    def __getitem__(self, asked: tuple[int, int | None]) -> tuple[Tensor, Tensor]:
        index, epoch = asked
        number = index % len(self.dataset)
        parts = ("testing", index) if epoch is None else ("augmentation", self.seed, epoch, index)
        with drawing_in_any_way(*parts):
            image, label = self.dataset[number]
            return torch.as_tensor(image), torch.as_tensor(label)


# So many items show whether the labels that a data set holds are those that it gives; each is
# looked at again when it is used.
_LOOKED_AT = 8


def _labels(dataset: Any) -> tuple[Tensor, bool]:
    """All labels: as the data set holds them where it gives them so, else by reading it once. And
    whether they are those that its ``classes`` name.
    """
    held = getattr(dataset, "targets", None)
    if held is None and hasattr(dataset, "tensors"):
        held = dataset.tensors[1]
    if held is None:
        return _read(dataset, range(len(dataset))), True
    try:
        known = _stacked(held)
    except (TypeError, ValueError):
        # of boxes or whatever else belongs to an image
        return _read(dataset, range(len(dataset))), False
    if getattr(dataset, "target_transform", None) is None and len(known) == len(dataset):
        some = sorted({*range(0, len(known), -(-len(known) // _LOOKED_AT)), len(known) - 1})
        if _same(known[some], _read(dataset, some)):
            return known, True
    found = _read(dataset, range(len(dataset)))
    return found, _same(known, found)


def _read(dataset: Any, numbers: Iterable[int]) -> Tensor:
    return _stacked(dataset[number][1] for number in numbers)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether labels, of which some may not be known, are the same."""
    if one.shape != other.shape:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _stacked(labels: Iterable[Any]) -> Tensor:
    labels = list(labels)
    try:
        each = [torch.as_tensor(label) for label in labels]
    except RuntimeError as error:
        raise ValueError(f"labels must be numbers or tensors: {error}") from None
    if other := [label for label in each if label.shape != each[0].shape]:
        raise ValueError(
            f"labels must be of one shape, got {tuple(each[0].shape)} and {tuple(other[0].shape)}"
        )
    found = torch.stack(each)
    if found.dim() == 1 and not found.is_floating_point():
        return found.long()
    if found.dim() == 2 and found.is_floating_point():
        return found.float()
    raise ValueError(
        f"labels must be whole numbers, or float tensors (classes,), got {found.dtype} of shape "
        f"{tuple(found.shape[1:])}"
    )
