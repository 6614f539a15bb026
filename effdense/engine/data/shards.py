"""Images in WebDataset shards: tar files in which KEY.jpg is an image and KEY.cls its label.

A shard is read once from end to end, for an index of where each image lies, which is kept beside
the shards. From then on an image is one read at its place: the order of an epoch is that of any
other data set, over all shards, and whoever reads opens the shards that it needs.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ..records import write_atomically
from .pixels import pixels

INDEX = "effdense-index.npz"
_IMAGE = np.dtype([("shard", "i4"), ("label", "i4"), ("size", "i8"), ("offset", "i8")])
# Shards a process holds open; it may be allowed no more than a thousand files.
_OPEN = 64


class Shards:
    """A :class:`effdense.engine.image_files.Source` of the shards in a folder.

    A shard may be a link to a file on another disk.

    Raises:
        UserError: where there is no shard, or one of them is missing or damaged.
    """

    def __init__(self, root: Path, decode: Callable[..., Tensor] = pixels) -> None:
        self.root, self._decode = root, decode
        self._paths, self._images = _indexed(root)
        self.labels = torch.from_numpy(self._images["label"].astype("i8"))
        self.largest_label = int(self.labels.max())
        self._opened: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # a loader process that is not a fork opens its own
        return {**self.__dict__, "_opened": OrderedDict()}

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        shard, _, _, offset = self._images[index]
        header = self._bytes(int(shard), tarfile.BLOCKSIZE, int(offset) - tarfile.BLOCKSIZE)
        with suppress(tarfile.TarError):
            inside = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
            return f"{self._paths[shard]}: {inside}"
        return f"{self._paths[shard]}: the image at byte {offset}"

    def read(self, index: int) -> Tensor:
        from PIL import Image

        shard, _, size, offset = self._images[index].tolist()
        with Image.open(io.BytesIO(self._bytes(shard, size, offset))) as image:
            return self._decode(image, partial(self.name, index))

    def _bytes(self, shard: int, size: int, offset: int) -> bytes:
        path = self._paths[shard]
        try:
            content = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise UserError(
                f"the shard {path} cannot be read any more: {error.strerror}; put it back, the "
                f"same command goes on from the newest checkpoint"
            ) from None
        if len(content) < size:
            raise UserError(
                f"the shard {path} has become shorter than byte {offset + size:,}, where one of "
                f"its images ends: put back what it was"
            )
        return content

    def _descriptor(self, shard: int) -> int:
        if shard not in self._opened:
            self._opened[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            if len(self._opened) > _OPEN:
                os.close(self._opened.popitem(last=False)[1])
        self._opened.move_to_end(shard)
        return self._opened[shard]


def _indexed(root: Path) -> tuple[list[Path], np.ndarray]:
    """The shards in ``root`` and, of type ``_IMAGE``, their images."""
    paths = sorted(root.glob("*.tar"))
    index = root / INDEX
    known, images = _read_index(index)
    _see_complete(root, paths, [name for name, *_ in known])
    try:
        now = [(path.name, (s := path.stat()).st_size, s.st_mtime_ns) for path in paths]
    except OSError as error:
        raise UserError(f"cannot read the shard {error.filename}: {error.strerror}") from None
    if known != now:
        found = [(i, *image) for i, path in enumerate(paths) for image in _images_in(path)]
        images = np.array(found, dtype=_IMAGE)
        names = np.array([name for name, *_ in now])
        stats = np.array([stats for _, *stats in now], dtype="i8")
        # where the folder may not be written, every start reads the shards from end to end
        with suppress(UserError):
            write_atomically(
                index, lambda path: np.savez(path, images=images, names=names, stats=stats)
            )
    return paths, images


def _read_index(path: Path) -> tuple[list[tuple[str, int, int]], np.ndarray]:
    """(name, bytes, time of change) of the shards that were indexed, and their images."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                # not written here, and larger than it looks
                return [], np.empty(0, _IMAGE)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            images = held["images"]
            stats = held["stats"].tolist()
            known = [(n, *s) for n, s in zip(held["names"].tolist(), stats, strict=True)]
            if images.dtype == _IMAGE and _are_inside(images, [size for _, size, _ in known]):
                return known, images
    # numpy and zipfile raise what they like about a file that is none of theirs
    except Exception:
        pass
    return [], np.empty(0, _IMAGE)


def _are_inside(images: np.ndarray, sizes: Sequence[int]) -> bool:
    """Whether every image has a label and lies in a shard; of how many bytes those are."""
    shard, size, offset = images["shard"], images["size"], images["offset"]
    if images.ndim != 1 or not len(images) or shard.min() < 0 or shard.max() >= len(sizes):
        return False
    room = np.array(sizes, "i8")[shard]
    least = min(size.min(), offset.min(), images["label"].min())
    # no sum of the two, which may be larger than a number of 64 bits
    return bool(least >= 0 and (size <= room).all() and (offset <= room - size).all())


def _see_complete(root: Path, paths: Sequence[Path], known: Sequence[str]) -> None:
    """Raise a UserError where a shard is missing."""
    if not paths:
        raise UserError(f"{root} holds no shard: expected tar files, NAME-NUMBER.tar")
    if gone := sorted(set(known) - {path.name for path in paths}):
        raise UserError(
            f"{root}: shards are missing: {', '.join(gone[:5])}. Put them back, or remove "
            f"{root / INDEX}, which knows them, if they are to be left out"
        )
    numbers: dict[str, list[int]] = {}
    for path in paths:
        if match := re.fullmatch(r"(.*?)(\d+)", path.stem):
            numbers.setdefault(match[1], []).append(int(match[2]))
    for prefix, there in numbers.items():
        if absent := sorted(set(range(min(there), max(there))) - set(there)):
            raise UserError(
                f"{root}: shards are missing: there are {prefix}*.tar from number {min(there)} to "
                f"{max(there)}, but not {', '.join(map(str, absent[:5]))}"
            )


def _images_in(path: Path) -> list[tuple[int, int, int]]:
    """(label, bytes, where they begin) of each image of a shard, in its order."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    for member, content in _members(path):
        name = member.name
        # the key ends at the first dot of the file's name
        match = re.fullmatch(r"(.*/)?([^/.]*)\.([^/]*)", name)
        if match is None:
            continue
        key, kind = (match[1] or "") + match[2], match[3].lower()
        if kind in _IMAGE_KINDS:
            if key in images:
                raise UserError(f"{path} is not a shard: {key} has two images")
            images[key] = member.size, member.offset_data
        elif kind == "cls":
            text = content()
            if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
                raise UserError(
                    f"{path} is not a shard: {name} must hold a label, a number from 0, got "
                    f"{text[:20]!r}"
                )
            labels[key] = int(text)
    for key in images.keys() ^ labels.keys():
        lacks = "its label" if key in images else "its image"
        raise UserError(f"{path} is not a shard: {key} lacks {lacks} (KEY.jpg and KEY.cls)")
    if not images:
        raise UserError(f"{path} is not a shard: it holds no image (KEY.jpg and KEY.cls)")
    return [(labels[key], *place) for key, place in images.items()]


_IMAGE_KINDS = {"jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp"}


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """Each file in a tar file, and what reads it, to be called before the next is asked for."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.issparse() or member.size > path.stat().st_size:
                    raise tarfile.ReadError(f"{member.name} is larger than what it takes up")
                if member.isfile():
                    yield member, partial(_content, tar, member)
            # tarfile takes a header that it cannot read for the end
            with path.open("rb") as file:
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"no end of archive at byte {tar.offset:,}")
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror or error}") from None
    except tarfile.TarError as error:
        raise UserError(f"the shard {path} is cut short or damaged: {error}") from None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    return cast(IO[bytes], tar.extractfile(member)).read()
