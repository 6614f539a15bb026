"""Images from files: decoded and cropped by loader processes, finished where they are trained on.

A loader process gives bytes (3, H, W) of one size; mirroring and normalisation are done a batch at
a time on the device. A thread makes the next batches ready while one is trained on.
"""

from __future__ import annotations

import functools
import gc
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...errors import UserError
from ..recipes import FILES
from ..signals import outlive_stop_signals
from .images import (
    IMAGENET_NORMALIZATION,
    NORMALIZATIONS,
    Batch,
    Normalization,
    ShiftAndFlip,
    largest,
    trivially_augmented,
)
from .order import drawing, generator
from .pixels import IMAGES, read_pixels
from .tables import Part
from .volumes import VOLUMES, VolumeReader, centred, drawn

# Batches that are ready on the device before they are asked for.
_AHEAD = 2


class Source(Protocol):
    """Images of a data set by their number."""

    labels: Tensor
    """See :class:`.images.Split`."""

    def __len__(self) -> int:
        """Images in it."""

    def name(self, index: int) -> str:
        """What a user calls it."""

    def read(self, index: int) -> Any:
        """The image as (channels, ...), from 0 to 255.

        Raises:
            UserError: where more than this image is lost. Anything else: it cannot be read.
        """


class _Files:
    """A :class:`Source` of the image files of a split."""

    def __init__(self, root: Path, part: Part, read: Callable[[Path], Tensor]) -> None:
        self._root, self._names, self._read = root, part.names, read
        self.labels = part.labels

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return str(self._root / self._names[index].decode(errors="surrogateescape"))

    def read(self, index: int) -> Tensor:
        return self._read(Path(self.name(index)))


class Folder(_Files):
    """Of one folder per class.

    Raises:
        UserError: if ``root`` is not such a folder.
    """

    def __init__(self, root: Path, read: Callable[[Path], Tensor], kinds: tuple[str, ...]) -> None:
        from torchvision import datasets

        others = Counter[str]()
        _see_no_circle(root)

        def is_image(path: str) -> bool:
            is_one = path.lower().endswith(kinds)
            others[Path(path).suffix or "no suffix"] += not is_one
            return is_one

        try:
            found = datasets.ImageFolder(str(root), is_valid_file=is_image, allow_empty=True)
        except OSError as error:
            raise UserError(
                f"{root} is not a folder of images, one folder per class: {error}"
            ) from None
        if not len(found):
            raise UserError(f"{root} is not a folder of images: none of {', '.join(kinds)} in it")
        for file in root.iterdir():
            others["files in no class's folder"] += file.is_file()
        self.notes = [
            f"{root}: {count:,} files are not read ({kind})"
            for kind, count in sorted(others.items())
            if count
        ]
        self.classes: list[str] = found.classes
        names = np.array([path.encode(errors="surrogateescape") for path, _ in found.samples])
        super().__init__(Path(), Part(names, torch.tensor(found.targets)), read)


def _see_no_circle(root: Path) -> None:
    """Raise a UserError where a link leads to a folder that it lies in.

    Links are followed when images are listed, and by the system 40 times at most: two in one
    folder are 2^40 ways around.
    """
    for path, _, _ in os.walk(root, followlinks=True):
        around = (folder for folder in Path(path).parents if folder.is_relative_to(root))
        if os.path.realpath(path) in map(os.path.realpath, around):
            raise UserError(f"{root}: the link {path[:200]} in it leads back to where it lies")


class Listed(_Files):
    """Of the images that a table lists."""

    def __init__(self, root: Path, part: Part, read: Callable[[Path], Tensor]) -> None:
        super().__init__(root, part, read)
        first = Path(self.name(0))
        if not first.is_file():
            raise UserError(
                f"the table's image {first} is not there: name the folder of its images with "
                f"--data-dir"
            )


class _Sample(NamedTuple):
    image: Tensor | None
    """None if it cannot be read."""
    number: int
    """Of the image that was read."""
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
            if epoch is None:
                return _Sample(self.test(image), one, unreadable, "")
            # torchvision's transforms draw from the global generator
            with drawing("augmentation", self.seed, epoch, index):
                return _Sample(self.train(image), one, unreadable, "")
        return _Sample(None, 0, unreadable, "")


class _Collated(NamedTuple):
    images: Tensor
    indices: Tensor
    which: Tensor
    """The place in the batch that was asked for of each image."""
    unreadable: list[str]
    lost: str


def _collated(samples: Sequence[_Sample]) -> _Collated:
    found = [(place, s.image, s.number) for place, s in enumerate(samples) if s.image is not None]
    return _Collated(
        torch.stack([image for _, image, _ in found]) if found else torch.empty(0),
        torch.tensor([index for _, _, index in found], dtype=torch.int64),
        torch.tensor([place for place, _, _ in found], dtype=torch.int64),
        [path for sample in samples for path in sample.unreadable],
        next((sample.lost for sample in samples if sample.lost), ""),
    )


def file_reader(options: Mapping[str, Any]) -> tuple[Callable[[Path], Tensor], tuple[str, ...]]:
    """What reads the files of a run with these options, and the ends of their names."""
    window = options.get("window")
    if options.get("spatial_dims") == 3:
        return VolumeReader(options["spacing"], window), VOLUMES
    # older runs had no choice of channels; digits are grey
    channels = 1 if options["data"] == "digits" else options.get("channels", 3)
    return partial(read_pixels, channels=channels, window=window), IMAGES


def _centre(image_shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Of an image (C, H, W) its centre, as ImageNet's networks are tested on; of a volume too."""
    from torchvision.transforms import v2

    if len(image_shape) == 3:
        return centred(image_shape)
    image_size = image_shape[0]
    # the usual margin: 256 for 224
    resize = v2.Resize(round(image_size * 256 / 224), antialias=True)
    return v2.Compose([resize, v2.CenterCrop(image_size)])


@dataclass(frozen=True)
class Preparation:
    """How an image file becomes what a network of one data set was trained on."""

    channels: int
    read: Callable[[Path], Tensor]
    kinds: tuple[str, ...]
    """How the names of the files that are read end."""
    scale: float
    """From 0..255 to the units of the data set's pixels."""
    fit: Callable[[Tensor], Tensor]
    normalization: Normalization

    def __call__(self, path: Path) -> Tensor:
        """The file as (channels, H, W).

        Raises:
            UserError: if it cannot be read as an image.
        """
        try:
            pixels = self.fit(self.read(Path(path)))
        except UserError:
            raise
        # the decoders raise what they like
        except Exception as error:
            raise UserError(f"{path} cannot be read as an image: {error}") from None
        return self.normalization(pixels.float() * self.scale)


def image_preparation(recorded: Mapping[str, Any]) -> Preparation:
    """How image files are prepared for the network of a run, by its config.yaml.

    Raises:
        UserError: for generated data, of which there are no files.
    """
    from torchvision.transforms import v2

    options = recorded["options"]
    data, image_size = options["data"], options["image_size"]
    read, kinds = file_reader(options)
    if data in FILES:
        # older runs had no choice
        how = recorded.get("normalization") or IMAGENET_NORMALIZATION.fact()
        shape = options.get("crop") or (image_size,) * options.get("spatial_dims", 2)
        normalization = Normalization.recorded(how)
        fit, channels = _centre(shape), len(normalization.mean)
        return Preparation(channels, read, kinds, 1.0, fit, normalization)
    if data not in NORMALIZATIONS:
        raise UserError(f"a network trained on --data {data} does not work on image files")
    small, normalization = v2.Resize((image_size, image_size)), NORMALIZATIONS[data]
    scale = 16 / 255 if data == "digits" else 1.0
    return Preparation(len(normalization.mean), read, kinds, scale, small, normalization)


class ImageFiles:
    """A split of image files, read by worker processes.

    Args:
        source: the images.
        image_shape: height and width, pixels, or the three of a volume.
        augment: of training images: all but "none" are cropped at random and mirrored.
        normalization: of the finished images.
        seed: of augmentation.
        num_workers: loader processes; 0: this process reads.
        skip_unreadable: take the next image instead of one that cannot be read.
    """

    def __init__(
        self,
        source: Source,
        image_shape: Sequence[int],
        augment: str,
        normalization: Normalization,
        seed: int,
        num_workers: int,
        skip_unreadable: bool = False,
    ) -> None:
        from torchvision.transforms import v2

        test = _centre(image_shape)
        volumes = len(image_shape) == 3
        crop = drawn(image_shape) if volumes else v2.RandomResizedCrop(image_shape, antialias=True)
        if augment == "trivial-augment":
            crop = v2.Compose([crop, trivially_augmented])
        self._dataset = _Keyed(
            source, test if augment == "none" else crop, test, seed, skip_unreadable
        )
        # of images, a batch at a time
        flips = augment != "none" and not volumes
        self._augment = ShiftAndFlip(pad=0, flip=True) if flips else None
        self._seed = seed
        self._num_workers = num_workers
        self._skip_unreadable = skip_unreadable
        self.labels, self.normalization = source.labels, normalization
        self.unreadable: set[str] = set()

    def __len__(self) -> int:
        return len(self._dataset.source)

    def name(self, index: int) -> str:
        """What a user calls an image."""
        return self._dataset.source.name(index)

    def batches(
        self, indices: Sequence[Tensor], epoch: int | None, device: torch.device
    ) -> Iterator[Batch]:
        return loaded(
            self._dataset,
            self._seed,
            indices,
            epoch,
            device,
            self._num_workers,
            lambda read: self._finished(read, indices, epoch, device),
            collate_fn=_collated,
        )

    def _finished(
        self,
        read: Iterable[_Collated],
        indices: Sequence[Tensor],
        epoch: int | None,
        device: torch.device,
    ) -> Iterator[Batch]:
        drawn = None
        if epoch is not None and self._augment is not None:
            drawn = self._augment.draw(len(self), self._seed, epoch, largest(indices))
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
            labels = self.labels[found.indices].to(device, non_blocking=True)
            yield self.normalization(images), labels


def loaded(
    dataset: Dataset[Any],
    seed: int,
    indices: Sequence[Tensor],
    epoch: int | None,
    device: torch.device,
    num_workers: int,
    finish: Callable[[Iterator[Any]], Iterator[Batch]],
    **options: Any,
) -> Iterator[Batch]:
    """The batches that ``finish`` makes of what ``dataset`` gives for each (index, epoch).

    Read by loader processes and made ready ahead of time, where there are such processes;
    ``options`` are the DataLoader's.
    """
    first = indices[0][:1].tolist() if len(indices) else []
    loader = DataLoader(
        dataset,
        batch_sampler=([(i, epoch) for i in chosen.tolist()] for chosen in indices),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_begin_loading,
        # The loader's own base seed, which generators of a data set's own may be seeded with: not
        # drawn from the generator dropout uses, and another one for each epoch and process.
        generator=generator("loader", seed, epoch or 0, *first),
        **options,
    )
    # its processes are started here: only the main thread can see that one has died
    finished = finish(iter(loader))
    # Without such processes what a sample draws is drawn here: from the process's one random
    # state, which a thread would set while dropout draws from it.
    return prefetched(finished, device) if num_workers else finished


def _begin_loading(worker: int) -> None:
    """How a loader process starts: it leaves stop signals, and the trainer's garbage, alone.

    A collection here would run finalizers of what was copied, of which some
    wait for threads that only the trainer has, for ever. And it would write to all memory that
    the processes share.
    """
    outlive_stop_signals(worker)
    gc.freeze()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: what the allocator keeps for a stream, no other one gets."""
    return torch.cuda.Stream(device)


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
            stream = _stream(device) if on_gpu else None
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
