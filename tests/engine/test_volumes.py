"""Volumes: how NIfTI and NumPy's files are read, cut and mirrored, and runs on them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from effdense.__main__ import main
from effdense.commands.train import parse
from effdense.engine import plots
from effdense.engine.data.datasets import load
from effdense.engine.data.images import ImageData
from effdense.engine.data.volumes import VolumeReader
from effdense.engine.export import load as load_run
from effdense.engine.options import TrainConfig
from effdense.engine.training import train
from effdense.errors import UserError
from tests.helpers.launch import flags
from tests.helpers.pictures import write_volumes
from tests.helpers.ranks import killed_and_resumed, last_row

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("monai")

BOX = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5) - 10
OPTIONS: dict[str, Any] = {
    **{"data": "csv", "data_dir": "ct", "table": "ct/table.csv", "group_column": "patient"},
    **{"image_column": "volume", "spatial_dims": 3, "arch": "densenet_bc", "depth": 10},
    **{
        "val_fraction": 0.3,
        "growth_rate": 4,
        "batch_size": 4,
        "epochs": 1,
        "threads": 1,
        "checkpoint_steps": 1,
    },
}
MORE: list[object] = [
    *("--label-columns", "finding", "--window", -200, 600),
    *("--spacing", 2, 2, 2, "--crop", 8, 8, 8),
]


def write(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_is_read_as_it_is(suffix: str, tmp_path: Path) -> None:
    read = VolumeReader(None, None)(write(tmp_path / f"a{suffix}", BOX))
    assert type(read) is torch.Tensor
    assert torch.equal(read, torch.from_numpy(BOX).float()[None])
    windowed = VolumeReader(None, (0, 40.8))(tmp_path / f"a{suffix}").flatten()
    assert windowed[[0, 10, 14, 59]].tolist() == pytest.approx([0, 0, 25, 255])


def test_axes_are_turned_to_the_right_the_front_and_the_top(tmp_path: Path) -> None:
    left = np.diag([-1.0, 1.0, -1.0, 1.0])
    read = VolumeReader(None, None)(write(tmp_path / "a.nii", BOX[::-1, :, ::-1], left))
    assert torch.equal(read[0], torch.from_numpy(BOX).float())


def test_spacing_is_resampled(tmp_path: Path) -> None:
    smooth = np.linspace(0, 1, 17)[:, None, None] * np.ones((17, 9, 5))
    path = write(tmp_path / "a.nii", smooth.astype(np.float32), np.diag([1.0, 2.0, 4.0, 1.0]))
    read = VolumeReader((2.0, 2.0, 2.0), None)(path)
    assert read.shape == (1, 9, 9, 9)
    assert read[0, :, 4, 4].numpy() == pytest.approx(np.linspace(0, 1, 9), abs=1e-5)


def test_numpy_s_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", BOX)
    assert torch.equal(
        VolumeReader(None, None)(tmp_path / "a.npy"), torch.from_numpy(BOX).float()[None]
    )
    with pytest.raises(UserError, match="does not say its spacing: leave out --spacing"):
        VolumeReader((1.0, 1.0, 1.0), None)(tmp_path / "a.npy")
    np.save(tmp_path / "flat.npy", BOX[0])
    with pytest.raises(UserError, match=r"flat.npy is not one volume of three axes, but \(4, 5\)"):
        VolumeReader(None, None)(tmp_path / "flat.npy")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        VolumeReader(None, None)(tmp_path / "objects.npy")


def test_a_series_of_volumes_is_none(tmp_path: Path) -> None:
    series = np.stack([BOX, BOX], axis=3)
    with pytest.raises(UserError, match=r"is not one volume of three axes, but \(2, 3, 4, 5\)"):
        VolumeReader(None, None)(write(tmp_path / "a.nii", series))


def folder(root: Path, **options: Any) -> ImageData:
    config = TrainConfig(data="imagefolder", data_dir=root, spatial_dims=3, **options)
    return load(config.resolved(), download=False)


def read_all(data: ImageData, epoch: int | None, size: int = 2) -> torch.Tensor:
    split = data.train
    batches = split.batches(torch.arange(len(split)).split(size), epoch, torch.device("cpu"))
    return torch.cat([images for images, _ in batches])


def test_folders_of_volumes(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("no", "yes"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                np.save(tmp_path / part / name / f"{i}.npy", BOX + i)
    (tmp_path / "train" / "no" / "slice.png").touch()
    data = folder(tmp_path, crop=(3, 3, 7), num_workers=0)
    assert data.notes == (f"{tmp_path}/train: 1 files are not read (.png)",)
    assert (len(data.train), data.in_channels, data.classes) == (4, 1, ("no", "yes"))
    middle = read_all(data, None)
    assert middle.shape == (4, 1, 3, 3, 7)
    # zeros before and behind
    assert not middle[0, 0, :, :, [0, 6]].any()
    cut = [torch.from_numpy(BOX[:, first : first + 3]).float() for first in (0, 1)]
    assert any(torch.equal(middle[0, 0, :, :, 1:6], one) for one in cut)
    global_state = torch.get_rng_state()
    drawn = read_all(data, 1)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert torch.equal(read_all(folder(tmp_path, crop=(3, 3, 7), num_workers=2), 1, 3), drawn)
    assert not torch.equal(read_all(data, 2), drawn)
    # both ways round along each axis
    whole = folder(tmp_path, crop=(3, 4, 5), num_workers=0)
    corners = {float(read_all(whole, epoch)[0, 0, 0, 0, 0]) for epoch in range(40)}
    assert len(corners) == 8


def test_options_of_volumes_are_for_volumes() -> None:
    for options in ({"spacing": (1.0, 1.0, 1.0)}, {"crop": (8, 8, 8)}):
        with pytest.raises(UserError, match="three positive numbers, with --spatial-dims 3"):
            TrainConfig(**options).resolved()
    with pytest.raises(UserError, match="--spatial-dims must be 2 but for imagefolder and csv"):
        TrainConfig(spatial_dims=3).resolved()
    files: Any = {"data": "imagefolder", "spatial_dims": 3}
    with pytest.raises(UserError, match="--crop must be three positive numbers"):
        TrainConfig(**files, crop=(8, 0, 8)).resolved()
    config = TrainConfig(**files).resolved()
    assert (config.image_shape, config.channels, config.normalization, config.batch_size) == (
        (64, 64, 64),
        1,
        "measured",
        8,
    )


def test_a_run_on_volumes_is_loaded_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_volumes(tmp_path / "ct", 36)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "draw", lambda *_: [])
    options = {**OPTIONS, "epochs": 6, "num_workers": 0, "lr": 0.05}
    train(parse(list(map(str, [*flags(**options), *MORE, "--channels-last"])), ""))
    assert last_row(tmp_path / "runs" / "csv-1" / "scores.csv")["auroc"] == 1
    model: Any = load_run("runs/csv-1")
    volumes = torch.stack([model.preprocess(f"ct/{i}.nii.gz") for i in range(4)])
    assert volumes.shape == (4, 1, 8, 8, 8)
    said = model.probabilities(model(volumes)).argmax(1)
    assert [model.classes[i] for i in said] == ["none", "none", "mass", "mass"]
    main(["predict", "runs/csv-1", "ct/0.nii.gz", "ct/2.nii.gz", "-o", "said.csv"])
    _, *rows = csv.reader(Path("said.csv").read_text().splitlines())
    assert [row[:2] for row in rows] == [["ct/0.nii.gz", "none"], ["ct/2.nii.gz", "mass"]]


@pytest.mark.slow
def test_killed_and_resumed_on_one_two_and_three_processes(tmp_path: Path) -> None:
    write_volumes(tmp_path / "ct", 36)
    options = {**OPTIONS, "num_workers": 1}
    scores = killed_and_resumed(tmp_path, [*flags(**options), *MORE])
    assert {"error", "auroc"} <= set(scores)
    recorded = yaml.safe_load((tmp_path / "whole-1" / "config.yaml").read_text())
    assert recorded["options"]["spatial_dims"] == 3
