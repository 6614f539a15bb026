"""Data that somebody made to do harm, or that a disk has spoiled: named in a line, never run."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from effdense.engine.checkpoint import MANIFEST, CheckpointStore, Position
from effdense.engine.data import shards
from effdense.engine.data.image_files import Folder, Listed
from effdense.engine.data.pixels import IMAGES, read_pixels
from effdense.engine.data.shards import INDEX, Shards
from effdense.engine.data.tables import Part, read_table
from effdense.engine.options import TrainConfig
from effdense.errors import UserError


def _giant(path: Path) -> None:
    """A PNG of a billion pixels in a hundred bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        whole = kind + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 25_000, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))


def test_an_image_of_a_billion_pixels_is_one_that_cannot_be_read(tmp_path: Path) -> None:
    _giant(tmp_path / "giant.png")
    with pytest.raises(Image.DecompressionBombError):
        read_pixels(tmp_path / "giant.png")


def test_a_link_that_leads_back_is_named(tmp_path: Path) -> None:
    (tmp_path / "cats\nand dogs").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cats\nand dogs" / "a\nb.png")
    folder = Folder(tmp_path, read_pixels, IMAGES)
    assert folder.read(0).shape == (3, 4, 4)
    (tmp_path / "cats\nand dogs" / "back").symlink_to(tmp_path)
    with pytest.raises(UserError, match="and dogs/back in it leads back to where it lies"):
        Folder(tmp_path, read_pixels, IMAGES)


def test_two_links_around_each_other_are_named_at_once(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    (tmp_path / "cats" / "to").symlink_to(tmp_path / "dogs")
    # the same folder twice is no circle
    assert len(Folder(tmp_path, read_pixels, IMAGES)) == 3
    (tmp_path / "dogs" / "to").symlink_to(tmp_path / "cats")
    # each doubles the ways around, 40 deep
    (tmp_path / "dogs" / "too").symlink_to(tmp_path / "cats")
    with pytest.raises(UserError, match="leads back to where it lies"):
        Folder(tmp_path, read_pixels, IMAGES)


def test_names_that_are_no_utf_8_are_read(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    path = tmp_path / "cats" / os.fsdecode(b"\xff\xe9.png")
    Image.new("RGB", (4, 6), (7, 8, 9)).save(path)
    folder = Folder(tmp_path, read_pixels, IMAGES)
    assert folder.name(0) == str(path)
    assert folder.read(0)[:, 0, 0].tolist() == [7, 8, 9]


def _circle(path: Path) -> Path:
    """A link to a link to it."""
    other = path.with_name("other")
    path.symlink_to(other)
    other.symlink_to(path)
    return path


def test_links_to_each_other_are_no_file_and_no_folder(tmp_path: Path) -> None:
    classes = tmp_path / "classes"
    (classes / "cats").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(classes / "cats" / "a.png")
    _circle(classes / "cats" / "b.png")
    folder = Folder(classes, read_pixels, IMAGES)
    assert [Path(folder.name(index)).name for index in range(len(folder))] == ["a.png", "b.png"]
    with pytest.raises(OSError, match="symbolic links"):
        folder.read(1)
    with pytest.raises(UserError, match="is not a folder of images"):
        Folder(_circle(tmp_path / "round"), read_pixels, IMAGES)
    with pytest.raises(UserError, match="is not a folder of images"):
        Folder(classes / "cats" / "a.png", read_pixels, IMAGES)
    with pytest.raises(UserError, match=r"cannot read the table .*symbolic links"):
        read_table(TrainConfig(data="csv", table=tmp_path / "round").resolved())
    listed = Part(np.array([b"round"]), torch.zeros(1))
    with pytest.raises(UserError, match="round is not there"):
        Listed(tmp_path, listed, read_pixels)


# ------------------------------------------------------------------------- shards


def _shard(path: Path, members: dict[str, bytes], **changes: Any) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(file, "PNG")
    return file.getvalue()


def test_names_in_shards_lead_nowhere(tmp_path: Path) -> None:
    name = "../../outside/a\nb"
    _shard(tmp_path / "a-0.tar", {f"{name}.png": _png(), f"{name}.cls": b"0"})
    found = Shards(tmp_path)
    assert found.read(0).shape == (3, 4, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"a-0.tar", INDEX}
    assert not (tmp_path.parent.parent / "outside").exists()


def test_a_member_that_is_larger_than_what_it_takes_up_is_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.cls")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 512
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    # one piece of 512 bytes, of a file of 64 GiB
    block[386:410] = b"00000000000\0" + b"00000001000\0"
    block[483:495] = b"\x80" + (1 << 36).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "a-0.tar").write_bytes(bytes(block) + bytes(512) + bytes(1024))
    with pytest.raises(UserError, match=r"damaged: a\.cls is larger than what it takes up"):
        Shards(tmp_path)


def test_an_index_that_lies_is_made_anew(tmp_path: Path) -> None:
    for number in range(2):
        members = {
            f"{i}.{kind}": _png() if kind == "png" else b"1"
            for i in "ab"
            for kind in ("png", "cls")
        }
        _shard(tmp_path / f"a-{number}.tar", members)
    expected = Shards(tmp_path)._images
    with np.load(tmp_path / INDEX) as held:
        known = {name: held[name] for name in held.files}
    for field, value in (
        *(("shard", 7), ("shard", -1), ("size", 1 << 40), ("size", -5)),
        *(("offset", 1 << 62), ("offset", -512), ("label", -1)),
    ):
        images = known["images"].copy()
        images[field][1] = value
        np.savez(tmp_path / INDEX, **(known | {"images": images}))
        np.testing.assert_array_equal(Shards(tmp_path)._images, expected)
    np.savez_compressed(tmp_path / INDEX, **(known | {"more": np.zeros(1 << 22)}))
    np.testing.assert_array_equal(Shards(tmp_path)._images, expected)
    trap = np.array([_Trap(tmp_path / "made")], dtype=object)
    np.savez(tmp_path / INDEX, **(known | {"images": trap}), allow_pickle=True)
    np.testing.assert_array_equal(Shards(tmp_path)._images, expected)
    assert not (tmp_path / "made").exists()


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


# ------------------------------------------------------------------ changed at random


def _changed(whole: bytes, rng: random.Random) -> bytes:
    content = bytearray(whole)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = rng.randrange(rng.choice([min(600, len(content)), len(content)]))
        content[place] = rng.choice([0, 255, rng.randrange(256), content[place] ^ 1])
    if rng.random() < 0.2:
        del content[rng.randrange(len(content)) :]
    return bytes(content)


TRIES = int(os.environ.get("EFFDENSE_FUZZ", "100"))
"""More by hand: EFFDENSE_FUZZ=100000 takes an hour."""


def _fuzz(path: Path, read: Any) -> None:
    """Whatever bytes change, ``read`` gives something or raises a UserError, of a line."""
    rng, whole, said = random.Random(0), path.read_bytes(), []
    for _ in range(TRIES):
        path.write_bytes(_changed(whole, rng))
        try:
            read()
        except UserError as error:
            said.append(str(error))
    assert said


def test_shards_changed_at_random(tmp_path: Path) -> None:
    _shard(tmp_path / "a-0.tar", {"a.png": _png(), "a.cls": b"1", "b.png": _png(), "b.cls": b"0"})

    def read() -> None:
        (tmp_path / INDEX).unlink(missing_ok=True)
        found = Shards(tmp_path)
        for index in range(len(found)):
            found.name(index)
            found._bytes(found._images[index].tolist()[0], 4, 512)

    _fuzz(tmp_path / "a-0.tar", read)


def test_indices_changed_at_random(tmp_path: Path) -> None:
    _shard(tmp_path / "a-0.tar", {"a.png": _png(), "a.cls": b"1"})
    Shards(tmp_path)
    rng, whole = random.Random(0), (tmp_path / INDEX).read_bytes()
    for _ in range(TRIES):
        (tmp_path / INDEX).write_bytes(_changed(whole, rng))
        known, images = shards._read_index(tmp_path / INDEX)
        assert len(images) == len(known) or not known


def test_tables_changed_at_random(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    rows = [f'"a, {i}.png",{"train" if i % 3 else "val"},{i % 2},{i % 2}' for i in range(12)]
    path.write_text("\n".join(["image,split,x,y", *rows]))
    options: dict[str, Any] = {"data": "csv", "table": path, "label_columns": ("x", "y")}
    _fuzz(path, lambda: read_table(TrainConfig(**options).resolved()))


def test_checkpoints_changed_at_random(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    path = store.publish(Position(1, 3), {"a": b"1" * 40, "b": b"2"})
    whole = (path / MANIFEST).read_bytes()
    rng, kept, said, newer = random.Random(0), 0, list[str](), list[str]()
    for _ in range(TRIES):
        (path / MANIFEST).write_bytes(_changed(whole, rng))
        try:
            found = store.newest(said.append)
            kept += found is not None
            assert found is None or found.files.items() <= {"a": b"1" * 40, "b": b"2"}.items()
        except UserError as error:
            newer.append(str(error))
        for aside in store.folder.glob("damaged-*"):
            aside.rename(path)
    assert said
    assert kept
    assert all("newer effdense" in line for line in newer)


def test_pickles_of_checkpoints_are_not_executed(tmp_path: Path) -> None:
    from effdense.engine.resumption import _loaded

    with pytest.raises(pickle.UnpicklingError):
        _loaded(pickle.dumps(_Trap(tmp_path / "made"), protocol=2))
    assert not (tmp_path / "made").exists()
