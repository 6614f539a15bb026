from __future__ import annotations

import hashlib
import pickle
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset, get_worker_info
from torchvision import datasets

from effdense.engine.data import order as data_module
from effdense.engine.data.datasets import load
from effdense.engine.data.images import ImageData, InMemory, Normalization, ShiftAndFlip, Split
from effdense.engine.data.order import global_batches, share
from effdense.engine.data.own import own_data
from effdense.engine.options import TrainConfig
from effdense.errors import UserError
from tests.helpers.pictures import write_folder

CPU = torch.device("cpu")


def read_all(split: Split, epoch: int | None = None, size: int = 7) -> tuple[torch.Tensor, ...]:
    batches = list(split.batches(torch.arange(len(split)).split(size), epoch, CPU))
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def loaded(download: bool = False, **options: Any) -> ImageData:
    return load(TrainConfig(**options).resolved(), download=download)


@pytest.mark.parametrize(("num_samples", "batch_size"), [(100, 10), (103, 10), (10, 10), (64, 1)])
def test_an_epoch_visits_samples_at_most_once_in_full_batches(
    num_samples: int, batch_size: int
) -> None:
    batches = global_batches(num_samples, batch_size, seed=3, epoch=1)
    assert {len(batch) for batch in batches} == {batch_size}
    visited = torch.cat(batches).tolist()
    assert len(visited) == num_samples // batch_size * batch_size
    assert len(set(visited)) == len(visited)
    assert set(visited) <= set(range(num_samples))


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat(global_batches(50, 5, seed, epoch)).tolist()

    torch.manual_seed(1)
    first = order(0, 1)
    torch.manual_seed(2)
    assert order(0, 1) == first
    others = [order(0, 2), order(1, 1), order(1, 2), order(2, 1)]
    assert len({tuple(o) for o in [first, *others]}) == 5


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 64])
def test_shares_are_even_and_make_up_the_whole(world_size: int, size: int) -> None:
    batch = torch.randperm(size)
    shares = [share(batch, rank, world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat(shares), batch)
    sizes = [len(part) for part in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("pad", "flip"), [(1, False), (4, True), (4, False), (0, True)])
def test_shift_and_flip_is_pad_mirror_crop(pad: int, flip: bool) -> None:
    augment = ShiftAndFlip(pad, flip)
    images = torch.randn(200, 3, 8, 6)
    drawn = augment.draw(200, seed=0, epoch=1)
    got = augment(images, drawn)
    for image, (y, x, mirrored), result in zip(images, drawn.tolist(), got, strict=True):
        padded = torch.nn.functional.pad(image, (pad,) * 4)
        crop = padded[:, y : y + 8, x : x + 6]
        torch.testing.assert_close(result, crop.flip(2) if mirrored else crop, rtol=0, atol=0)
    # every offset, and both or one orientation, do occur
    assert set(drawn[:, 0].tolist()) == set(drawn[:, 1].tolist()) == set(range(2 * pad + 1))
    assert set(drawn[:, 2].tolist()) == ({0, 1} if flip else {0})


def test_augmentation_is_keyed_by_seed_epoch_and_sample() -> None:
    images, labels = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8), torch.arange(40)

    def split(seed: int) -> InMemory:
        plain = Normalization((0.0,) * 3, (1.0,) * 3)
        return InMemory(images, labels, plain, ShiftAndFlip(2, True), seed)

    everything, _ = read_all(split(0), epoch=1)
    torch.manual_seed(99)
    shuffled = torch.randperm(40)
    batches = list(split(0).batches(shuffled.split(3), 1, CPU))
    assert torch.equal(torch.cat([b[0] for b in batches]), everything[shuffled])
    assert torch.equal(torch.cat([b[1] for b in batches]), shuffled)
    assert not torch.equal(read_all(split(0), epoch=2)[0], everything)
    assert not torch.equal(read_all(split(1), epoch=1)[0], everything)
    assert torch.equal(read_all(split(0), epoch=None)[0], images.float())


def test_digits_are_all_there_and_split_the_same_for_every_seed() -> None:
    parts = [loaded(data="digits", seed=seed, augment="none") for seed in (0, 1)]
    assert (len(parts[0].train), len(parts[0].test)) == (1437, 360)
    train, test = read_all(parts[0].train), read_all(parts[0].test)
    assert torch.equal(test[0], read_all(parts[1].test)[0])
    images = torch.cat([train[0], test[0]])
    assert images.shape == (1797, 1, 8, 8)
    assert len(images.unique(dim=0)) == 1797  # no picture in both parts
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01
    assert set(test[1].tolist()) == set(range(10))


def test_fake_data_can_be_learnt_and_does_not_divide() -> None:
    fake = loaded(data="fake", image_size=12)
    assert len(fake.test) % 2
    assert len(fake.test) % 3
    images, labels = read_all(fake.train)
    assert images.shape[1:] == (3, 12, 12)
    again = read_all(loaded(data="fake", image_size=12, seed=4).train)
    assert torch.equal(images, again[0])
    tints = torch.stack([images[labels == c].mean((0, 2, 3)) for c in range(10)])
    test, test_labels = read_all(fake.test)
    nearest = torch.cdist(test.mean((2, 3)), tints).argmin(1)
    assert (nearest == test_labels).float().mean() > 0.8


def write(path: Path, content: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_files_of_its_own_format(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiny batches; their checksums take the place of the published ones."""
    ten = name == "cifar10"
    source: Any = datasets.CIFAR10 if ten else datasets.CIFAR100
    key = "labels" if ten else "fine_labels"
    generator = np.random.default_rng(0)
    rows: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    for attribute in ("train_list", "test_list"):
        listed = []
        for file, _ in getattr(source, attribute):
            pixels = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
            classes = generator.integers(0, 10 if ten else 100, 4).tolist()
            rows.setdefault(attribute, []).append(pixels)
            labels.setdefault(attribute, []).extend(classes)
            checksum = write(tmp_path / source.base_folder / file, {"data": pixels, key: classes})
            listed.append([file, checksum])
        monkeypatch.setattr(source, attribute, listed)
    meta = dict(source.meta)
    classes = [str(i) for i in range(10 if ten else 100)]
    meta["md5"] = write(tmp_path / source.base_folder / meta["filename"], {meta["key"]: classes})
    monkeypatch.setattr(source, "meta", meta)

    found = loaded(data=name, data_dir=tmp_path)
    assert found.num_classes == (10 if ten else 100)
    mean, std = (
        ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
        if ten
        else ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4))
    )
    for split, attribute in ((found.train, "train_list"), (found.test, "test_list")):
        images, got = read_all(split)
        raw = np.concatenate(rows[attribute]).reshape(-1, 3, 32, 32).astype(np.float32)
        expected = (raw - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
        torch.testing.assert_close(images, torch.from_numpy(expected).float())
        assert got.tolist() == labels[attribute]
    # the paper's augmentation: training only
    assert not torch.equal(read_all(found.train, epoch=1)[0], read_all(found.train)[0])

    (tmp_path / source.base_folder / source.train_list[0][0]).write_bytes(b"cut")
    with pytest.raises(UserError, match="or damaged: add --download"):
        loaded(data=name, data_dir=tmp_path)


def test_svhn_from_files_of_its_own_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    listed, content = {}, {}
    for part, count in (("train", 5), ("test", 3), ("extra", 4)):
        url, file, _ = datasets.SVHN.split_list[part]
        pixels = generator.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels = generator.integers(1, 11, (count, 1), dtype=np.uint8)
        labels[0] = 10  # how the files write the digit 0
        scipy.io.savemat(tmp_path / file, {"X": pixels, "y": labels})
        content[part] = pixels.transpose(3, 2, 0, 1), labels[:, 0] % 10
        listed[part] = [url, file, hashlib.md5((tmp_path / file).read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", listed)

    both = loaded(data="svhn", data_dir=tmp_path)
    for split, parts in ((both.train, ["train", "extra"]), (both.test, ["test"])):
        images, got = read_all(split)
        raw = np.concatenate([content[part][0] for part in parts]).astype(np.float32)
        torch.testing.assert_close(images, torch.from_numpy(raw / 255))
        assert got.tolist() == np.concatenate([content[part][1] for part in parts]).tolist()
    # the paper does not augment SVHN
    assert torch.equal(read_all(both.train, epoch=1)[0], read_all(both.train)[0])

    (tmp_path / "extra_32x32.mat").unlink()
    with pytest.raises(UserError, match=r"SVHN is not in .*extra_32x32\.mat"):
        loaded(data="svhn", data_dir=tmp_path)


def test_a_failed_download_says_what_to_fetch_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = (tmp_path / "nowhere.tar.gz").as_uri()
    monkeypatch.setattr(datasets.CIFAR10, "url", nowhere)
    with pytest.raises(UserError) as error:
        loaded(download=True, data="cifar10", data_dir=tmp_path / "data")
    for part in ("could not fetch CIFAR10", nowhere, "cifar-10-batches-py"):
        assert part in str(error.value)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for part, per_class in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = generator.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def test_image_folder(image_folder: Path) -> None:
    def found(num_workers: int, seed: int = 0) -> ImageData:
        return loaded(
            data="imagefolder",
            data_dir=image_folder,
            image_size=32,
            num_workers=num_workers,
            seed=seed,
        )

    plain = found(0)
    assert (plain.num_classes, plain.in_channels) == (2, 3)
    images, labels = read_all(plain.test)
    assert images.shape == (6, 3, 32, 32)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert abs(images.mean()) < 0.5

    first = read_all(plain.train, epoch=1, size=5)[0]
    global_state = torch.get_rng_state()
    # neither the workers nor the batches nor the test process's generator matter
    torch.manual_seed(5)
    assert torch.equal(read_all(found(2).train, epoch=1, size=3)[0], first)
    torch.set_rng_state(global_state)
    assert not torch.equal(read_all(plain.train, epoch=2)[0], first)
    assert not torch.equal(read_all(found(0, seed=1).train, epoch=1)[0], first)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_image_folders_that_cannot_be_trained_on(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no folder train: .*--data-dir"):
        loaded(data="imagefolder", data_dir=tmp_path / "elsewhere")
    (image_folder / "val" / "dog").rename(image_folder / "val" / "wolf")
    with pytest.raises(UserError, match="only one of them has dog, wolf"):
        loaded(data="imagefolder", data_dir=image_folder)
    for picture in (image_folder / "val" / "wolf").iterdir():
        picture.unlink()
    found = loaded(data="imagefolder", data_dir=image_folder)
    assert (found.classes, found.notes) == (("cat", "dog"), ("no test image has the class dog",))
    for picture in (image_folder / "val" / "cat").iterdir():
        picture.unlink()
    with pytest.raises(UserError, match="is not a folder of images"):
        loaded(data="imagefolder", data_dir=image_folder)


def test_seeds_of_different_purposes_differ() -> None:
    keys = [
        data_module.random_key(purpose, seed, epoch)
        for purpose in ("order", "augmentation")
        for seed in range(20)
        for epoch in range(20)
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)


def folder_of_images(tmp_path: Path) -> Split:
    folder = write_folder(tmp_path / "images", train=8, val=2)
    return loaded(data="imagefolder", data_dir=folder, image_size=16, num_workers=0).train


def data_of_the_user_s(tmp_path: Path) -> Split:
    pairs: Any = TensorDataset(torch.zeros(16, 3, 8, 8), torch.arange(16) % 2)
    return own_data(pairs, pairs, seed=0, num_workers=0).train


class Drawn(Dataset[tuple[torch.Tensor, int]]):
    """What the generators of NumPy, of Python and of torch give, and a number of the process."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        info = get_worker_info()
        drawn = [np.random.rand(), random.random(), float(torch.rand(()))]
        return torch.tensor([[[*drawn, info.seed - info.id if info else 0]]]), index % 2


def test_what_is_drawn_in_any_way_is_keyed_by_seed_epoch_and_number() -> None:
    def read(epoch: int | None, seed: int = 0, workers: int = 0, first: int = 0) -> torch.Tensor:
        drawn = Drawn()
        split = own_data(drawn, drawn, seed, workers).train
        order = torch.arange(12).roll(-first)
        found = [images.flatten(1) for images, _ in split.batches(order.split(5), epoch, CPU)]
        return torch.cat(found)[order.argsort()]

    one = read(1)[:, :3]
    assert one.unique().numel() == one.numel()
    for same in (read(1), read(1, first=7), read(1, workers=1), read(1, workers=2, first=3)):
        assert torch.equal(same[:, :3], one)
    for other in (read(2), read(2, workers=1), read(1, seed=1, workers=1), read(None)):
        assert not (other[:, :3] == one).any()
    assert torch.equal(read(None)[:, :3], read(None, workers=1)[:, :3])
    # what a data set's own generators may be seeded with; the share of another rank
    seeds = {float(read(*args)[0, 3]) for args in ((1, 0, 1), (2, 0, 1), (1, 1, 1), (1, 0, 1, 5))}
    assert len(seeds) == 4


def test_the_program_s_own_generators_are_left_as_they_are() -> None:
    split = own_data(Drawn(), Drawn(), 0, 0).train

    def state() -> tuple[Any, ...]:
        numpy: Any = np.random.get_state()
        return random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()

    before = state()
    for epoch in (1, None):
        list(split.batches([torch.arange(12)], epoch, CPU))
    assert state() == before


@pytest.mark.parametrize("kind", [folder_of_images, data_of_the_user_s])
def test_without_loader_processes_samples_are_drawn_by_the_run_s_own_thread(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They set the process's one random state, from which dropout draws meanwhile."""
    forked, threads = torch.random.fork_rng, []

    def fork(*arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return forked(*arguments, **options)

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    read_all(kind(tmp_path), epoch=1, size=4)
    assert set(threads) == {threading.main_thread()}
