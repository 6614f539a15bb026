"""Weights of every kind of file people have, and what is said of those that don't fit."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import effdense
from effdense.weights import safetensors_bytes


class Task(nn.Module):
    """As Lightning's: the network is an attribute."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Config:
    """What a checkpoint of somebody's holds beside the weights."""

    depth = 121


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(3)
    return effdense.densenet_bc(16, 4, 7)


def _prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


KINDS: dict[str, Callable[[Any], Any]] = {
    "a state dict": lambda model: model.state_dict(),
    "a checkpoint": lambda model: {"epoch": 3, "state_dict": model.state_dict()},
    "another checkpoint": lambda model: {"optimizer": {}, "model": model.state_dict()},
    "of DDP": lambda model: {"model": _prefixed(model.state_dict(), "module.")},
    "of DDP and a compiler": lambda model: _prefixed(model.state_dict(), "module._orig_mod."),
    "of Lightning": lambda model: {
        "state_dict": _prefixed(model.state_dict(), "model."),
        "hyper_parameters": Config(),
    },
    "a module": lambda model: model,
    "a module in another": Task,
    "a module in a checkpoint": lambda model: {"model": Task(model), "config": Config()},
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_every_kind_load(kind: str, network: Any, tmp_path: Path) -> None:
    torch.save(KINDS[kind](network), tmp_path / "weights.pt")
    for weights in (tmp_path / "weights.pt", str(tmp_path / "weights.pt")):
        state = effdense.densenet_bc(16, 4, weights=weights).state_dict()
        expected = network.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_safetensors_and_a_runs_directory_load(network: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(network.state_dict(), {}))
    for weights in (path, tmp_path, str(tmp_path)):
        state = effdense.densenet_bc(16, 4, weights=weights).state_dict()
        assert all(torch.equal(state[name], t) for name, t in network.state_dict().items())


def test_nothing_in_a_file_is_run(network: Any, tmp_path: Path) -> None:
    torch.save({"model": network, "trap": _Malicious(tmp_path / "trap")}, tmp_path / "weights.pt")
    effdense.densenet_bc(16, 4, weights=tmp_path / "weights.pt")
    assert not (tmp_path / "trap").exists()


def test_another_number_of_classes_leaves_the_head_and_says_so(
    network: Any, tmp_path: Path
) -> None:
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match="for 7 classes, the classifier for 3 stays"):
        model = effdense.densenet_bc(16, 4, 3, weights=tmp_path / "weights.pt")
    assert model.classifier.out_features == 3
    first = "features.conv0.weight"
    assert torch.equal(model.state_dict()[first], network.state_dict()[first])


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_the_first_convolution_is_adapted_as_timm_does(
    channels: int, network: Any, tmp_path: Path
) -> None:
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    model = effdense.densenet_bc(16, 4, weights=tmp_path / "weights.pt", in_channels=channels)
    timm = pytest.importorskip("timm.models", exc_type=ImportError)
    name = "features.conv0.weight"
    expected = timm.adapt_input_conv(channels, network.state_dict()[name])
    torch.testing.assert_close(model.state_dict()[name], expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: {"epoch": 3, "loss": 0.1}, "holds entries 'epoch', 'loss', and no state dict"),
        (lambda: [1, 2], "holds a list, and no state dict"),
        (lambda: torchvision.models.resnet18().state_dict(), "something else"),
        (
            lambda: effdense.densenet_bc(22, 4, 7).state_dict(),
            r"blocks of 3, 3, 3 layers of 4 features, not of a DenseNet with blocks of 2, 2, 2",
        ),
        (lambda: effdense.densenet_bc(16, 5, 7).state_dict(), "layers of 5 features"),
    ],
)
def test_what_does_not_fit_is_described_in_a_line(
    content: Any, message: str, tmp_path: Path
) -> None:
    torch.save(content(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message) as caught:
        effdense.densenet_bc(16, 4, weights=tmp_path / "weights.pt")
    assert "\n" not in str(caught.value)


def test_a_file_that_holds_no_weights_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"cannot read .*weights.pt"):
        effdense.densenet_bc(16, 4, weights=tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"there is no model\.safetensors"):
        effdense.densenet_bc(16, 4, weights=tmp_path)
    with pytest.raises(ValueError, match="None or a path"):
        effdense.densenet_bc(16, 4, weights=7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spelling",
    [
        "DenseNet121_Weights.IMAGENET1K_V1",
        "DenseNet121_Weights.DEFAULT",
        "imagenet1k_v1",
        "IMAGENET1K_V1",
        "default",
    ],
)
def test_torchvisions_names_in_its_spellings(
    spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    enum = torchvision.models.DenseNet121_Weights
    state = torchvision.models.densenet121().state_dict()
    asked: list[Any] = []

    def get(member: Any, **options: Any) -> dict[str, Tensor]:
        asked.append(member)
        return state

    monkeypatch.setattr(enum, "get_state_dict", get)
    effdense.densenet121(spelling, memory_efficient=True, progress=False)
    effdense.densenet121(pretrained=True)
    assert asked == [enum.IMAGENET1K_V1, enum.DEFAULT]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        effdense.densenet121(pretrained=False)


def test_torchvisions_and_timms_arguments_are_answered_by_name() -> None:
    assert effdense.densenet_bc(10, 4, memory_efficient=True, pretrained=False)
    with pytest.raises(ValueError, match="asks for published weights; densenet_bc has none"):
        effdense.densenet_bc(10, 4, pretrained=True)
    with pytest.raises(ValueError, match="pretrained must be True or False, got 'a'"):
        effdense.densenet121(pretrained="a")
