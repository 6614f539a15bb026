"""Images from files: decoded and cropped by loader processes, finished where they are trained on.

A loader process gives bytes (3, H, W) of one size; mirroring and normalisation are done a batch at
a time on the device. A thread makes the next batches ready while one is trained on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...errors import UserError
from ..signals import outlive_stop_signals
from .images import (
    CIFAR10_NORMALIZATION,
    CIFAR100_NORMALIZATION,
    DIGITS_NORMALIZATION,
    IMAGENET_NORMALIZATION,
    SVHN_NORMALIZATION,
    Batch,
    Normalization,
    ShiftAndFlip,
)
from .order import random_key

# Batches that are ready on the device before they are asked for.
_AHEAD = 2


class Source(Protocol):
    """Images of a data set by their number."""

    def __len__(self) -> int:
        """Images in it."""

    def label(self, index: int) -> int:
        """The number of an image's class."""

    def name(self, index: int) -> str:
        """What a user calls it."""

    def read(self, index: int) -> Any:
        """The image, PIL's, in RGB.

        Raises:
            UserError: where more than this image is lost. Anything else: it cannot be read.
        """


class Folder:
    """A :class:`Source` of one folder per class.

    Raises:
        UserError: if ``root`` is not such a folder.
    """

    def __init__(self, root: Path) -> None:
        from torchvision import datasets

        try:
            self._folder = datasets.ImageFolder(str(root))
        except FileNotFoundError as error:
            raise UserError(
                f"{root} is not a folder of images, one folder per class: {error}"
            ) from None
        self.classes: list[str] = self._folder.classes

    def __len__(self) -> int:
        return len(self._folder)

    def label(self, index: int) -> int:
        return int(self._folder.samples[index][1])

    def name(self, index: int) -> str:
        return str(self._folder.samples[index][0])

    def read(self, index: int) -> Any:
        return self._folder.loader(self._folder.samples[index][0])


class _Sample(NamedTuple):
    image: Tensor | None
    """None if it cannot be read."""
    label: int
    unreadable: list[str]
    """The images that could not be read."""
    lost: str
    """Why the run cannot go on; empty: it can."""


@dataclass(frozen=True)
class _Keyed(Dataset[_Sample]):
    """A source that is asked for (index, epoch); epoch None: for testing."""

    source: Source
    train: Callable[[Any], Tensor]
    test: Callable[[Any], Tensor]
    seed: int
    replace: bool
    """Whether the next image takes the place of one that cannot be read, in training."""

    def __getitem__(self, asked: tuple[int, int | None]) -> _Sample:
        index, epoch = asked
        tries = len(self.source) if self.replace and epoch is not None else 1
        unreadable: list[str] = []
        for one in range(index, index + tries):
            one %= len(self.source)
            try:
                image = self.source.read(one)
            except UserError as error:
                return _Sample(None, 0, unreadable, str(error))
            # the decoders raise what they like: OSError, SyntaxError, ValueError, struct.error
            except Exception:
                unreadable.append(self.source.name(one))
                continue
            label = self.source.label(one)
            if epoch is None:
                return _Sample(self.test(image), label, unreadable, "")
            # torchvision's transforms draw from the global generator
            with torch.random.fork_rng(devices=[]):
                key = random_key("augmentation", self.seed, epoch, index)
                torch.default_generator.manual_seed(key)
                return _Sample(self.train(image), label, unreadable, "")
        return _Sample(None, 0, unreadable, "")


class _Collated(NamedTuple):
    images: Tensor
    labels: Tensor
    which: Tensor
    """The place in the batch that was asked for of each image."""
    unreadable: list[str]
    lost: str


def _collated(samples: Sequence[_Sample]) -> _Collated:
    found = [(place, s.image, s.label) for place, s in enumerate(samples) if s.image is not None]
    return _Collated(
        torch.stack([image for _, image, _ in found]) if found else torch.empty(0),
        torch.tensor([label for _, _, label in found], dtype=torch.int64),
        torch.tensor([place for place, _, _ in found], dtype=torch.int64),
        [path for sample in samples for path in sample.unreadable],
        next((sample.lost for sample in samples if sample.lost), ""),
    )


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
    if data in ("imagefolder", "webdataset"):
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


class ImageFiles:
    """A split of image files, read by worker processes.

    Args:
        source: the images.
        image_size: height and width, pixels.
        augment: whether training images are cropped at random and mirrored.
        seed: of augmentation.
        num_workers: loader processes; 0: this process reads.
        skip_unreadable: take the next image instead of one that cannot be read.
    """

    def __init__(
        self,
        source: Source,
        image_size: int,
        augment: bool,
        seed: int,
        num_workers: int,
        skip_unreadable: bool = False,
    ) -> None:
        from torchvision.transforms import v2

        test = _centre(image_size)
        crop = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(image_size, antialias=True)])
        self._dataset = _Keyed(source, crop if augment else test, test, seed, skip_unreadable)
        self._augment = ShiftAndFlip(pad=0, flip=True) if augment else None
        self._seed = seed
        self._num_workers = num_workers
        self._skip_unreadable = skip_unreadable
        self.unreadable: set[str] = set()

    def __len__(self) -> int:
        return len(self._dataset.source)

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
        # its processes are started here: only the main thread can see that one has died
        finished = self._finished(iter(loader), indices, epoch, device)
        # Without such processes, crops are drawn here: from the process's one random state, which
        # a thread would set while dropout draws from it.
        return prefetched(finished, device) if self._num_workers else finished

    def _finished(
        self,
        read: Iterable[_Collated],
        indices: Sequence[Tensor],
        epoch: int | None,
        device: torch.device,
    ) -> Iterator[Batch]:
        drawn = None
        if epoch is not None and self._augment is not None:
            drawn = self._augment.draw(len(self), self._seed, epoch)
        for chosen, found in zip(indices, read, strict=True):
            self.unreadable.update(found.unreadable)
            if found.lost:
                raise UserError(found.lost)
            if found.unreadable and not self._skip_unreadable:
                raise UserError(
                    f"{found.unreadable[0]} cannot be read as an image: mend or remove it, or "
                    f"leave such images out with --corrupt-images skip"
                )
            if not len(found.images):
                if epoch is not None:
                    raise UserError("no image of the data set can be read")
                continue
            images = found.images.to(device, non_blocking=True)
            if drawn is not None and self._augment is not None:
                images = self._augment(images, drawn[chosen[found.which]])
            yield IMAGENET_NORMALIZATION(images), found.labels.to(device, non_blocking=True)


def prefetched(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Have a thread take the next of ``batches`` while the last one is in use.

    On a GPU it does so on a stream of its own, so that copies do not wait behind the network.
    """
    made: queue.Queue[tuple[Batch, Any] | BaseException | None] = queue.Queue(_AHEAD)
    abandoned = threading.Event()
    on_gpu = device.type == "cuda"

    def put(item: tuple[Batch, Any] | BaseException | None) -> None:
        while not abandoned.is_set():
            with suppress(queue.Full):
                return made.put(item, timeout=0.1)

    def make() -> None:
        try:
            if on_gpu:
                torch.cuda.set_device(device)
            stream = torch.cuda.Stream(device) if on_gpu else None
            with torch.cuda.stream(stream) if stream else nullcontext():
                for batch in batches:
                    put((batch, stream.record_event() if stream else None))
                    if abandoned.is_set():
                        return
            put(None)
        except UserError as error:
            # without the frames, which would keep the loader processes until the run has ended
            put(error.with_traceback(None))
        # whatever it is, the run's thread is to know
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=make, daemon=True, name="prefetch")
    thread.start()
    item = None
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batch, ready = item
            if on_gpu:
                current = torch.cuda.current_stream(device)
                current.wait_event(ready)
                for tensor in batch:
                    tensor.record_stream(current)
            yield batch
    finally:
        abandoned.set()
        # an error that this frame held, which the error's traceback holds, would keep the loader
        # processes until a garbage collection, in which their queues die before they are told
        item = None
        thread.join(5)
