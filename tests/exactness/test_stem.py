"""The ImageNet stem: which convolutions run as part of it, and that all equal the naive stem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import effdense
from effdense.backends.torch_backend import TorchBackend
from effdense.block.slabs import Pooling
from effdense.block.stem import run_stem
from effdense.tracing import nodes_behind
from tests.helpers.compare import (
    assert_close,
    assert_identical,
    assert_same_step,
    images,
    step,
    twins,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "each_backend")

fused_saves = pytest.mark.parametrize("save", [s for s in effdense.SAVE_MODES if s != "all"])


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _conv0(change: Callable[[Any], object]) -> Callable[[Any], None]:
    return lambda model: change(model.features.conv0)  # type: ignore[return-value]


def _replace(name: str, build: Callable[[], nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        torch.manual_seed(1)
        setattr(model.features, name, build().double())

    return change


def _frozen(*names: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name in names:
            model.features.get_submodule(name).requires_grad_(False)

    return change


def _bias(conv: Any) -> None:
    # the gradient of a bias before a batch norm is zero up to rounding
    conv.bias = nn.Parameter(torch.ones(conv.out_channels).double(), False)


# what is done to a network, and whether its convolution runs as part of the stem
CHANGES: dict[str, tuple[Callable[[Any], object], bool]] = {
    "nothing": (lambda model: None, True),
    "convolution frozen": (_frozen("conv0"), True),
    "all frozen": (_frozen("conv0", "norm0"), True),
    "dilated": (_replace("conv0", lambda: nn.Conv2d(3, 6, 3, 1, 2, 2, bias=False)), True),
    "uneven": (
        _replace("conv0", lambda: nn.Conv2d(3, 6, (3, 5), (2, 1), (0, 3), bias=False)),
        True,
    ),
    "groups": (_replace("conv0", lambda: nn.Conv2d(3, 6, 3, groups=3, bias=False)), True),
    "pooling": (_replace("pool0", lambda: nn.MaxPool2d(3, 1, 1, 2, ceil_mode=True)), True),
    "channels-last weights": (lambda model: model.to(memory_format=torch.channels_last), True),
    "forward hook": (_conv0(lambda x: x.register_forward_hook(lambda m, i, o: 2 * o)), False),
    "parametrised": (
        _conv0(lambda x: parametrize.register_parametrization(x, "weight", _Doubled())),
        False,
    ),
    "bias": (_conv0(_bias), False),
    "padded by reflection": (
        _replace(
            "conv0", lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect", bias=False)
        ),
        False,
    ),
    "padded by name": (
        _replace("conv0", lambda: nn.Conv2d(3, 6, 3, padding="same", bias=False)),
        False,
    ),
}


def _operations(output: Tensor) -> set[str]:
    return {type(node).__name__ for node in nodes_behind(output)}


@pytest.fixture(params=["whole images", "lines"])
def _slabs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some images, or of as few lines of one as there may be."""
    if request.param == "lines":
        monkeypatch.setattr(TorchBackend, "images_per_step", lambda *_: 1)


@fused_saves
@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_stem_equals_naive(name: str, input_grad: bool, save: str) -> None:
    change, runs_fused = CHANGES[name]
    ours, naive = twins(save, small_inputs=False)
    change(ours), change(naive)
    x = images(3, 3, 29, 26)
    for _ in range(2):
        expected = step(naive, x, input_grad=input_grad)
        assert_same_step(step(ours, x, input_grad=input_grad), expected)
    found = _operations(ours(x.clone().requires_grad_(input_grad)))
    assert ("ConvolutionBackward0" in found) == (not runs_fused)


@pytest.mark.parametrize("name", [name for name, (_, fused) in CHANGES.items() if fused])
def test_a_changed_stem_by_lines_equals_naive(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchBackend, "images_per_step", lambda *_: 1)
    ours, naive = twins(small_inputs=False)
    CHANGES[name][0](ours), CHANGES[name][0](naive)
    x = images(3, 3, 29, 26)
    assert_same_step(step(ours, x), step(naive, x))


@fused_saves
def test_a_stem_of_more_images_than_channels_by_lines_equals_naive(
    save: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchBackend, "images_per_step", lambda *_: 1)
    ours, naive = twins(save, small_inputs=False, num_init_features=3)
    x = images(4, 3, 17, 18)
    assert_same_step(step(ours, x), step(naive, x))


@pytest.mark.parametrize("save", ["features", "bottlenecks"])
@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.usefixtures("_slabs")
def test_a_stem_of_other_dimensions_equals_naive(dims: int, channels: int, save: str) -> None:
    config: dict[str, Any] = {"small_inputs": False}
    config |= {"spatial_dims": dims, "in_channels": channels}
    ours, naive = twins(save, **config)
    x = images(2, channels, *(43, 18, 21)[:dims])
    for train in (True, True, False):
        ours.train(train), naive.train(train)
        assert_same_step(step(ours, x), step(naive, x))
        with torch.no_grad():
            assert_close(ours(x), naive(x))


# (kernel, stride, padding, dilation) of a volume's convolution and of its pooling, by dimension
VOLUMES: dict[str, tuple[Any, Any]] = {
    "as MONAI's": ((7, 2, 3, 1), (3, 2, 1, 1)),
    "of even windows": ((4, 1, 1, 1), (2, 2, 0, 1)),
    "of unlike dimensions": (((1, 3, 5), (1, 2, 1), (0, 1, 3), 1), ((3, 2, 1), (2, 1, 3), 0, 1)),
    "of overlapping and dilated windows": ((3, 1, 2, 2), (3, 2, 1, 2)),
    "of padding that whole windows are in": ((2, 1, 4, 1), (3, 2, 1, 1)),
    "of pooling line by line": ((3, 1, 1, 1), (3, 1, 1, 1)),
    "of windows apart": ((3, 3, 0, 1), ((2, 1, 2), (3, 2, 2), 0, 1)),
}


@pytest.mark.parametrize("save", ["features", "slabs", "bottlenecks"])
@pytest.mark.parametrize("lines", [1, 5, 8])
@pytest.mark.parametrize("name", VOLUMES)
def test_volumes_of_odd_sizes_in_odd_slabs_equal_naive(
    name: str, lines: int, save: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties between maxima too: one image's values are whole numbers."""
    made: list[list[int]] = []
    slabs = Pooling.slabs

    def noted(pooling: Pooling) -> Any:
        made.append([slab.last - slab.first for slab in slabs(pooling)])
        return slabs(pooling)

    def change(model: Any) -> None:
        torch.manual_seed(1)
        convolution, pooling = VOLUMES[name]
        conv: Any = nn.Conv3d(1, 6, *convolution)
        conv.bias = None
        window: Any = nn.MaxPool3d(*pooling)
        model.features.conv0 = conv.double()
        window.ceil_mode = lines == 5
        model.features.pool0 = window
        model.features.conv0.weight.data.mul_(20).round_().clamp_(-1, 1)

    monkeypatch.setattr(TorchBackend, "images_per_step", lambda *_: lines)
    monkeypatch.setattr(Pooling, "slabs", noted)
    config: dict[str, Any] = {"small_inputs": False, "spatial_dims": 3, "in_channels": 1}
    ours, naive = twins(save, prepare=change, **config)
    x = images(2, 1, 67, 11, 15)
    x[1] = x[1].round().clamp(-1, 1)
    assert_same_step(step(ours, x), step(naive, x))
    # cut within an image, and not evenly
    assert max(map(len, made)) > 2
    assert len(set(made[0])) > 1


@pytest.mark.parametrize("sign", [1, -1])
def test_of_maxima_that_the_norm_rounds_to_one_the_largest_gets_the_gradient(sign: int) -> None:
    """torch's pooling gives it to the first; see slabs.py, NOTE [ pooling before the norm ]."""
    pool, norm = nn.MaxPool1d(4), nn.BatchNorm1d(1).eval().to(torch.bfloat16)
    norm.requires_grad_(False)
    norm.weight.fill_(sign * 2**-6), norm.bias.fill_(1)
    x = torch.tensor([[[0.125, 0.25, 0.375, 0.375]]], dtype=torch.bfloat16) * sign
    x.requires_grad_()
    with mock.patch.dict("os.environ", EFFDENSE_BACKEND="torch"):
        output, used = run_stem([norm, nn.ReLU(), pool], x, "auto", "features")
    assert used == 3
    assert output is not None
    assert torch.equal(output, pool(norm(x).relu()))
    output.sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).tolist() == [[[False, False, True, False]]]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.usefixtures("_slabs")
def test_save_modes_agree_bit_for_bit(dims: int) -> None:
    x = images(3, 3, *(39, 30, 17)[:dims], dtype=torch.float32)
    nets = [
        twins(save, small_inputs=False, spatial_dims=dims, dtype=torch.float32)[0]
        for save in ("bottlenecks", "features", "input")
    ]
    kept, *recomputed = [step(ours, x) for ours in nets]
    for each in recomputed:
        assert_identical(each, kept)


def test_the_first_block_says_what_the_stem_keeps() -> None:
    ours, _ = twins(small_inputs=False)
    x = images(2, 3, 64, 64)
    kept = {}
    for save in ("features", "bottlenecks"):
        ours.save = [save, "input"]
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ours(x)
        kept[save] = sizes.count(2 * 32 * 32 * 6)
    assert kept == {"features": 0, "bottlenecks": 1}


@fused_saves
def test_images_changed_before_backward_are_noticed(save: str) -> None:
    ours, _ = twins(save, small_inputs=False)
    x = images(2, 3, 29, 26)
    loss = ours(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@fused_saves
def test_a_second_backward_gives_the_same_gradients(save: str) -> None:
    ours, _ = twins(save, small_inputs=False)
    loss = ours(images(2, 3, 29, 26)).square().sum()
    parameters = [
        parameter
        for name in ("conv0", "norm0")
        for parameter in ours.features.get_submodule(name).parameters()
    ]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize("shape", [(1, 3, 29, 26), (3, 29, 26), (2, 4, 29, 26)])
def test_an_input_that_does_not_fit_a_converted_stem_is_refused_as_by_the_original(
    shape: tuple[int, ...],
) -> None:
    _, naive = twins(small_inputs=False)
    ours = effdense.convert(twins(small_inputs=False)[1])
    try:
        expected = naive(images(*shape))
    except (RuntimeError, ValueError):
        with pytest.raises((RuntimeError, ValueError)):
            ours(images(*shape))
    else:
        assert ours(images(*shape)).shape == expected.shape
