"""What runs start from: published weights, other people's models, parts that do not learn."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
import yaml
from torch import Tensor, nn

import effdense
from effdense.engine.data import datasets
from effdense.engine.data.images import InMemory
from effdense.engine.options import TrainConfig
from effdense.engine.plots import read
from effdense.errors import UserError
from effdense.weights import fitted
from tests.helpers.launch import flags
from tests.helpers.ranks import RUN, Ranks, final_state, wait_for

SMALL: dict[str, Any] = {
    "data": "fake",
    "image_size": 32,
    "batch_size": 8,
    "epochs": 1,
    "threads": 1,
    "lr": 0.01,
}
TINY: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 3)}
# What returns a model, its arguments, and its classes' argument; each has its own names.
PACKAGES = {
    "torchvision": ("torchvision.models:DenseNet", {**TINY, "num_init_features": 6}, "num_classes"),
    "timm": ("timm.models.densenet:DenseNet", TINY, "num_classes"),
    "monai": (
        "monai.networks.nets:DenseNet",
        {**TINY, "spatial_dims": 2, "in_channels": 1, "out_channels": 4, "init_features": 6},
        "out_channels",
    ),
    "torchxrayvision": (
        "torchxrayvision.models:DenseNet",
        {**TINY, "num_init_features": 6},
        "num_classes",
    ),
}


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "FAKE_TRAIN_SAMPLES", 32)
    monkeypatch.setattr(datasets, "FAKE_TEST_SAMPLES", 10)


def train(work_dir: Path, **options: Any) -> dict[str, Tensor]:
    """A short run; the weights that it leaves."""
    effdense.train(TrainConfig(work_dir=work_dir, **{**SMALL, **options}))
    return safetensors.torch.load_file(work_dir / "model.safetensors")


def made(package: str, **arguments: Any) -> nn.Module:
    """The package's own model."""
    target, own, _ = PACKAGES[package]
    module, _, name = target.partition(":")
    model: nn.Module = getattr(importlib.import_module(module), name)(**{**own, **arguments})
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", PACKAGES)
def test_models_are_trained_and_loaded_back_by_their_package(package: str, tmp_path: Path) -> None:
    """Three channels and ten classes, whatever it was made for."""
    pytest.importorskip(package, exc_type=ImportError)
    target, arguments, classes = PACKAGES[package]
    found = train(tmp_path / "run", model=target, model_args=json.dumps(arguments))
    channels = {"monai": {"in_channels": 3}, "torchxrayvision": {"in_channels": 3}}
    theirs = made(package, **{classes: 10}, **channels.get(package, {}))
    theirs.load_state_dict(found)
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["model"]["name"] == target
    assert recorded["model"]["parameters"] == sum(p.numel() for p in theirs.parameters())
    assert recorded["options"]["arch"] is None
    # and the next run starts from it
    rest = {"model": target, "model_args": json.dumps(arguments), "freeze": "*"}
    with pytest.raises(UserError, match=r"--freeze \* leaves nothing to learn"):
        train(tmp_path / "next", weights=str(tmp_path / "run"), **rest)
    assert not (tmp_path / "next").exists()
    again = train(
        tmp_path / "next", weights=str(tmp_path / "run"), **{**rest, "freeze": "features.*"}
    )
    frozen = [name for name in found if name.startswith("features.")]
    assert all(torch.equal(again[name], found[name]) for name in frozen)


@pytest.mark.parametrize("channels", [1, 3])
def test_fine_tuning_from_a_file_of_torchvision_weights(
    channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Into --arch: everything but the head is the file's, the first convolution is adapted."""
    theirs = torchvision.models.densenet121()
    torch.save(theirs.state_dict(), tmp_path / "densenet121.pth")
    real = datasets.load

    def load(*arguments: Any, **options: Any) -> Any:
        data = real(*arguments, **options)
        for split in (data.train, data.test):
            assert isinstance(split, InMemory)
            split.images = split.images[:, :channels]
            split.normalization = type(split.normalization)((0.0,) * channels, (1.0,) * channels)
        return type(data)(data.train, data.test, data.num_classes, channels)

    monkeypatch.setattr("effdense.engine.training.load", load)
    found = train(
        tmp_path / "run",
        arch="densenet121",
        weights=str(tmp_path / "densenet121.pth"),
        freeze="features.*",
        batch_size=32,
    )
    said = capsys.readouterr().out
    assert f"starting from {tmp_path / 'densenet121.pth'}" in said
    assert "the weights are for 1000 classes, the classifier for 10 stays as initialised" in said
    assert "10,250 of" in said
    expected = theirs.state_dict()
    first = expected.pop("features.conv0.weight")
    assert all(torch.equal(found[n], expected[n]) for n in expected if "classifier" not in n)
    own = found["features.conv0.weight"]
    torch.testing.assert_close(own, first.sum(1, keepdim=True) if channels == 1 else first)


def test_published_weights_by_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = torchvision.models.densenet121(num_classes=1000).state_dict()
    enum = torchvision.models.DenseNet121_Weights
    monkeypatch.setattr(enum, "get_state_dict", lambda *_, **__: published)
    options: dict[str, Any] = {"weights": "IMAGENET1K_V1", "freeze": "features.*", "batch_size": 32}
    found = train(tmp_path / "run", arch="densenet121", **options)
    name = "features.denseblock4.denselayer16.conv2.weight"
    assert torch.equal(found[name], published[name])
    with pytest.raises(UserError, match="--weights: the weights are those of a DenseNet with"):
        train(tmp_path / "other", arch="densenet_bc", depth=10, growth_rate=4, **options)
    with pytest.raises(UserError, match=r"--weights: no weights named 'nonsense'.*IMAGENET1K_V1"):
        train(tmp_path / "other", arch="densenet121", **{**options, "weights": "nonsense"})
    assert not (tmp_path / "other").exists()


def test_weights_of_two_dimensions_answer_for_what_is_the_same_in_every_slice() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 6}
    flat = effdense.DenseNet(**sizes, num_classes=5).eval()
    solid = effdense.DenseNet(**sizes, num_classes=5, spatial_dims=3).eval()
    state, said = fitted(flat.state_dict(), solid.state_dict(), "classifier")
    assert not said
    solid.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    volumes = images[:, :, None].expand(-1, -1, 32, -1, -1)
    # zeros come in at both ends of the third dimension, so the middle is compared, where few do
    conv, own = (net.get_submodule("features.conv0") for net in (flat, solid))
    torch.testing.assert_close(own(volumes)[:, :, 8], conv(images))
    name = "features.denseblock1.denselayer1.conv2"
    inside, thick = (net.get_submodule(name) for net in (flat, solid))
    assert isinstance(inside, nn.Conv2d)
    x = torch.randn(2, inside.in_channels, 7, 7)
    torch.testing.assert_close(thick(x[:, :, None].expand(-1, -1, 5, -1, -1))[:, :, 2], inside(x))


def test_other_names_are_matched_by_order_and_said() -> None:
    pytest.importorskip("monai")
    theirs = made("torchvision", num_classes=5).state_dict()
    monai = made("monai", in_channels=3, out_channels=4)
    state, said = fitted(theirs, monai.state_dict(), "class_layers.out")
    assert "matched in their order: features.conv0.weight is features.conv0.weight" in said[0]
    assert "for 5 classes, the out for 4 stays" in said[1]
    monai.load_state_dict(state)
    first = "features.denseblock1.denselayer2"
    assert torch.equal(state[f"{first}.layers.conv2.weight"], theirs[f"{first}.conv2.weight"])
    # the same tensors in another order are somebody else's
    shuffled = dict(reversed(theirs.items()))
    with pytest.raises(ValueError, match="the weights are those of"):
        fitted(shuffled, monai.state_dict(), "class_layers.out")


@pytest.mark.slow
def test_what_is_frozen_stays_and_the_rest_learns(tmp_path: Path, capsys: Any) -> None:
    small = {"depth": 16, "growth_rate": 4, "image_size": 8}
    begun = train(tmp_path / "begun", **small)
    first, last = "features.denseblock1.", "features.denseblock3."

    def stay(found: dict[str, Tensor], names: Any) -> set[bool]:
        return {torch.equal(found[name], begun[name]) for name in begun if names(name)}

    one = train(tmp_path / "one", **small, weights=str(tmp_path / "begun"), freeze="1")
    assert stay(one, lambda n: n.startswith((first, "features.transition1", "features.conv0")))
    assert stay(one, lambda n: n.startswith(first)) == {True}
    assert stay(one, lambda n: n.startswith(last) and "num_batches" not in n) == {False}
    norms = train(tmp_path / "norms", **small, weights=str(tmp_path / "begun"), freeze_norms=True)
    assert stay(norms, lambda n: "norm" in n) == {True}
    assert stay(norms, lambda n: "conv" in n) == {False}
    with pytest.raises(UserError, match="a number of dense blocks from 1 to 3"):
        train(tmp_path / "many", **small, freeze="4")
    with pytest.raises(UserError, match=r"no parameter is called 'feature\.conv'"):
        train(tmp_path / "many", **small, freeze="feature.conv")


@pytest.mark.slow
def test_the_head_learns_at_a_rate_of_its_own(tmp_path: Path) -> None:
    small = {"depth": 10, "growth_rate": 4, "image_size": 8, "batch_size": 32, "momentum": 0.0}
    small |= {"weight_decay": 0.0, "lr": 1e-3}
    found = [train(tmp_path / f"{f}", **small, head_lr_factor=f) for f in (1.0, 3.0, 1e-30)]
    begun = found[2]["classifier.weight"]
    once, thrice = (each["classifier.weight"] - begun for each in found[:2])
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-3, atol=1e-7)
    conv = "features.conv0.weight"
    assert torch.equal(found[0][conv], found[1][conv])
    rates = [read(tmp_path / name / "train.csv")["lr"] for name in ("1.0", "3.0")]
    assert rates[0] == rates[1]


@pytest.mark.slow
def test_fine_tuning_killed_and_started_again(tmp_path: Path, uninterrupted: Path) -> None:
    """Its weights may be gone by then."""
    shutil.copytree(uninterrupted, tmp_path / "before")
    options = flags(weights="before", freeze="1", head_lr_factor=2.5)
    with Ranks(tmp_path, [*RUN, *options, "--work-dir", "whole"], 2) as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
    with Ranks(tmp_path, [*RUN, *options], 2) as ranks:
        at = tmp_path / "run" / "checkpoints"
        wait_for(lambda: at.exists() and len(list(at.glob("epoch-*"))) > 1)
        ranks.kill()
    shutil.rmtree(tmp_path / "before")
    with Ranks(tmp_path, [*RUN, *options], 2) as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
        assert "going on from epoch" in ranks.said()
    assert final_state(tmp_path / "run") == final_state(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "nothing"}, "--model must be MODULE:CALLABLE, got nothing"),
        ({"model": "effdense:nothing"}, "can't find effdense:nothing"),
        ({"model": "effdense:densenet_bc"}, "calling effdense:densenet_bc without arguments"),
        ({"model": "torch.nn:ReLU"}, "the model, a ReLU, has no convolution"),
        ({"model_args": "{}"}, "--model-args must be left out without --model"),
        ({"model": "a:b", "model_args": "[1]"}, "--model-args must be a JSON object"),
        ({"model": "a:b", "depth": 22}, "--depth means nothing for a:b: leave it out, or give"),
        ({"arch": "densenet121", "depth": 22}, "--depth means nothing for densenet121: leave it"),
        (
            {"arch": "densenet121", "image_size": 16},
            "too small for densenet121: it takes 29 along each side and more, got 16 x 16; choose "
            "a larger --image-size",
        ),
        (
            {"data": "digits", "arch": "densenet121", "image_size": None},
            "got 8 x 8; digits has images of one size: choose another network with --arch",
        ),
        ({"head_lr_factor": 0.0}, "--head-lr-factor must be a positive number"),
    ],
    ids=str,
)
def test_mistakes(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", **options)
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_that_took_no_step_claims_nothing(tmp_path: Path) -> None:
    """Neither a folder nor, where it died later, the options that it died of."""
    small = {"depth": 10, "growth_rate": 4, "image_size": 8}
    with pytest.raises(UserError, match="--weights"):
        train(tmp_path / "run", **small, weights="nonsense")
    assert not (tmp_path / "run").exists()
    train(tmp_path / "run", **small)
    for file in (tmp_path / "run").iterdir():
        if file.suffix not in (".yaml", ".csv") and file.is_file():
            file.unlink()
    for log in (tmp_path / "run").glob("*.csv"):
        log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(UserError, match=r"already holds a run with other options: --seed is 1"):
        train(tmp_path / "run", **small, seed=1)
    # killed before its first checkpoint
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train(tmp_path / "run", **small, seed=1)
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["options"]["seed"] == 1
