"""Images in batches: a data set's splits, what is done to pixels, and splits in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .order import drawing, generator

Batch = tuple[Tensor, Tensor]
"""Normalised images (N, C, H, W) in float32 and their :attr:`Split.labels`."""


class Split(Protocol):
    """The training or the test part of a data set."""

    unreadable: set[str]
    """Image files that this process has found it cannot read."""
    labels: Tensor
    """(N,) in int64, or where classes don't exclude each other (N, classes) in float32: 1, 0, or
    NaN for what is not known."""
    normalization: Normalization

    def __len__(self) -> int:
        """Samples in it."""

    def batches(
        self, indices: Sequence[Tensor], epoch: int | None, device: torch.device
    ) -> Iterator[Batch]:
        """One batch for each tensor of indices; augmented unless ``epoch`` is None.

        An index past the end is a sample that the epoch has had before; see
        :func:`.order.global_batches`.
        """


@dataclass(frozen=True)
class ImageData:
    """A data set: its two splits and the shape of the problem."""

    train: Split
    test: Split
    num_classes: int
    in_channels: int
    class_names: tuple[str, ...] = ()
    """In the order of the labels; none: their numbers."""
    notes: tuple[str, ...] = ()
    """What is to be said of it: what is not read, what lacks."""
    digest: str = ""
    """Of what lists its images, where something does."""

    @property
    def classes(self) -> tuple[str, ...]:
        """A name for each class."""
        return self.class_names or tuple(map(str, range(self.num_classes)))

    def normalize_by(self, normalization: Normalization) -> None:
        """Have both splits normalised so."""
        self.train.normalization = self.test.normalization = normalization


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation, in units of the stored pixel values."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = (_constants(values, images.device) for values in (self.mean, self.std))
        return (images.float() - mean) / std

    @classmethod
    def none(cls, channels: int) -> Normalization:
        """That which changes nothing."""
        return cls((0.0,) * channels, (1.0,) * channels)

    @classmethod
    def recorded(cls, fact: Mapping[str, Sequence[float]]) -> Normalization:
        """What :meth:`fact` gave."""
        return cls(tuple(fact["mean"]), tuple(fact["std"]))

    def fact(self) -> dict[str, list[float]]:
        """In JSON's types."""
        return {"mean": list(self.mean), "std": list(self.std)}


@functools.cache
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    # once: to copy them in every step would have the step wait for its device
    return torch.tensor(values, device=device).view(-1, 1, 1)


# Of data sets by name, in their raw pixel values: 0..16 of the digits, else 0..255. The CIFAR
# constants are those of the paper's own code; on SVHN the paper divides by 255 and no more
# (section 4.1).
NORMALIZATIONS = {
    "digits": Normalization((4.9,), (6.0,)),
    "cifar10": Normalization((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": Normalization((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "svhn": Normalization((0.0,) * 3, (255.0,) * 3),
}
IMAGENET_NORMALIZATION = Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


@dataclass(frozen=True)
class ShiftAndFlip:
    """Shift by up to ``pad`` pixels, zeros coming in, and mirror every other image.

    Applied to normalised images, as in the paper's code: the zeros are the mean colour. A batch at
    a time, on the device that holds it, each image in its own way, where torchvision's transforms
    do the same to a whole batch.
    """

    pad: int
    flip: bool

    def draw(self, num_samples: int, seed: int, epoch: int, last: int = 0) -> Tensor:
        """What to do to each sample in an epoch: (samples, 3) of offset y, x, mirrored.

        ``last`` is the largest that will be asked for, where some are drawn more than once.
        """
        rounds = []
        for again in range(last // num_samples + 1):
            source = generator("augmentation", seed, epoch, *([again] if again else []))
            offsets = torch.randint(2 * self.pad + 1, (num_samples, 2), generator=source)
            flips = torch.randint(2 if self.flip else 1, (num_samples, 1), generator=source)
            rounds.append(torch.cat([offsets, flips], dim=1))
        return torch.cat(rounds)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Images (N, C, H, W) and their rows of :meth:`draw`."""
        if not self.pad:
            mirrored = drawn[:, 2].to(images.device).bool().view(-1, 1, 1, 1)
            return torch.where(mirrored, images.flip(3), images)
        height, width = images.shape[2:]
        y, x, flip = drawn.to(images.device).unsqueeze(-1).unbind(1)
        rows = torch.arange(height, device=images.device) + y
        columns = torch.arange(width, device=images.device)
        columns = torch.where(flip.bool(), columns.flip(0), columns) + x
        padded = F.pad(images, (self.pad,) * 4)
        sample = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
        channel = torch.arange(images.shape[1], device=images.device).view(1, -1, 1, 1)
        return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """How many samples have each class, (classes,)."""
    if labels.is_floating_point():
        return (labels > 0.5).sum(0)
    return torch.bincount(labels, minlength=num_classes)


def trivially_augmented(image: Tensor) -> Tensor:
    """An image (C, H, W) from 0 to 255 by TrivialAugment, as torch's global generator draws."""
    from torchvision.transforms import v2

    transform = v2.TrivialAugmentWide()
    if image.dtype == torch.uint8:
        return transform(image)
    return transform(image / 255) * 255


def largest(indices: Sequence[Tensor]) -> int:
    """Of all the indices."""
    return max((int(chosen.max()) for chosen in indices if len(chosen)), default=0)


class InMemory:
    """Images (N, C, H, W), held as they were stored on the device that trains."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        normalization: Normalization,
        augment: ShiftAndFlip | None = None,
        seed: int = 0,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        assert len(images) == len(labels)
        self.images = images
        self.labels = labels
        self.normalization = normalization
        self.augment = augment
        self.transform = transform
        """What is done to each training image before it is normalised."""
        self.seed = seed
        self.unreadable: set[str] = set()

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self, indices: Sequence[Tensor], epoch: int | None, device: torch.device
    ) -> Iterator[Batch]:
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        drawn = None
        if epoch is not None and self.augment is not None:
            drawn = self.augment.draw(len(self), self.seed, epoch, largest(indices)).to(device)
        # once for the epoch: a copy in every step would have the step wait for its device
        order = torch.cat([*indices]).to(device) if len(indices) else torch.empty(0)
        for chosen in order.split([len(chosen) for chosen in indices]):
            there = chosen % len(self)
            images = self.images[there]
            if epoch is not None and self.transform is not None:
                images = self._transformed(images, chosen, epoch)
            images = self.normalization(images)
            if drawn is not None and self.augment is not None:
                images = self.augment(images, drawn[chosen])
            yield images, self.labels[there]

    def _transformed(self, images: Tensor, chosen: Tensor, epoch: int) -> Tensor:
        assert self.transform is not None
        found = []
        for image, index in zip(images.cpu(), chosen.tolist(), strict=True):
            with drawing("augmentation", self.seed, epoch, index):
                found.append(self.transform(image))
        return torch.stack(found).to(images.device)
