"""effdense.train: any module, any data set of (image, label), and what it tells on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import effdense
from effdense import TrainConfig
from effdense.engine.plots import read

SMALL: dict[str, Any] = {"epochs": 2, "batch_size": 16, "threads": 1, "lr": 0.05, "num_workers": 0}


class Blobs(Dataset[tuple[Tensor, int]]):
    """Plain: no targets, no classes; every image is moved at random when it is asked for."""

    def __init__(self, count: int, size: tuple[int, ...] = (9, 7)) -> None:
        source = torch.Generator().manual_seed(count)
        self.images = torch.randn(count, 2, *size, generator=source)
        self.numbers = torch.arange(count) % 3
        self.images += 3 * self.numbers.view(-1, *[1] * (len(size) + 1))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index] + 0.1 * torch.randn(()), int(self.numbers[index])


def plain(dims: int = 2) -> nn.Module:
    """No dense block in it."""
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    pool = nn.AdaptiveAvgPool2d(1) if dims == 2 else nn.AdaptiveAvgPool3d(1)
    body = [conv(2, 4, 3), norm(4), nn.ReLU(), pool, nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*body)


@pytest.mark.parametrize("size", [(9, 7), (5, 6, 7)], ids=str)
def test_a_plain_module_on_a_plain_data_set(size: tuple[int, ...], tmp_path: Path) -> None:
    seen: list[Any] = []
    model = plain(len(size))
    before = model.state_dict()["0.weight"].clone()
    result = effdense.train(
        TrainConfig(work_dir=str(tmp_path / "run"), **SMALL),  # type: ignore[arg-type]
        model=model,
        data=(Blobs(48, size), Blobs(13, size)),
        on_epoch=seen.append,
    )
    assert result.work_dir == tmp_path / "run"
    assert [epoch.number for epoch in seen] == [1, 2] == list(result.tests)
    assert seen[-1].test.samples == 13
    assert seen[-1].test.loss == result.tests[2].loss == read(tmp_path / "run/test.csv")["loss"][1]
    assert seen[0].learning_rate == read(tmp_path / "run/train.csv", ["lr"])["lr"][0]
    assert "auroc" in seen[0].test.metrics
    assert not torch.equal(model.state_dict()["0.weight"], before)
    loaded: Any = effdense.load(result.work_dir, model=plain(len(size)))
    assert loaded.classes == ("0", "1", "2")
    assert loaded.preprocess is None
    assert loaded(Blobs(2, size).images).shape == (2, 3)
    with pytest.raises(ValueError, match="a Sequential, was given in Python: give it again"):
        effdense.load(result.work_dir)


def test_what_a_data_set_draws_at_random_is_the_same_after_a_resumption(tmp_path: Path) -> None:
    def train(name: str, epochs: int, seed: int = 0) -> dict[str, Tensor]:
        torch.manual_seed(7)
        model, data = plain(), (Blobs(48), Blobs(13))
        options = {**SMALL, "epochs": epochs, "seed": seed, "schedule": "multistep"}
        # the rate must not depend on the length
        options["milestones"] = (0.999,)
        torch.manual_seed(seed + epochs)
        effdense.train(TrainConfig(work_dir=tmp_path / name, **options), model=model, data=data)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    whole = train("whole", 2)
    train("parts", 1)
    parts = train("parts", 2)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    other = train("other", 2, seed=1)
    assert not torch.equal(other["0.weight"], whole["0.weight"])


def test_labels_that_do_not_exclude_each_other(tmp_path: Path) -> None:
    images = torch.randn(40, 1, 8, 8)
    labels = (torch.randn(40, 3) > 0).float()
    labels[::5, 1] = float("nan")
    data = TensorDataset(images, labels)
    config = TrainConfig(arch="densenet_bc", depth=10, growth_rate=4, work_dir=tmp_path, **SMALL)
    result = effdense.train(config, data=(data, data))
    loaded: Any = effdense.load(result.work_dir)
    probabilities = loaded.probabilities(loaded(images[:4]))
    assert probabilities.shape == (4, 3)
    assert not torch.allclose(probabilities.sum(1), torch.ones(4))


def test_a_model_of_one_s_own_on_data_by_name(tmp_path: Path) -> None:
    """Its head and its first convolution are adapted to the digits."""
    model = effdense.reference.densenet_bc(10, 4, 7)
    config = TrainConfig(epochs=1, threads=1, work_dir=tmp_path / "run")
    effdense.train(config, model=model)
    assert model.classifier.out_features == 10
    assert model.features.get_submodule("conv0").in_channels == 1
    assert "effdense" in repr(model)


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        (None, ([1, 2], [1]), "data must be a training and a test set of"),
        (
            nn.Linear(3, 2),
            (Blobs(20), Blobs(4)),
            r"the model refuses an image of shape \(2, 9, 7\)",
        ),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(126, 2)),
            (Blobs(20), Blobs(4)),
            "there is a label 2, but the model answers 2 classes",
        ),
        (nn.Conv2d(2, 3, 1), (Blobs(20), Blobs(4)), r"must answer a tensor \(N, classes\)"),
    ],
    ids=["no data", "shape", "classes", "answer"],
)
def test_mistakes(model: nn.Module | None, data: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        effdense.train(TrainConfig(work_dir=tmp_path / "run", **SMALL), model=model, data=data)
    assert not (tmp_path / "run").exists()
