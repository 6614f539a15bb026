"""effdense.DenseBlock of layers of any kind: parity, and nothing left behind by the second run."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import effdense
from effdense import reference
from tests.helpers.compare import (
    Step,
    assert_close,
    assert_same_step,
    images,
    loss_of,
    randomize_norms,
    stages_in,
    step,
)
from tests.helpers.places import place, placed

pytestmark = pytest.mark.usefixtures("device")

saves = pytest.mark.parametrize("save", ["features", "bottlenecks", "input"])


class _Noisy(nn.Module):
    """Random numbers, a buffer that moves and is read, and a scale."""

    calls: Tensor

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, growth, 3, padding=1)
        self.gamma = nn.Parameter(torch.randn(growth, 1, 1))
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return (
            self.conv(torch.sin(x))
            * self.gamma
            * self.calls
            * torch.rand(1, dtype=x.dtype, device=x.device)
        )


def _layer(width: int, growth: int) -> nn.Module:
    return nn.Sequential(
        nn.InstanceNorm2d(width, affine=True), nn.GELU(), nn.Conv2d(width, growth, 3, padding=1)
    )


def _dropped(width: int, growth: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(width), nn.SiLU(), nn.Conv2d(width, growth, 1), nn.Dropout(0.4)
    )


def _in_place(width: int, growth: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(width, growth, 3, padding=1))


class _Viewing(nn.Module):
    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, growth)

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        rows = self.linear(x.view(n, c, -1).transpose(1, 2))
        return rows.transpose(1, 2).reshape(n, -1, *x.shape[2:])


LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "instance norm": _layer,
    "batch norm and dropout": _dropped,
    "random, with buffers": _Noisy,
    "in place": _in_place,
    "views of its input": _Viewing,
}


def _blocks(make: Callable[[int, int], nn.Module], growths: Any = (3, 3, 3)) -> tuple[Any, Any]:
    torch.manual_seed(0)
    widths = [5, *itertools.accumulate(growths, initial=5)][1:]
    layers = [make(width, growth) for width, growth in zip(widths, growths, strict=False)]
    naive = reference.DenseBlock(layers).double()
    randomize_norms(naive)
    return placed(effdense.DenseBlock(copy.deepcopy(layers))), placed(naive)


def _step(block: nn.Module, x: Tensor) -> Any:
    torch.manual_seed(1)
    return step(block, x)


@saves
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_layers_equal_naive(name: str, save: Any, channels_last: bool) -> None:
    ours, naive = _blocks(LAYERS[name])
    ours.save = save
    x = images(3, 5, 6, 7)
    if channels_last:
        if name in ("batch norm and dropout", "views of its input"):
            pytest.skip(
                "depends on the layout, which cat in the naive block keeps and view refuses"
            )
        x = x.to(memory_format=torch.channels_last)
    for training in (True, False):
        ours.train(training), naive.train(training)
        assert_same_step(_step(ours, x), _step(naive, x))
    assert type(ours(x.requires_grad_()).grad_fn).__name__ == "RecomputedBackward"


@saves
@pytest.mark.parametrize("growths", [(1, 4, 2), (4, 1, 1), (2, 2, 7)])
def test_layers_that_grow_unequally_equal_naive(growths: Any, save: Any) -> None:
    ours, naive = _blocks(_layer, growths)
    ours.save = save
    assert_same_step(step(ours, images(2, 5, 6, 7)), step(naive, images(2, 5, 6, 7)))


@pytest.mark.parametrize("frozen", ["first layer", "last layer", "all", "input"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    ours, naive = _blocks(_layer)
    for block in (ours, naive):
        for name, parameter in block.named_parameters():
            layer = {"first layer": "0.", "last layer": "2.", "all": ""}.get(frozen)
            if layer is not None and name.startswith(layer):
                parameter.requires_grad_(False)
    x = images(2, 5, 6, 7)
    grad = frozen != "input"
    assert_same_step(step(ours, x, input_grad=grad), step(naive, x, input_grad=grad))


def test_layers_that_are_bn_relu_conv_run_fused() -> None:
    torch.manual_seed(0)
    layers = [
        nn.Sequential(
            *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 8, 1, bias=False)),
            *(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1, bias=False)),
        )
        for width in (5, 9)
    ]
    naive = placed(reference.DenseBlock(layers).double())
    randomize_norms(naive)
    ours = effdense.DenseBlock(copy.deepcopy(layers))
    x = images(2, 5, 6, 7)
    assert_same_step(step(ours, x), step(naive, x))
    assert stages_in(ours(x)) == 1


def test_random_numbers_after_backward_are_those_of_the_naive_block() -> None:
    ours, naive = _blocks(_dropped)
    after = []
    for block in (ours, naive):
        _step(block, images(2, 5, 6, 7))
        after.append(torch.rand(4))
    assert torch.equal(*after)


@pytest.mark.real_device
def test_autocast_is_the_same_in_the_second_run() -> None:
    seen: list[torch.dtype] = []

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(width, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            new = self.conv(x)
            seen.append(new.dtype)
            return new

    torch.manual_seed(0)
    ours = placed(effdense.DenseBlock([Layer(3), Layer(5)]))
    naive = reference.DenseBlock(copy.deepcopy(list(ours.values())))
    x = images(2, 3, 4, 5, dtype=torch.float32)
    with torch.autocast(place().type, torch.bfloat16):
        outputs = [ours(x), naive(x)]
    for output in outputs:
        loss_of(output).backward()
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 6
    assert torch.equal(*outputs)
    assert outputs[0].dtype == outputs[1].dtype
    for actual, expected in zip(ours.parameters(), naive.parameters(), strict=True):
        assert actual.grad is not None
        assert expected.grad is not None
        assert_close(actual.grad, expected.grad, 2e-2)


@pytest.mark.parametrize("save", ["features", "input"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_the_second_run_trains_where_the_first_did(own: bool, training: bool, save: Any) -> None:
    def layer(width: int) -> nn.Module:
        norm = nn.BatchNorm2d(4)
        return nn.Sequential(nn.Conv2d(width, 4, 3, padding=1), norm, nn.ELU(), nn.Dropout(0.3))

    torch.manual_seed(0)
    naive: Any = reference.DenseBlock([layer(3), layer(7)]).double()
    ours: Any = copy.deepcopy(naive)
    if own:
        ours = effdense.DenseBlock(copy.deepcopy([*naive.children()])).double()
        ours.save = save
    else:
        ours = effdense.convert(nn.Sequential(ours), save).get_submodule("0")
    found = []
    for block in (placed(ours), placed(naive)):
        block.train(training)
        # one that stays as it is
        next(block.children())[1].eval()
        x = images(2, 3, 5, 6).requires_grad_()
        torch.manual_seed(3)
        loss = loss_of(block(x))
        block.train(not training)
        loss.backward()
        assert all(module.training != training for module in block.modules())
        own_gradients = {name: p.grad for name, p in block.named_parameters()}
        buffers = dict(block.named_buffers())
        found.append(Step(loss.detach(), own_gradients, x.grad, buffers))
    assert_same_step(found[0], found[1])


@pytest.mark.parametrize("save", ["features", "input"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_norms_move_once_under_a_checkpoint_around_the_block(reentrant: bool, save: Any) -> None:
    torch.manual_seed(0)
    widths = (3, 7)
    layers = [
        nn.Sequential(nn.Conv2d(width, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ELU())
        for width in widths
    ]
    naive = reference.DenseBlock(layers).double()
    ours = effdense.DenseBlock(copy.deepcopy(layers)).double()
    ours.save = save
    placed(naive), placed(ours)
    x = images(2, 3, 5, 6)
    found = step(ours, x, call=partial(checkpoint, ours, use_reentrant=reentrant))
    assert_same_step(found, step(naive, x))


def test_a_second_backward_needs_retain_graph_and_repeats_the_first() -> None:
    ours, _ = _blocks(_Noisy)
    x = images(2, 5, 6, 7).requires_grad_()
    loss = loss_of(ours(x))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_double_backward_raises() -> None:
    ours, _ = _blocks(_layer)
    x = images(2, 5, 6, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(ours(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


def test_a_parameter_changed_before_backward_raises() -> None:
    ours, _ = _blocks(_layer)
    loss = loss_of(ours(images(2, 5, 6, 7)))
    with torch.no_grad():
        next(ours.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_callers_gradient_is_not_changed() -> None:
    ours, _ = _blocks(_layer)
    gradient = images(2, 14, 6, 7, seed=3)
    before = gradient.clone()
    ours(images(2, 5, 6, 7)).backward(gradient)
    assert torch.equal(gradient, before)


def test_a_hook_inside_runs_once_and_is_named() -> None:
    ours, naive = _blocks(_layer)
    calls: list[int] = []
    for block in (ours, naive):
        block["1"][2].register_forward_hook(lambda m, i, o: calls.append(1))
    with pytest.warns(UserWarning, match="1.2 has hooks"):
        actual = step(ours, images(2, 5, 6, 7))
    assert len(calls) == 1
    assert_same_step(actual, step(naive, images(2, 5, 6, 7)))


def test_saved_features_can_be_offloaded() -> None:
    ours, naive = _blocks(_layer)
    with torch.autograd.graph.save_on_cpu():
        actual = step(ours, images(2, 5, 6, 7))
    assert_same_step(actual, step(naive, images(2, 5, 6, 7)))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.MaxPool2d(2), "all but the channels must be equal"),
        (nn.Flatten(), "all but the channels must be equal"),
    ],
)
def test_a_layer_of_another_shape_raises(layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        effdense.DenseBlock([layer])(images(2, 5, 6, 7))


def test_a_layer_that_returns_no_tensor_raises() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, x

    with pytest.raises(TypeError, match="returned a tuple, not a tensor"):
        effdense.DenseBlock([Two()])(images(2, 5, 6, 7))


def test_layers_must_be_modules() -> None:
    with pytest.raises(ValueError, match="layers are modules, got a function"):
        effdense.DenseBlock([F.relu])  # type: ignore[list-item]


@pytest.mark.real_device
def test_eval_holds_one_copy_of_the_features() -> None:
    ours, naive = _blocks(_layer)
    ours.eval(), naive.eval()
    with torch.no_grad():
        output = ours(images(2, 5, 6, 7))
    assert_close(output, naive(images(2, 5, 6, 7)))
    assert output.grad_fn is None
    assert output.untyped_storage().nbytes() == output.numel() * 8
