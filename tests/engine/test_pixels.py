"""Image files as they are: what PIL opens, what a folder holds, what images are normalised by."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from effdense.engine.data.datasets import load
from effdense.engine.data.images import (
    ImageData,
    InMemory,
    Normalization,
    trivially_augmented,
)
from effdense.engine.data.pixels import pixels, read_pixels
from effdense.engine.distributed import World
from effdense.engine.normalization import settle_normalization
from effdense.engine.options import TrainConfig
from effdense.engine.records import WorkDir
from effdense.errors import UserError
from tests.helpers.pictures import write_folder
from tests.helpers.ranks import by_ranks

RAMP = np.arange(65536).reshape(256, 256)


def saved(path: Path, values: np.ndarray, **options: Any) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_all_there(name: str, channels: int, tmp_path: Path) -> None:
    path = saved(tmp_path / name, RAMP.astype(np.uint16))
    read = read_pixels(path, channels, None)
    assert read.shape == (channels, 256, 256)
    assert len(read.unique()) == 65536
    expected = torch.from_numpy(RAMP.astype(np.float32) * (255 / 65535))
    torch.testing.assert_close(read, expected.expand(channels, -1, -1))
    twelve = read_pixels(path, channels, (0, 4095))
    assert twelve.max() == 255
    assert len(twelve.unique()) == 4096


def test_sixteen_bits_of_the_other_byte_order(tmp_path: Path) -> None:
    with Image.open(saved(tmp_path / "a.tif", RAMP.astype(">u2"))) as image:
        assert image.mode == "I;16B"
    torch.testing.assert_close(
        read_pixels(tmp_path / "a.tif", 1, None)[0],
        torch.from_numpy(RAMP.astype(np.float32) * (255 / 65535)),
    )


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_without_a_range_need_a_window(kind: Any, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif", (RAMP - 1000).astype(kind))
    with pytest.raises(UserError, match=r"a.tif holds (floats|32-bit numbers): say with --window"):
        read_pixels(path, 1, None)
    read = read_pixels(path, 1, (-1000, 1000))[0].flatten()
    assert read[[0, 1000, 2000, 3000]].tolist() == [0, 127.5, 255, 255]


def deep_png(path: Path, values: np.ndarray, orientation: int = 1) -> Path:
    """(height, width, channels) of 16 bits as PNG, which PIL does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checked = kind + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    height, width, channels = values.shape
    kind = {2: 4, 3: 2, 4: 6}[channels]
    exif = b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHIHHI", 0x0112, 3, 1, orientation, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
        + chunk(b"eXIf", exif)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bits_a_colour_of_png(channels: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels)).astype(np.uint16)
    path = deep_png(tmp_path / "a.png", values)
    colours = values[..., :1].repeat(3, 2) if channels == 2 else values[..., :3]
    expected = torch.from_numpy(colours.astype(np.float32)).permute(2, 0, 1) * (255 / 65535)
    torch.testing.assert_close(read_pixels(path, 3, None), expected)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    grey = (expected * luma).sum(0, keepdim=True)
    torch.testing.assert_close(read_pixels(path, 1, None), grey, atol=0.05, rtol=0)
    twelve = read_pixels(path, 3, (0, 4095))
    torch.testing.assert_close(twelve, (expected * 65535 / 4095).clamp_max(255))
    turned = deep_png(tmp_path / "b.png", values, orientation=6)
    torch.testing.assert_close(read_pixels(turned, 3, None), expected.rot90(-1, (1, 2)))
    with (tmp_path / "a.png").open("rb") as file, Image.open(io.BytesIO(file.read())) as image:
        assert torch.equal(pixels(image, str, 3), read_pixels(path, 3, None))


def test_sixteen_bits_a_colour_of_tiff_are_refused(tmp_path: Path) -> None:
    """PIL itself writes none, and reads 8 of them."""
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8, 3), np.uint16), photometric="rgb")
    with pytest.raises(UserError, match=r"a.tif has 16 bits for each of its colours"):
        read_pixels(tmp_path / "a.tif", 3, None)


def test_eight_bits_are_as_they_were(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colour = np.stack([grey, grey.T, grey[::-1]], axis=2)
    path = saved(tmp_path / "colour.png", colour)
    assert torch.equal(read_pixels(path, 3, None), torch.from_numpy(colour).permute(2, 0, 1))
    assert read_pixels(path, 1, None).shape == (1, 16, 16)
    path = saved(tmp_path / "grey.png", grey)
    assert torch.equal(read_pixels(path, 3, None), torch.from_numpy(grey).expand(3, -1, -1))
    Image.fromarray(colour).quantize(256).save(tmp_path / "palette.png")
    assert torch.equal(
        read_pixels(tmp_path / "palette.png", 3, None),
        torch.from_numpy(np.array(Image.open(tmp_path / "palette.png").convert("RGB"))).permute(
            2, 0, 1
        ),
    )
    red = np.full((16, 16, 3), (250, 5, 5), np.uint8)
    Image.fromarray(red).convert("CMYK").save(tmp_path / "ink.jpg", quality=100)
    found = read_pixels(tmp_path / "ink.jpg", 3, None).float().mean((1, 2))
    assert found.tolist() == pytest.approx([250, 5, 5], abs=4)
    clear = np.dstack([red, np.zeros((16, 16), np.uint8)])
    assert read_pixels(saved(tmp_path / "clear.png", clear), 3, None)[:, 0, 0].tolist() == [
        250,
        5,
        5,
    ]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_they_say(orientation: int, tmp_path: Path) -> None:
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", np.ascontiguousarray(stored), exif=exif)
    assert read_pixels(path, 1, None)[0].tolist() == upright.tolist()
    deep = saved(tmp_path / "b.png", np.ascontiguousarray(stored).astype(np.uint16), exif=exif)
    assert torch.equal(read_pixels(deep, 1, (0, 255))[0], torch.from_numpy(upright).float())


def folder(root: Path, **options: Any) -> ImageData:
    config = TrainConfig(data="imagefolder", data_dir=root, image_size=16, num_workers=0, **options)
    return load(config.resolved(), download=False)


def test_what_a_folder_holds_and_is_not_read_is_counted(tmp_path: Path) -> None:
    root = write_folder(tmp_path, train=2, val=1)
    assert folder(root).notes == ()
    for name in ("a.gif", "b.GIF", "notes.txt", "README"):
        (root / "train" / "cat" / name).touch()
    (root / "val" / "stray.png").touch()
    assert folder(root).notes == (
        f"{root}/train: 1 files are not read (.GIF)",
        f"{root}/train: 1 files are not read (.gif)",
        f"{root}/train: 1 files are not read (.txt)",
        f"{root}/train: 1 files are not read (no suffix)",
        f"{root}/val: 1 files are not read (files in no class's folder)",
    )


def test_classes_without_images_are_said_or_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path, train=2, val=2, names=("ant", "bee", "cow"))
    for path in (root / "val" / "ant").iterdir():
        path.unlink()
    (root / "val" / "bee").rename(root / "bee")
    for path in (root / "train" / "bee").iterdir():
        path.unlink()
    data = folder(root)
    assert data.classes == ("ant", "bee", "cow")
    assert data.test.labels.tolist() == [2, 2]
    assert data.notes == (
        "no training image has the class bee",
        "no test image has the class ant, bee",
    )
    with pytest.raises(
        UserError, match=r"no training image has the class bee; .*--missing-classes"
    ):
        folder(root, missing_classes="stop")


def test_normalisation_is_measured_once(tmp_path: Path, alone: World) -> None:
    root = write_folder(tmp_path / "images", train=5, val=2)
    options: dict[str, Any] = {"channels": 1, "data_dir": root, "num_workers": 0}
    config = TrainConfig(data="imagefolder", image_size=16, **options).resolved()
    assert config.normalization == "measured"
    data = load(config, download=False)
    settle_normalization(config, data, alone)
    batches = list(data.train.batches([torch.arange(10)], None, torch.device("cpu")))
    images = batches[0][0]
    assert images.shape == (10, 1, 16, 16)
    assert abs(float(images.mean())) < 1e-4
    assert float(images.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert data.test.normalization == data.train.normalization


def test_normalisation_is_kept_only_with_the_run_that_is_gone_on_with(
    tmp_path: Path, alone: World
) -> None:
    def settled(**more: Any) -> dict[str, Any]:
        """On grey images of 10, then of 200."""
        options: dict[str, Any] = {"channels": 1, "image_size": 16, "num_workers": 0, **more}
        options |= {"data_dir": tmp_path / "images", "work_dir": tmp_path / "run"}
        config = TrainConfig(data="imagefolder", **options).resolved()
        data = load(config, download=False)
        settle_normalization(config, data, alone)
        if not (tmp_path / "run").exists():
            work_dir = WorkDir.claim(config)
            images = {"train": len(data.train), "test": len(data.test)}
            facts = {"normalization": data.train.normalization.fact(), "images": images}
            work_dir.write_config(config, alone, facts)
            work_dir.close()
        return data.train.normalization.fact()

    def paint(grey: int) -> None:
        for path in (tmp_path / "images").rglob("*.png"):
            Image.new("L", (20, 20), grey).save(path)

    write_folder(tmp_path / "images", train=5, val=2)
    paint(10)
    first = settled()
    paint(200)
    # of a run that failed before it had learnt anything
    second = settled()
    assert (first["mean"], second["mean"]) == ([10.0], [200.0])
    (tmp_path / "run" / "checkpoints" / "epoch-00002-step-0000000").mkdir(parents=True)
    assert settled() == first
    assert settled(overwrite=True) == second
    assert settled(seed=1) == second
    Image.new("L", (20, 20), 200).save(next((tmp_path / "images").rglob("*.png")).parent / "x.png")
    assert settled() == second


@pytest.mark.slow
def test_normalisation_is_the_same_for_any_number_of_processes(
    tmp_path: Path, alone: World
) -> None:
    from tests.helpers import workers

    together = by_ranks("normalization", 3, tmp_path)
    assert torch.equal(together["measured"], workers.normalization(alone)["measured"])


def test_trivial_augmentation_is_keyed_by_seed_epoch_and_sample() -> None:
    images = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8)

    def split(seed: int) -> InMemory:
        plain = Normalization((0.0,) * 3, (1.0,) * 3)
        return InMemory(images, torch.arange(12), plain, None, seed, trivially_augmented)

    def read(seed: int, epoch: int | None, order: torch.Tensor, size: int) -> torch.Tensor:
        batches = split(seed).batches(order.split(size), epoch, torch.device("cpu"))
        return torch.cat([found for found, _ in batches])

    state, in_order = torch.get_rng_state(), torch.arange(12)
    first = read(0, 1, in_order, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(read(0, 1, in_order.flip(0), 4), first.flip(0))
    for other in (read(0, 2, in_order, 5), read(1, 1, in_order, 5), read(0, 1, in_order + 12, 5)):
        assert not torch.equal(other, first)
    assert torch.equal(read(0, None, in_order, 5), images.float())


def test_trivial_augmentation_keeps_more_than_eight_bits(tmp_path: Path) -> None:
    deep = read_pixels(saved(tmp_path / "ramp.png", RAMP.astype(np.uint16)), 1, None)
    torch.manual_seed(0)
    kept = [len(trivially_augmented(deep).unique()) > 256 for _ in range(20)]
    assert sum(kept) > 10
    root = write_folder(tmp_path / "images", train=3, val=1)
    split = folder(root, augment="trivial-augment").train
    plain = folder(root).train
    for each in (split, plain):
        batches = each.batches([torch.arange(6)], 1, torch.device("cpu"))
        assert next(iter(batches))[0].shape == (6, 3, 16, 16)
    found, without = (
        next(iter(each.batches([torch.arange(6)], 1, torch.device("cpu"))))[0]
        for each in (split, plain)
    )
    assert not torch.equal(found, without)


def test_options_of_files_are_for_files() -> None:
    for options in ({"channels": 1}, {"window": (0.0, 1.0)}, {"normalization": "measured"}):
        with pytest.raises(UserError, match="left out: digits is no set of image files"):
            TrainConfig(**options).resolved()
    files: Any = {"data": "imagefolder"}
    with pytest.raises(UserError, match="--channels must be 1 or 3, got 2"):
        TrainConfig(**files, channels=2).resolved()
    with pytest.raises(UserError, match="--window must be two numbers, the lower one first"):
        TrainConfig(**files, window=(5.0, 1.0)).resolved()
    with pytest.raises(UserError, match="--normalization must be measured for one channel"):
        TrainConfig(**files, channels=1, normalization="imagenet").resolved()
