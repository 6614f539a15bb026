"""What a run reads: the data sets, the order of their samples and their augmentation.

Nothing is drawn from a generator whose state lives on from step to step. The order of an epoch
is a function of (seed, epoch) and what augmentation does to a sample one of (seed, epoch, index
of the sample), whatever the number of processes and loader workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .config import ResolvedConfig
from .errors import UserError
from .signals import outlive_stop_signals

Batch = tuple[Tensor, Tensor]
"""Normalised images (N, C, H, W) in float32 and their labels (N,) in int64."""


def random_key(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on every part, evenly spread."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A fresh generator seeded with :func:`random_key`."""
    return torch.Generator().manual_seed(random_key(*parts))


def global_batches(num_samples: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """The batches of an epoch over all processes: indices, ``batch_size`` to each.

    A random order, cut; less than a batch at its end is left out.
    """
    order = torch.randperm(num_samples, generator=generator("order", seed, epoch))
    return order[: num_samples // batch_size * batch_size].split(batch_size)


def share(indices: Tensor, rank: int, world_size: int) -> Tensor:
    """What process ``rank`` takes of ``indices``: shares differ by one at most, all are used."""
    return indices.tensor_split(world_size)[rank]


class Split(Protocol):
    """The training or the test part of a data set."""

    unreadable: set[str]
    """Image files that this process has found it cannot read."""

    def __len__(self) -> int:
        """Samples in it."""

    def batches(
        self, indices: Sequence[Tensor], epoch: int | None, device: torch.device
    ) -> Iterator[Batch]:
        """One batch for each tensor of indices; augmented unless ``epoch`` is None."""


@dataclass(frozen=True)
class ImageData:
    """A data set: its two splits and the shape of the problem."""

    train: Split
    test: Split
    num_classes: int
    in_channels: int
    class_names: tuple[str, ...] = ()
    """In the order of the labels; none: their numbers."""

    @property
    def classes(self) -> tuple[str, ...]:
        """A name for each class."""
        return self.class_names or tuple(map(str, range(self.num_classes)))


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation, in units of the stored pixel values."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images.float() - mean) / std


# Raw 0..255 pixel values. The CIFAR constants are those of the paper's own code; on SVHN the
# paper divides by 255 and no more (section 4.1).
CIFAR10_NORMALIZATION = Normalization((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
CIFAR100_NORMALIZATION = Normalization((129.3, 124.1, 112.4), (68.2, 65.4, 70.4))
SVHN_NORMALIZATION = Normalization((0.0,) * 3, (255.0,) * 3)
IMAGENET_NORMALIZATION = Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
# Raw 0..16 grey values.
DIGITS_NORMALIZATION = Normalization((4.9,), (6.0,))


@dataclass(frozen=True)
class ShiftAndFlip:
    """Shift by up to ``pad`` pixels, zeros coming in, and mirror every other image.

    Applied to normalised images, as in the paper's code: the zeros are the mean colour.
    """

    pad: int
    flip: bool

    def draw(self, num_samples: int, seed: int, epoch: int) -> Tensor:
        """What to do to each sample in an epoch: (num_samples, 3) of offset y, x, mirrored."""
        shape = (num_samples, 1)
        source = generator("augmentation", seed, epoch)
        offsets = torch.randint(2 * self.pad + 1, (num_samples, 2), generator=source)
        flips = torch.randint(2 if self.flip else 1, shape, generator=source)
        return torch.cat([offsets, flips], dim=1)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Images (N, C, H, W) and their rows of :meth:`draw`."""
        height, width = images.shape[2:]
        y, x, flip = drawn.to(images.device).unsqueeze(-1).unbind(1)
        rows = torch.arange(height, device=images.device) + y
        columns = torch.arange(width, device=images.device)
        columns = torch.where(flip.bool(), columns.flip(0), columns) + x
        padded = F.pad(images, (self.pad,) * 4)
        sample = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
        channel = torch.arange(images.shape[1], device=images.device).view(1, -1, 1, 1)
        return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


class InMemory:
    """Images (N, C, H, W), held as they were stored on the device that trains."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        normalization: Normalization,
        augment: ShiftAndFlip | None = None,
        seed: int = 0,
    ) -> None:
        assert len(images) == len(labels)
        self.images = images
        self.labels = labels
        self.normalization = normalization
        self.augment = augment
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
            drawn = self.augment.draw(len(self), self.seed, epoch)
        for chosen in indices:
            there = chosen.to(device)
            images = self.normalization(self.images[there])
            if drawn is not None and self.augment is not None:
                images = self.augment(images, drawn[chosen])
            yield images, self.labels[there]


_Sample = tuple[Tensor | None, int, list[str]]
"""An image, None if it cannot be read; its label; the files that could not be read."""


@dataclass(frozen=True)
class _KeyedFolder(Dataset[_Sample]):
    """An image folder that is asked for (index, epoch); epoch None: not augmented."""

    folder: Any
    train: Callable[[Any], Tensor]
    test: Callable[[Any], Tensor]
    seed: int
    replace: bool
    """Whether the next image takes the place of one that cannot be read, in training."""

    def __getitem__(self, asked: tuple[int, int | None]) -> _Sample:
        index, epoch = asked
        if epoch is None:
            image, label, unreadable = self._read(index, 1)
            return None if image is None else self.test(image), label, unreadable
        image, label, unreadable = self._read(index, len(self.folder) if self.replace else 1)
        if image is None:
            return None, label, unreadable
        # torchvision's transforms draw from the global generator
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(random_key("augmentation", self.seed, epoch, index))
            return self.train(image), label, unreadable

    def _read(self, index: int, tries: int) -> tuple[Any, int, list[str]]:
        """The first of ``tries`` images from ``index`` on that can be read."""
        unreadable: list[str] = []
        for one in range(index, index + tries):
            path, label = self.folder.samples[one % len(self.folder)]
            try:
                return self.folder.loader(path), label, unreadable
            # the decoders raise what they like: OSError, SyntaxError, ValueError, struct.error
            except Exception:
                unreadable.append(path)
        return None, label, unreadable


def _collated(samples: Sequence[_Sample]) -> tuple[Tensor, Tensor, list[str]]:
    images = [image for image, _, _ in samples if image is not None]
    labels = [label for image, label, _ in samples if image is not None]
    unreadable = [path for _, _, paths in samples for path in paths]
    return torch.stack(images) if images else torch.empty(0), torch.tensor(labels), unreadable


def _centre(image_size: int) -> Callable[[Any], Tensor]:
    """A PIL image as (C, H, W) of bytes: its centre, as ImageNet's networks are tested on."""
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.PILToTensor(),
            # the usual margin: 256 for 224
            v2.Resize(round(image_size * 256 / 224), antialias=True),
            v2.CenterCrop(image_size),
        ]
    )


@dataclass(frozen=True)
class Preparation:
    """How an image file becomes what a network of one data set was trained on."""

    channels: int
    mode: str
    """PIL's: "L" or "RGB"."""
    scale: float
    """From 0..255 to the units of the data set's pixels."""
    fit: Callable[[Any], Tensor]
    normalization: Normalization

    def __call__(self, path: Path) -> Tensor:
        """The file as (channels, H, W).

        Raises:
            UserError: if it cannot be read as an image.
        """
        from PIL import Image

        try:
            with Image.open(path) as image:
                pixels = self.fit(image.convert(self.mode))
        # the decoders raise what they like
        except Exception as error:
            raise UserError(f"{path} cannot be read as an image: {error}") from None
        return self.normalization(pixels.float() * self.scale)


def image_preparation(data: str, image_size: int) -> Preparation:
    """How image files are prepared for a network trained on ``data``.

    Raises:
        UserError: for generated data, of which there are no files.
    """
    from torchvision.transforms import v2

    small = v2.Compose([v2.PILToTensor(), v2.Resize((image_size, image_size), antialias=True)])
    if data == "imagefolder":
        return Preparation(3, "RGB", 1.0, _centre(image_size), IMAGENET_NORMALIZATION)
    if data == "digits":
        return Preparation(1, "L", 16 / 255, small, DIGITS_NORMALIZATION)
    known = {
        "cifar10": CIFAR10_NORMALIZATION,
        "cifar100": CIFAR100_NORMALIZATION,
        "svhn": SVHN_NORMALIZATION,
    }
    if data not in known:
        raise UserError(f"a network trained on --data {data} does not work on image files")
    return Preparation(3, "RGB", 1.0, small, known[data])


class ImageFolder:
    """Images in one folder per class, read by worker processes."""

    def __init__(
        self,
        root: Path,
        image_size: int,
        augment: bool,
        seed: int,
        num_workers: int,
        skip_unreadable: bool = False,
    ) -> None:
        from torchvision import datasets
        from torchvision.transforms import v2

        try:
            self._folder = datasets.ImageFolder(str(root))
        except FileNotFoundError as error:
            raise UserError(
                f"{root} is not a folder of images, one folder per class: {error}"
            ) from None
        self.classes: list[str] = self._folder.classes
        test = _centre(image_size)
        train = v2.Compose(
            [
                v2.PILToTensor(),
                v2.RandomResizedCrop(image_size, antialias=True),
                v2.RandomHorizontalFlip(),
            ]
        )
        self._dataset = _KeyedFolder(
            self._folder, train if augment else test, test, seed, skip_unreadable
        )
        self._num_workers = num_workers
        self._skip_unreadable = skip_unreadable
        self.unreadable: set[str] = set()

    def __len__(self) -> int:
        return len(self._folder)

    def batches(
        self, indices: Sequence[Tensor], epoch: int | None, device: torch.device
    ) -> Iterator[Batch]:
        loader = DataLoader(
            self._dataset,
            batch_sampler=([(i, epoch) for i in chosen.tolist()] for chosen in indices),
            num_workers=self._num_workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=outlive_stop_signals,
            collate_fn=_collated,
            # the loader's own base seed must not be drawn from the generator dropout uses
            generator=torch.Generator(),
        )
        for images, labels, unreadable in loader:
            self.unreadable.update(unreadable)
            if unreadable and not self._skip_unreadable:
                raise UserError(
                    f"{unreadable[0]} cannot be read as an image: mend or remove it, or leave "
                    f"such images out with --corrupt-images skip"
                )
            if not len(images):
                if epoch is not None:
                    raise UserError("no image of the data set can be read")
                continue
            yield (
                IMAGENET_NORMALIZATION(images.to(device, non_blocking=True)),
                labels.to(device, non_blocking=True),
            )


def load(config: ResolvedConfig, *, download: bool) -> ImageData:
    """Read the data set that ``config`` names; fetch it first if ``download`` says so.

    Raises:
        UserError: where it is missing or damaged; says how to get it.
    """
    if config.data == "digits":
        return _digits(config)
    if config.data == "fake":
        return _fake(config)
    if config.data == "imagefolder":
        return _image_folder(config)
    return _from_torchvision(config, download)


def _augmentation(config: ResolvedConfig) -> ShiftAndFlip | None:
    if config.augment == "none":
        return None
    if config.data == "digits":
        return ShiftAndFlip(pad=1, flip=False)
    return ShiftAndFlip(pad=4, flip=config.data != "svhn")


def _digits(config: ResolvedConfig) -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    # One split for all runs, whatever their seed: a fifth, 360 images, is for the test.
    order = torch.randperm(len(labels), generator=generator("digits"))
    test, train = order[: len(order) // 5 + 1], order[len(order) // 5 + 1 :]
    return ImageData(
        InMemory(
            images[train], labels[train], DIGITS_NORMALIZATION, _augmentation(config), config.seed
        ),
        InMemory(images[test], labels[test], DIGITS_NORMALIZATION),
        num_classes=10,
        in_channels=1,
    )


FAKE_TRAIN_SAMPLES, FAKE_TEST_SAMPLES = 640, 101


def _fake(config: ResolvedConfig) -> ImageData:
    num_samples = FAKE_TRAIN_SAMPLES + FAKE_TEST_SAMPLES
    source = generator("fake", config.image_size)
    labels = torch.randint(10, (num_samples,), generator=source)
    tints = torch.randn(10, 3, 1, 1, generator=source)
    noise = torch.randn(num_samples, 3, config.image_size, config.image_size, generator=source)
    images = noise + tints[labels]
    identity = Normalization((0.0,) * 3, (1.0,) * 3)
    train, test = slice(FAKE_TRAIN_SAMPLES), slice(FAKE_TRAIN_SAMPLES, None)
    return ImageData(
        InMemory(images[train], labels[train], identity, _augmentation(config), config.seed),
        InMemory(images[test], labels[test], identity),
        num_classes=10,
        in_channels=3,
    )


def _from_torchvision(config: ResolvedConfig, download: bool) -> ImageData:
    from torchvision import datasets

    root = str(config.data_dir)

    def cifar(source: Any, train: bool) -> tuple[Tensor, Tensor]:
        loaded = source(root, train=train, download=download)
        return torch.from_numpy(loaded.data).permute(0, 3, 1, 2), torch.tensor(loaded.targets)

    def svhn(split: str) -> tuple[Tensor, Tensor]:
        loaded = datasets.SVHN(root, split=split, download=download)
        return torch.from_numpy(loaded.data), torch.from_numpy(loaded.labels)

    try:
        if config.data == "svhn":
            name, where = "SVHN", "train_32x32.mat, extra_32x32.mat and test_32x32.mat"
            addresses = [url for url, *_ in datasets.SVHN.split_list.values()]
            train, test = svhn("train"), svhn("test")
            if not config.svhn_train_only:
                extra = svhn("extra")
                train = torch.cat([train[0], extra[0]]), torch.cat([train[1], extra[1]])
            num_classes, normalization = 10, SVHN_NORMALIZATION
            names = ()
        else:
            ten = config.data == "cifar10"
            source = datasets.CIFAR10 if ten else datasets.CIFAR100
            name, where = source.__name__, f"the folder {source.base_folder}"
            addresses = [source.url]
            train, test = cifar(source, train=True), cifar(source, train=False)
            num_classes = 10 if ten else 100
            names = tuple(source(root, train=False).classes)
            normalization = CIFAR10_NORMALIZATION if ten else CIFAR100_NORMALIZATION
    # RuntimeError is what torchvision raises for missing and for damaged files; OSError covers
    # the network and the disk.
    except (RuntimeError, OSError) as error:
        if download:
            raise UserError(
                f"could not fetch {name} into {root}: {error}; fetch {' and '.join(addresses)} "
                f"by hand and put {where} into {root}"
            ) from None
        alone = "; --svhn-train-only does without the extra images" if name == "SVHN" else ""
        raise UserError(
            f"{name} is not in {root}, or damaged: add --download to fetch it from "
            f"{' and '.join(addresses)}, or put {where} there yourself (--data-dir names another "
            f"folder){alone}"
        ) from None
    return ImageData(
        InMemory(*train, normalization, _augmentation(config), config.seed),
        InMemory(*test, normalization),
        num_classes=num_classes,
        in_channels=3,
        class_names=names,
    )


def _image_folder(config: ResolvedConfig) -> ImageData:
    for part in ("train", "val"):
        if not (config.data_dir / part).is_dir():
            raise UserError(
                f"{config.data_dir} holds no folder {part}: --data imagefolder reads "
                f"DATA_DIR/train/CLASS/IMAGE and DATA_DIR/val/CLASS/IMAGE; name the folder above "
                f"them with --data-dir"
            )
    augment = config.augment == "standard"
    train, test = (
        ImageFolder(
            config.data_dir / part,
            config.image_size,
            augment,
            config.seed,
            config.num_workers,
            config.corrupt_images == "skip",
        )
        for part in ("train", "val")
    )
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"{config.data_dir}: train and val must hold the same classes; only one of them has "
            f"{', '.join(differing[:5])}"
        )
    return ImageData(train, test, len(train.classes), 3, tuple(train.classes))
