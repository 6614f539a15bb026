"""Architectures, names, weights, initialisation and the errors of bad arguments and inputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torchvision
from torch import Tensor, nn

import effdense
from effdense import SAVE_MODES, reference
from tests.helpers.compare import SMALL, images, norms_of, relative_error, twins

VARIANTS = ("densenet121", "densenet161", "densenet169", "densenet201")


@pytest.mark.parametrize(
    ("depth", "growth_rate", "parameters"),
    [(100, 12, 769_162), (250, 24, 15_324_406), (190, 40, 25_624_430)],
)
def test_parameter_counts_are_the_papers(depth: int, growth_rate: int, parameters: int) -> None:
    with torch.device("meta"):
        for build in (effdense.densenet_bc, reference.densenet_bc):
            model = build(depth, growth_rate)
            assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", VARIANTS)
def test_names_and_shapes_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        ours = getattr(effdense, name)().state_dict()
        theirs = torchvision.models.get_model(name).state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[key].shape == theirs[key].shape for key in theirs)


def test_arguments_are_torchvisions() -> None:
    with torch.device("meta"):
        ours = effdense.DenseNet(8, (2, 3), 16, 2, 0.1, 7)
        theirs = torchvision.models.DenseNet(8, (2, 3), 16, 2, 0.1, 7)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


@pytest.mark.parametrize("save", SAVE_MODES)
def test_state_dicts_move_between_ours_and_the_reference(save: str) -> None:
    ours, naive = twins(save)
    naive.load_state_dict(ours.state_dict())
    assert list(naive.state_dict()) == list(ours.state_dict())


# ---------------------------------------------------------------- weights


def _published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the names of torchvision's first release, without batch counters."""
    pattern = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])\.")
    return {
        pattern.sub(r"\1.\2.", key): value
        for key, value in state.items()
        if "num_batches_tracked" not in key
    }


@pytest.fixture(scope="module")
def densenet121_state() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return torchvision.models.densenet121().state_dict()


@pytest.mark.parametrize("old_names", [False, True])
def test_weights_load_from_a_path(
    old_names: bool, densenet121_state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(_published(densenet121_state) if old_names else densenet121_state, path)
    for weights in (path, str(path)):
        state = effdense.densenet121(weights=weights).state_dict()
        assert all(torch.equal(state[key], value) for key, value in densenet121_state.items())


@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "DEFAULT", "enum"])
def test_named_weights_load_what_torchvision_downloads(
    weights: str, densenet121_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(url: str, *_: Any, **__: Any) -> dict[str, Tensor]:
        asked.append(url)
        return _published(densenet121_state)

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    enum = torchvision.models.DenseNet121_Weights.IMAGENET1K_V1
    model = effdense.densenet121(weights=enum if weights == "enum" else weights)
    assert asked == [enum.url]
    key = "features.denseblock3.denselayer7.conv1.weight"
    assert torch.equal(model.state_dict()[key], densenet121_state[key])


def test_weights_decide_the_number_of_classes(tmp_path: Path) -> None:
    with_classes = torchvision.models.densenet121(num_classes=3)
    torch.save(with_classes.state_dict(), tmp_path / "weights.pth")
    assert effdense.densenet121(weights=tmp_path / "weights.pth").classifier.out_features == 3


def test_missing_weights_raise(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"IMAGENET1K_V1.*nor an existing file"):
        effdense.densenet121(weights=str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match="weights must be None"):
        effdense.densenet121(weights=3)
    with pytest.raises(ValueError, match="weights must be None"):
        effdense.densenet121(weights=torchvision.models.DenseNet161_Weights.DEFAULT)


def test_weights_of_another_architecture_raise(
    densenet121_state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(densenet121_state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"12, 24, 16 layers.*denseblock3\.denselayer25"):
        effdense.densenet169(weights=tmp_path / "weights.pth")


# ---------------------------------------------------------------- initialisation


@pytest.mark.parametrize("init", ["paper", "torchvision"])
def test_initial_convolutions_have_he_variance(init: Any) -> None:
    torch.manual_seed(0)
    model = effdense.DenseNet(32, (2, 2), 64, init=init)
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            fan = conv.out_channels if init == "paper" else conv.in_channels
            expected = (2 / (fan * conv.weight[0, 0].numel())) ** 0.5
            deviation = conv.weight.std().item()
            # 5 standard errors of a normal sample's deviation
            tolerance = 5 / (2 * conv.weight.numel()) ** 0.5
            assert abs(deviation / expected - 1) < tolerance, name
    for norm in norms_of(model):
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
    assert (model.classifier.bias == 0).all()


def test_torchvision_init_repeats_torchvisions_numbers() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.DenseNet(8, (2, 2), 16)
    torch.manual_seed(0)
    ours = effdense.DenseNet(8, (2, 2), 16, init="torchvision")
    state = ours.state_dict()
    assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())


# ---------------------------------------------------------------- save


def test_save_is_set_for_all_blocks_or_one_by_one() -> None:
    ours, _ = twins("features")
    assert ours.save == ("features", "features")
    ours.save = ("bottlenecks", "input")
    assert ours.save == ("bottlenecks", "input")
    ours.save = "all"
    assert ours.save == ("all", "all")
    with pytest.raises(ValueError, match="save must be one of"):
        ours.save = cast(Any, "everything")
    with pytest.raises(ValueError, match="each of 2 blocks"):
        ours.save = ("all",)
    assert ours.save == ("all", "all")


def test_mixed_save_modes_give_the_same_output() -> None:
    ours, naive = twins()
    for save in (("all", "input"), ("bottlenecks", "all")):
        ours.save = cast(Any, save)
        assert relative_error(ours(images(2, 3, 8, 8)), naive(images(2, 3, 8, 8))) < 1e-12


# ---------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"growth_rate": 0}, "growth_rate must be a positive integer, got 0"),
        ({"growth_rate": 2.5}, "growth_rate must be a positive integer, got 2.5"),
        ({"num_init_features": -1}, "num_init_features must be a positive integer"),
        ({"num_classes": 0}, "num_classes must be a positive integer"),
        ({"in_channels": 0}, "in_channels must be a positive integer"),
        ({"bn_size": 0}, "bn_size must be a positive integer"),
        ({"bn_size": True}, "bn_size must be a positive integer"),
        ({"block_config": ()}, "block_config must be layer counts"),
        ({"block_config": (2, -1)}, "block_config must be layer counts"),
        ({"block_config": (2, 1.5)}, "block_config must be layer counts"),
        ({"block_config": 3}, "block_config must be layer counts"),
        ({"drop_rate": 1.0}, r"drop_rate must be in \[0, 1\)"),
        ({"drop_rate": -0.1}, r"drop_rate must be in \[0, 1\)"),
        ({"compression": 0.0}, r"compression must be in \(0, 1\]"),
        ({"compression": 1.1}, r"compression must be in \(0, 1\]"),
        ({"compression": 0.01}, "leaves none of 14 channels"),
        ({"spatial_dims": 4}, "spatial_dims must be 1, 2 or 3"),
        ({"init": "zeros"}, "init must be"),
        ({"save": "some"}, "one of 'all', 'bottlenecks', 'features', 'slabs', 'input', got 'some'"),
        ({"backend": "cuda"}, "backend must be"),
    ],
    ids=str,
)
def test_bad_arguments_raise_saying_what_is_valid(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        effdense.DenseNet(**(SMALL | arguments))


@pytest.mark.parametrize(
    ("depth", "nearest"),
    [(99, "94 and 100"), (101, "100 and 106"), (9, "10"), (0, "10"), (12, "10 and 16"), (-5, "10")],
)
def test_bad_depths_raise_naming_the_nearest(depth: int, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"6 n \+ 4.*nearest valid depths: {nearest}$"):
        effdense.densenet_bc(depth, 12)


@pytest.mark.parametrize("depth", [100.0, "100", None, True])
def test_depths_that_are_no_integers_raise(depth: Any) -> None:
    with pytest.raises(ValueError, match="depth"):
        effdense.densenet_bc(depth, 12)


# ---------------------------------------------------------------- bad inputs


@pytest.mark.parametrize("save", SAVE_MODES)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 1, 8, 8), r"\(N, 3, H, W\), got \(2, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"\(N, 3, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, 8), r"\(N, 3, H, W\), got"),
        (torch.zeros(3), r"\(N, 3, H, W\), got \(3,\)"),
        (torch.tensor(1.0), r"\(N, 3, H, W\), got \(\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), "float64.*weights are torch.float32"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float16), "float16.*weights are torch.float32"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "uint8.*weights are torch.float32"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.complex64), "complex64.*weights are torch.float32"),
        (torch.zeros(2, 3, 8, 8, device="meta"), "input is on meta, the model on cpu"),
        (torch.zeros(2, 3, 1, 1), "halves every spatial size|too small"),
        (torch.zeros(2, 3, 1, 8), "halves every spatial size|too small"),
    ],
    ids=lambda value: str(tuple(value.shape)) + str(value.dtype) if torch.is_tensor(value) else "",
)
def test_bad_inputs_raise_saying_what_was_expected_and_came(
    x: Tensor, message: str, save: Any
) -> None:
    model = effdense.DenseNet(**SMALL, save=save)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        model(x)
    if save != "all":
        # torch's words alone are not enough
        with pytest.raises(ValueError, match=message.removesuffix("|too small")):
            model(x)
        after = dict(model.named_buffers())
        assert x.shape[2:].numel() < 9 or all(torch.equal(after[n], b) for n, b in before.items())


@pytest.mark.parametrize("save", SAVE_MODES)
def test_one_value_per_channel_raises_in_training_and_works_in_eval(save: Any) -> None:
    model = effdense.DenseNet(**(SMALL | {"block_config": (2,)}), save=save)
    with pytest.raises(ValueError, match=r"more than (one|1) value per channel"):
        model(torch.zeros(1, 3, 1, 1))
    assert model.eval()(torch.zeros(1, 3, 1, 1)).shape == (1, 5)


@pytest.mark.parametrize("save", SAVE_MODES)
def test_an_empty_batch_gives_an_empty_output_in_eval(save: Any) -> None:
    model = effdense.DenseNet(**SMALL, save=save).eval()
    assert model(torch.zeros(0, 3, 8, 8)).shape == (0, 5)
    model = effdense.DenseNet(**(SMALL | {"small_inputs": False}), save=save).eval()
    assert model(torch.zeros(0, 3, 32, 32)).shape == (0, 5)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 4, 8, 8), r"\(N, 5, H, W\), got \(2, 4, 8, 8\)"),
        (torch.zeros(2, 5, 8), r"\(N, 5, H, W\), got \(2, 5, 8\)"),
        (torch.zeros(2, 5, 8, 8, dtype=torch.float64), "float64, the weights are torch.float32"),
        (torch.zeros(2, 5, 8, 8, device="meta"), "input is on meta, the parameters are on cpu"),
    ],
    ids=["channels", "dimensions", "dtype", "device"],
)
@pytest.mark.parametrize("kind", ["block", "transition"])
def test_bad_inputs_of_a_module_alone_raise(kind: str, x: Tensor, message: str) -> None:
    if kind == "block":
        module: nn.Module = effdense.DenseBlock(reference.dense_layers(2, 5, 4, 2))
    else:
        module = effdense.Transition(5, 3)
    with pytest.raises(ValueError, match=message):
        module(x)


def test_loading_another_architectures_state_raises() -> None:
    ours, _ = twins()
    other, _ = twins(growth_rate=3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict(other.state_dict())
