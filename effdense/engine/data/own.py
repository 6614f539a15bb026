"""Data sets of the user's own: anything with a length that gives (image, label) by number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import UserError
from .image_files import loaded
from .images import Batch, ImageData, Normalization
from .order import drawing


def own_data(
    train: Any, test: Any, seed: int, num_workers: int, num_classes: int | None = None
) -> ImageData:
    """Two data sets of torch's protocol as a run's data.

    Args:
        train, test: of (image, label): float tensors (channels, *spatial), all of one shape, and
            numbers of classes, or of labels that don't exclude each other float tensors (classes,).
        seed: of what the data set draws from torch's generator for training images.
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
    names = tuple(map(str, getattr(train, "classes", ()) or ()))
    return ImageData(
        splits[0],
        splits[1],
        count,
        splits[0].shape[0],
        class_names=names if len(names) == count else (),
    )


class OwnSplit:
    """A :class:`.images.Split` of a data set of the user's own.

    What it draws from torch's generator for a training image is a function of seed, epoch and
    number.
    """

    def __init__(self, dataset: Any, name: str, seed: int, num_workers: int) -> None:
        try:
            image, _ = dataset[0]
            self.shape = tuple(image.shape)
            self.labels = _labels(dataset)
        except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            raise UserError(
                f"the {name} data must be a data set of (image, label), images as tensors "
                f"(channels, height, width): {error}"
            ) from None
        self._keyed, self._num_workers = _Keyed(dataset, seed), num_workers
        self.normalization = Normalization.none(1)
        self.unreadable: set[str] = set()

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, indices: Sequence[Tensor], epoch: int | None, device: torch.device
    ) -> Iterator[Batch]:
        def finished(read: Iterator[Tensor]) -> Iterator[Batch]:
            for chosen, images in zip(indices, read, strict=True):
                labels = self.labels[chosen % len(self)]
                yield images.to(device, torch.float32), labels.to(device)

        return loaded(self._keyed, indices, epoch, device, self._num_workers, finished)


@dataclass(frozen=True)
class _Keyed(Dataset[Tensor]):
    dataset: Any
    seed: int

    def __getitem__(self, asked: tuple[int, int | None]) -> Tensor:
        index, epoch = asked
        number = index % len(self.dataset)
        with (
            drawing("augmentation", self.seed, epoch, index)
            if epoch is not None
            else torch.random.fork_rng(devices=[])
        ):
            return torch.as_tensor(self.dataset[number][0])


def _labels(dataset: Any) -> Tensor:
    """All labels: as the data set holds them, or by reading it once."""
    held = getattr(dataset, "targets", None)
    if held is None and hasattr(dataset, "tensors"):
        held = dataset.tensors[1]
    if held is None:
        held = [dataset[number][1] for number in range(len(dataset))]
    found = torch.stack([torch.as_tensor(label) for label in held])
    if found.dim() == 1 and not found.is_floating_point():
        return found.long()
    if found.dim() == 2 and found.is_floating_point():
        return found.float()
    raise ValueError(
        f"labels must be whole numbers, or float tensors (classes,), got {found.dtype} of shape "
        f"{tuple(found.shape[1:])}"
    )
