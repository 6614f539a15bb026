"""effdense.train: any module, any data set of (image, label), and what it tells on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import effdense
from effdense import TrainConfig
from effdense.engine.data.own import own_data
from effdense.engine.plots import read
from tests.helpers.launch import Launch

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


_FOLDS = """
import torch, effdense
from torch import nn
from torch.utils.data import TensorDataset

for fold in 0, 1:
    torch.manual_seed(fold)
    images, labels = torch.randn(16, 1, 4, 4), torch.arange(16) % 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    data = TensorDataset(images, labels), TensorDataset(images + 1, labels)
    config = effdense.TrainConfig(epochs=1, batch_size=8, threads=1, num_workers=0)
    result = effdense.train(config, model=model, data=data)
    print(f"{result.work_dir} {result.tests[1].loss}")
"""


@pytest.mark.slow
def test_each_run_of_a_script_has_its_own_folder(tmp_path: Path, launch: Launch) -> None:
    """Folds, say: their options are the same, and so is torchrun's launch."""
    script = tmp_path / "folds.py"
    script.write_text(_FOLDS)
    done = launch(2, script, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("runs/own-")]
    folders, losses = zip(*(line.split() for line in found), strict=True)
    assert sorted(folders) == ["runs/own-1"] * 2 + ["runs/own-2"] * 2
    assert len(set(losses)) == 2


class Twice(nn.Module):
    """Two names for one layer, one for one weight and buffer of another."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone = cast(nn.Sequential, plain())
        self.features, self.head = backbone[:2], backbone[-1]
        self.weight = backbone[0].weight
        self.register_buffer("mean", cast(Tensor, backbone[1].running_mean))

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.backbone(x)
        return answer


@pytest.mark.parametrize("ema", [0.0, 0.5], ids=str)
def test_tensors_that_have_several_names(ema: float, tmp_path: Path) -> None:
    """The best epoch, whose weights are in a checkpoint, is not the last."""
    options: dict[str, Any] = {**SMALL, "lr": 1e-9, "ema": ema, "work_dir": tmp_path, "patience": 1}
    result = effdense.train(TrainConfig(**options), model=Twice(), data=(Blobs(48), Blobs(13)))
    assert result.best_epoch == 1 < max(result.tests)
    network = effdense.load(tmp_path, model=Twice())
    held = torch.load(tmp_path / "model.pt", weights_only=True)
    assert held.keys() == network.state_dict().keys()
    for one, other in (("0.weight", "features.0.weight"), ("1.running_mean", "mean")):
        assert torch.equal(held[f"backbone.{one}"], held[other])


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


class Held(Blobs):
    """Holds its labels, under another name than it gives them."""

    def __init__(self, count: int, targets: Any, transform: Any = None) -> None:
        super().__init__(count)
        self.targets, self.target_transform, self.classes = targets, transform, list("abc")

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        return image, self.target_transform(label) if self.target_transform else label


class Reversed(TensorDataset):
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, label = super().__getitem__(index)
        return image, 2 - label


NUMBERS = [i % 3 for i in range(20)]


@pytest.mark.parametrize(
    ("data", "labels", "names"),
    [
        (Held(20, NUMBERS), NUMBERS, ("a", "b", "c")),
        (Held(20, NUMBERS, lambda label: label), NUMBERS, ("a", "b", "c")),
        (Held(20, NUMBERS, lambda label: 2 - label), [2 - i for i in NUMBERS], ("0", "1", "2")),
        (Held(20, [2 - i for i in NUMBERS]), NUMBERS, ("0", "1", "2")),
        (Held(20, [{"boxes": 1}] * 20), NUMBERS, ("0", "1", "2")),
        (Held(20, NUMBERS * 2), NUMBERS, ("0", "1", "2")),
        (
            Reversed(torch.zeros(20, 1, 8, 8), torch.tensor(NUMBERS)),
            [2 - i for i in NUMBERS],
            ("0", "1", "2"),
        ),
    ],
    ids=["held", "same", "target_transform", "other", "boxes", "too many", "tensors"],
)
def test_labels_are_what_the_items_say(
    data: Any, labels: list[int], names: tuple[str, ...]
) -> None:
    found = own_data(data, data, 0, 0)
    assert found.train.labels.tolist() == labels
    assert found.classes == names
    order = torch.arange(19, -1, -1)
    ((_, given),) = found.train.batches([order], 1, torch.device("cpu"))
    assert given.tolist() == labels[::-1]


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_that_change_are_refused(workers: int) -> None:
    # a label that none of those is that are looked at first
    data = Held(20, [*NUMBERS[:17], 0, *NUMBERS[18:]])
    found = own_data(data, data, 0, workers)
    batches = found.train.batches([torch.arange(9, 20)], 1, torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"item 17 of the training data comes with the label 2, its label was 0"
    ):
        list(batches)


def test_test_data_of_other_classes_are_refused() -> None:
    train, test = Held(20, NUMBERS), Held(20, NUMBERS)
    test.classes = list("abx")
    with pytest.raises(ValueError, match="the classes of the training data, a, b, c, must be"):
        own_data(train, test, 0, 0)


def test_a_model_of_one_s_own_on_data_by_name(tmp_path: Path) -> None:
    """Its head and its first convolution are adapted to the digits."""
    model = effdense.reference.densenet_bc(10, 4, 7)
    config = TrainConfig(epochs=1, threads=1, work_dir=tmp_path / "run")
    effdense.train(config, model=model)
    assert model.classifier.out_features == 10
    assert model.features.get_submodule("conv0").in_channels == 1
    assert "effdense" in repr(model)


def test_a_model_of_one_s_own_starts_from_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"data": "fake", "image_size": 8, "epochs": 1, "threads": 1}
    effdense.train(TrainConfig(work_dir=tmp_path / "run", depth=10, growth_rate=4, **options))
    options |= {"weights": str(tmp_path / "run")}
    model = effdense.densenet_bc(10, 4)
    effdense.train(TrainConfig(work_dir=tmp_path / "more", **options), model=model)
    assert f"starting from {tmp_path / 'run'}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--depth means nothing for DenseNet: leave it out$"):
        effdense.train(TrainConfig(work_dir=tmp_path / "x", depth=10, **options), model=model)


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
        (None, ([(torch.zeros(1, 8, 8), {})], Blobs(4)), "labels must be numbers or tensors"),
        (
            None,
            ([(torch.zeros(1, 8, 8), torch.zeros(i)) for i in (2, 3)], Blobs(4)),
            r"labels must be of one shape, got \(2,\) and \(3,\)",
        ),
        (nn.Conv2d(2, 3, 1), (Blobs(20), Blobs(4)), r"must answer a tensor \(N, classes\)"),
    ],
    ids=["no data", "shape", "classes", "boxes", "lengths", "answer"],
)
def test_mistakes(model: nn.Module | None, data: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        effdense.train(TrainConfig(work_dir=tmp_path / "run", **SMALL), model=model, data=data)
    assert not (tmp_path / "run").exists()
