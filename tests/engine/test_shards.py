"""WebDataset shards: the same samples as from a folder, and one clear error for each damage."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from effdense.engine.data import image_files, shards
from effdense.engine.data.datasets import load
from effdense.engine.data.image_files import prefetched
from effdense.engine.data.images import ImageData, Split
from effdense.engine.data.shards import INDEX, Shards
from effdense.engine.options import TrainConfig
from effdense.errors import UserError
from tests.helpers.pictures import write_folder, write_shard, write_shards

CPU = torch.device("cpu")


def found(data: Any, data_dir: Path, **options: Any) -> ImageData:
    config = TrainConfig(data=data, data_dir=data_dir, image_size=16, **options).resolved()
    return load(config, download=False)


def read_all(split: Split, epoch: int | None, size: int = 5) -> tuple[torch.Tensor, ...]:
    chunks = torch.arange(len(split)).split(size)
    return tuple(map(torch.cat, zip(*split.batches(chunks, epoch, CPU), strict=True)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "folder", train=9, val=2)


@pytest.fixture
def packed(tmp_path: Path, folder: Path) -> Path:
    return write_shards(tmp_path / "shards", folder)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_give_what_the_folder_gives(num_workers: int, folder: Path, packed: Path) -> None:
    assert len(list((packed / "train").glob("*.tar"))) == 3
    one = found("imagefolder", folder, num_workers=0)
    other = found("webdataset", packed, num_workers=num_workers)
    assert other.classes == ("0", "1")
    assert (len(other.train), len(other.test)) == (18, 4)
    for epoch, part in ((1, "train"), (2, "train"), (None, "test")):
        expected, got = (read_all(getattr(data, part), epoch) for data in (one, other))
        assert all(map(torch.equal, expected, got))
    (packed / "classes.txt").write_text("cat\ndog\n")
    assert found("webdataset", packed).classes == ("cat", "dog")


def test_a_shard_is_read_from_end_to_end_once(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_all(found("webdataset", packed, num_workers=0).train, 1)
    indexed: list[str] = []
    real = shards._images_in

    def counted(path: Path) -> Any:
        indexed.append(path.name)
        return real(path)

    monkeypatch.setattr(shards, "_images_in", counted)
    assert all(map(torch.equal, read_all(found("webdataset", packed).train, 1), first))
    assert not indexed
    # a shard that has changed
    os.utime(packed / "train" / "train-000001.tar", (1, 1))
    found("webdataset", packed)
    assert indexed == [f"train-{i:06}.tar" for i in range(3)]
    # an index that is none, and one that cannot be written
    for spoil in (lambda path: path.write_bytes(b"PK\3\4"), Path.mkdir):
        index = packed / "train" / INDEX
        index.unlink()
        spoil(index)
        indexed.clear()
        assert all(map(torch.equal, read_all(found("webdataset", packed).train, 1), first))
        assert len(indexed) == 3


def test_no_more_shards_are_held_open_than_may_be(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_OPEN", 2)
    source = Shards(packed / "train")
    before = len(os.listdir("/proc/self/fd"))
    images = [source.read(index).numpy().tobytes() for index in range(18)]
    assert [source.read(index).numpy().tobytes() for index in (17, 0, 8)] == [
        images[index] for index in (17, 0, 8)
    ]
    assert len(os.listdir("/proc/self/fd")) <= before + 2


PICTURE = {"a.cls": b"0", "a.png": b"x"}


def shard(members: dict[str, bytes]) -> Callable[[Path], None]:
    return lambda train: write_shard(train / "train-000001.tar", members)


def cut(train: Path) -> None:
    path = train / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])


def cut_between(train: Path) -> None:
    path = train / "train-000001.tar"
    path.write_bytes(path.read_bytes().rstrip(b"\0")[:-1] + b"\0" * 512)


def flip_header(train: Path) -> None:
    path = train / "train-000001.tar"
    content = bytearray(path.read_bytes())
    second = content.index(b"ustar", 512)  # not the first header, which tarfile itself tells
    content[second] ^= 1
    path.write_bytes(content)


def gone(train: Path) -> None:
    Shards(train)
    (train / "train-000002.tar").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "train-000001.tar is cut short or damaged: unexpected end of data"),
        (flip_header, "train-000001.tar is cut short or damaged: no end of archive at byte"),
        (lambda train: (train / "train-000001.tar").unlink(), "from number 0 to 2, but not 1"),
        (gone, "shards are missing: train-000002.tar. Put them back, or remove"),
        (lambda train: (train / "train-000001.tar").write_bytes(b"?" * 9999), "is cut short or d"),
        (shard({"a.png": b"x"}), "train-000001.tar is not a shard: a lacks its label"),
        (shard({**PICTURE, "d/b.cls": b"1"}), "is not a shard: d/b lacks its image"),
        (shard({"a.cls": b"cat", "a.png": b"x"}), "a.cls must hold a label, .* got b'cat'"),
        (shard({**PICTURE, "a.jpg": b"x"}), "is not a shard: a has two images"),
        (shard({"readme.txt": b""}), "is not a shard: it holds no image"),
        (lambda train: [path.unlink() for path in train.iterdir()], "holds no shard"),
        (lambda train: train.rename(train.parent / "tren"), "holds no folder train"),
        (lambda train: (train.parent / "classes.txt").write_text("cat"), "has the label 1, but"),
    ],
)
def test_shards_that_cannot_be_trained_on(
    damage: Callable[[Path], Any], said: str, packed: Path
) -> None:
    damage(packed / "train")
    with pytest.raises(UserError, match=said):
        found("webdataset", packed)


def test_a_label_that_only_the_test_images_have(packed: Path) -> None:
    write_shard(packed / "val" / "val-000000.tar", {"a.cls": b"7", "a.png": b"x"})
    with pytest.raises(UserError, match="val has the label 7, but there are 2 classes"):
        found("webdataset", packed)


def test_an_image_that_cannot_be_read(packed: Path) -> None:
    path = packed / "train" / "train-000001.tar"
    content = bytearray(path.read_bytes())
    begin = content.index(b"\x89PNG")
    content[begin : begin + 4] = b"gone"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-000001.tar: cat/007.png cannot be read as an im"):
        read_all(found("webdataset", packed, num_workers=1).train, 1)
    train = found("webdataset", packed, num_workers=1, corrupt_images="skip").train
    images, labels = read_all(train, 1)
    assert len(images) == len(labels) == 18
    assert train.unreadable == {f"{path}: cat/007.png"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_goes_while_it_is_needed(num_workers: int, packed: Path) -> None:
    """That is no image to skip."""
    options = {"num_workers": num_workers, "corrupt_images": "skip"}
    train = found("webdataset", packed, **options).train
    path = packed / "train" / "train-000001.tar"
    path.rename(packed / "moved.tar")
    with pytest.raises(UserError, match=r"^the shard .*train-000001.tar cannot be read any more"):
        read_all(train, 1)
    path.write_bytes((packed / "moved.tar").read_bytes()[:600])
    train = found("webdataset", write_shards(packed / "again", packed.parent / "folder")).train
    os.truncate(packed / "again" / "train" / "train-000001.tar", 600)
    with pytest.raises(UserError, match="has become shorter than byte"):
        read_all(train, 1)


def numbered(count: int, made: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for number in range(count):
        made.append(number)
        yield torch.tensor([number]), torch.tensor([threading.get_ident()])
    raise OSError("the end")


def test_batches_are_made_while_others_are_in_use() -> None:
    made: list[int] = []
    batches = prefetched(numbered(9, made), CPU)
    for expected in range(9):
        number, thread = next(batches)
        assert number.item() == expected
        assert thread.item() != threading.get_ident()
        # in use: the next ones are made meanwhile, and no more than may be
        ready = min(9, expected + 1 + image_files._AHEAD)
        end = time.monotonic() + 60
        while len(made) < ready and time.monotonic() < end:
            time.sleep(0.001)
        assert ready <= len(made) <= ready + 1
    with pytest.raises(OSError, match="the end"):
        next(batches)


def test_batches_that_nobody_wants_any_more_are_not_made() -> None:
    made: list[int] = []
    before = set(threading.enumerate())
    batches = prefetched(numbered(1000, made), CPU)
    next(batches)
    assert any(thread.name == "prefetch" for thread in set(threading.enumerate()) - before)
    batches.close()  # type: ignore[attr-defined]
    assert len(made) <= 3 + image_files._AHEAD
    assert not set(threading.enumerate()) - before


class _Ring:
    """Garbage that is found by a collection alone, and says which process has found it."""

    def __init__(self, found_by: Path) -> None:
        self.me, self.found_by = self, found_by

    def __del__(self) -> None:
        self.found_by.with_suffix(f".{os.getpid()}").touch()


class _Collecting(torch.utils.data.Dataset[Any]):
    def __getitem__(self, key: Any) -> int:
        gc.collect()
        return os.getpid()


def test_a_loader_process_leaves_the_trainers_garbage_alone(tmp_path: Path) -> None:
    """Finalizers of what a fork has copied may wait for threads that it does not have."""
    gc.disable()
    try:
        _Ring(tmp_path / "found")
        wanted, seen = [torch.arange(2)] * 3, []

        def finish(read: Iterator[torch.Tensor]) -> Iterator[Any]:
            for pids in read:
                seen.extend(pids.tolist())
                yield pids

        batches = image_files.loaded(_Collecting(), 0, wanted, 1, CPU, 2, finish)
        assert len(list(batches)) == 3
        assert len(set(seen)) == 2
        assert os.getpid() not in seen
        assert not list(tmp_path.iterdir())
    finally:
        gc.enable()
        gc.collect()
    assert [path.suffix for path in tmp_path.iterdir()] == [f".{os.getpid()}"]
