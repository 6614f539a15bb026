"""The data sets of ``--data`` by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ..options import ResolvedConfig
from .image_files import Folder, ImageFiles, Listed, Source, file_reader
from .images import (
    IMAGENET_NORMALIZATION,
    NORMALIZATIONS,
    ImageData,
    InMemory,
    Normalization,
    ShiftAndFlip,
    class_counts,
    trivially_augmented,
)
from .order import generator
from .pixels import pixels
from .shards import Shards
from .tables import read_table


def needs_preparation(config: ResolvedConfig) -> bool:
    """Whether one process of each machine should load before the others: to fetch or to index."""
    return config.download or config.data == "webdataset"


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
    if config.data == "webdataset":
        return _webdataset(config)
    if config.data == "csv":
        return _csv(config)
    return _from_torchvision(config, download)


def _augmentation(config: ResolvedConfig) -> ShiftAndFlip | None:
    if config.augment == "none":
        return None
    if config.data == "digits":
        return ShiftAndFlip(pad=1, flip=False)
    return ShiftAndFlip(pad=4, flip=config.data != "svhn")


def _in_memory(
    config: ResolvedConfig,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_classes: int = 10,
    names: tuple[str, ...] = (),
) -> ImageData:
    channels = train[0].shape[1]
    normalization = NORMALIZATIONS.get(config.data, Normalization.none(channels))
    transform = trivially_augmented if config.augment == "trivial-augment" else None
    return ImageData(
        InMemory(*train, normalization, _augmentation(config), config.seed, transform),
        InMemory(*test, normalization),
        num_classes,
        channels,
        names,
    )


def _digits(config: ResolvedConfig) -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    # One split for all runs, whatever their seed: a fifth, 360 images, is for the test.
    order = torch.randperm(len(labels), generator=generator("digits"))
    test, train = order[: len(order) // 5 + 1], order[len(order) // 5 + 1 :]
    return _in_memory(config, (images[train], labels[train]), (images[test], labels[test]))


FAKE_TRAIN_SAMPLES, FAKE_TEST_SAMPLES = 640, 101


def _fake(config: ResolvedConfig) -> ImageData:
    num_samples = FAKE_TRAIN_SAMPLES + FAKE_TEST_SAMPLES
    source = generator("fake", config.image_size)
    labels = torch.randint(10, (num_samples,), generator=source)
    tints = torch.randn(10, 3, 1, 1, generator=source)
    noise = torch.randn(num_samples, 3, config.image_size, config.image_size, generator=source)
    images = noise + tints[labels]
    train, test = slice(FAKE_TRAIN_SAMPLES), slice(FAKE_TRAIN_SAMPLES, None)
    return _in_memory(config, (images[train], labels[train]), (images[test], labels[test]))


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
            # the paper trains on both
            images, labels = zip(svhn("train"), svhn("extra"), strict=True)
            train, test = (torch.cat(images), torch.cat(labels)), svhn("test")
            num_classes, names = 10, ()
        else:
            ten = config.data == "cifar10"
            source = datasets.CIFAR10 if ten else datasets.CIFAR100
            name, where = source.__name__, f"the folder {source.base_folder}"
            addresses = [source.url]
            train, test = cifar(source, train=True), cifar(source, train=False)
            num_classes = 10 if ten else 100
            names = tuple(source(root, train=False).classes)
    # RuntimeError is what torchvision raises for missing and for damaged files; OSError covers
    # the network and the disk.
    except (RuntimeError, OSError) as error:
        if download:
            raise UserError(
                f"could not fetch {name} into {root}: {error}; fetch {' and '.join(addresses)} "
                f"by hand and put {where} into {root}"
            ) from None
        raise UserError(
            f"{name} is not in {root}, or damaged: add --download to fetch it from "
            f"{' and '.join(addresses)}, or put {where} there yourself (--data-dir names another "
            f"folder)"
        ) from None
    return _in_memory(config, train, test, num_classes, names)


def _image_folder(config: ResolvedConfig) -> ImageData:
    read, kinds = file_reader(config.options())
    train, test = (Folder(path, read, kinds) for path in _parts(config, "CLASS/IMAGE"))
    numbers = {name: number for number, name in enumerate(train.classes)}
    tested = [test.classes[number] for number in test.labels.unique().tolist()]
    if not set(tested) <= set(numbers):
        differing = sorted(set(train.classes) ^ set(tested))
        raise UserError(
            f"{config.data_dir}: train and val must hold the same classes; only one of them has "
            f"{', '.join(differing[:5])}"
        )
    # some classes may have no folder to be tested on
    test.labels = torch.tensor([numbers.get(name, -1) for name in test.classes])[test.labels]
    data = _image_files(config, train, test, train.classes)
    return replace(data, notes=(*train.notes, *test.notes, *data.notes))


def _webdataset(config: ResolvedConfig) -> ImageData:
    decode = partial(pixels, channels=config.channels, window=config.window)
    train, test = (Shards(path, decode) for path in _parts(config, "NAME-NUMBER.tar"))
    listed = config.data_dir / "classes.txt"
    try:
        classes = listed.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        classes = [str(label) for label in range(train.largest_label + 1)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {listed}: {error}") from None
    classes = [name.strip() for name in classes if name.strip()]
    for shards in (train, test):
        if shards.largest_label >= len(classes):
            raise UserError(
                f"{shards.root} has the label {shards.largest_label}, but there are "
                f"{len(classes)} classes, of the labels in {train.root} or of the lines of {listed}"
            )
    return _image_files(config, train, test, classes)


def _csv(config: ResolvedConfig) -> ImageData:
    table = read_table(config)
    read, _ = file_reader(config.options())
    train, test = (Listed(config.data_dir, part, read) for part in (table.train, table.val))
    data = _image_files(config, train, test, table.classes)
    return replace(data, notes=(*table.notes, *data.notes), digest=table.digest)


def _parts(config: ResolvedConfig, layout: str) -> tuple[Path, Path]:
    train, test = config.data_dir / "train", config.data_dir / "val"
    for path in (train, test):
        if not path.is_dir():
            raise UserError(
                f"{config.data_dir} holds no folder {path.name}: --data {config.data} reads "
                f"DATA_DIR/train/{layout} and DATA_DIR/val/{layout}; name the folder above "
                f"them with --data-dir"
            )
    return train, test


def _image_files(
    config: ResolvedConfig, train: Source, test: Source, classes: Sequence[str]
) -> ImageData:
    normalization = IMAGENET_NORMALIZATION
    if config.normalization == "measured":
        normalization = Normalization.none(config.channels)

    def split(source: Source) -> ImageFiles:
        return ImageFiles(
            source,
            config.image_shape,
            config.augment,
            normalization,
            config.seed,
            config.num_workers,
            config.corrupt_images == "skip",
        )

    notes = []
    for part, source in (("training", train), ("test", test)):
        counts = class_counts(source.labels, len(classes))
        if lacking := [name for name, count in zip(classes, counts, strict=True) if not count]:
            more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
            notes.append(f"no {part} image has the class {', '.join(lacking[:5])}{more}")
    if notes and config.missing_classes == "stop":
        raise UserError(f"{config.data_dir}: {'; '.join(notes)} (--missing-classes warn goes on)")
    return ImageData(
        split(train), split(test), len(classes), config.channels, tuple(classes), tuple(notes)
    )
