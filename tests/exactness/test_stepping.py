"""Steps in backward: the ordinary step's bits, without its gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import effdense
from effdense import SAVE_MODES
from tests.helpers.compare import images, twins

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
}


def _train(
    model: Any, optimizer: torch.optim.Optimizer, steps: int = 3, first: int = 0
) -> list[Tensor]:
    losses = []
    for i in range(first, first + steps):
        loss = model(images(2, 3, 37, 30, dtype=torch.float32, seed=i)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
    return losses


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    # in the order of parameters, not in that of their first steps
    own = [state for _, state in sorted(optimizer.state_dict()["state"].items())]
    return [
        *model.state_dict().values(),
        *(value for state in own for value in state.values() if value is not None),
    ]


def _network(save: str = "features", **config: Any) -> effdense.DenseNet:
    return twins(save, small_inputs=False, dtype=torch.float32, **config)[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("save", SAVE_MODES)
@pytest.mark.usefixtures("each_backend")
def test_bits_are_those_of_the_ordinary_step(save: str, name: str) -> None:
    ordinary = _network(save)
    ours = copy.deepcopy(ordinary)
    found = []
    for model in (ordinary, ours):
        # two groups, whose rates differ
        parameters = list(model.parameters())
        groups = [{"params": parameters[:7], "lr": 0.02}, {"params": parameters[7:]}]
        optimizer = OPTIMIZERS[name](groups)
        if model is ours:
            effdense.step_in_backward(model, optimizer)
        losses = _train(model, optimizer)
        assert all(p.grad is None for p in ours.parameters())
        # what was loaded is gone on with
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        losses += _train(model, optimizer, first=3)
        found.append([*losses, *_state(model, optimizer)])
    assert len(found[0]) == len(found[1])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found[0])
    assert all(map(torch.equal, *found))


def test_a_layers_gradients_are_gone_before_the_next_layers_backward() -> None:
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    effdense.step_in_backward(model, optimizer)
    first, last = (
        model.get_parameter(f"features.denseblock2.denselayer{i}.conv1.weight") for i in (1, 3)
    )
    seen: list[tuple[bool, bool]] = []
    before = first.detach().clone(), last.detach().clone()

    def look(*_: Any) -> None:
        seen.append((torch.equal(first, before[0]), torch.equal(last, before[1])))

    loss = model(images(2, 3, 37, 30, dtype=torch.float32)).square().mean()
    backward = effdense.backends.cpu_backend.CpuBackend.bn_relu_conv1x1_backward

    def watched(self: Any, *args: Any) -> Any:
        look()
        return backward(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        kind = effdense.backends.cpu_backend.CpuBackend
        patch.setattr(kind, "bn_relu_conv1x1_backward", watched)
        loss.backward()
    # at the second block's three layers, then at the first's two
    assert seen == [(True, True), (True, False), (True, False), (False, False), (False, False)]


def test_frozen_parameters_stay_and_steps_can_be_taken_away() -> None:
    models = [_network() for _ in range(2)]
    found = []
    for model in models:
        model.features.denseblock1.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        steps = effdense.step_in_backward(model, optimizer) if model is models[1] else None
        _train(model, optimizer, 2)
        if steps is not None:
            steps.remove()
        _train(model, optimizer, 2, first=2)
        found.append(_state(model, optimizer))
    assert all(map(torch.equal, *found))


def test_a_converted_model_is_stepped_too() -> None:
    naive = twins(small_inputs=False, dtype=torch.float32)[1]
    found = []
    for stepped in (False, True):
        model = effdense.convert(copy.deepcopy(naive))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        if stepped:
            effdense.step_in_backward(model, optimizer)
        _train(model, optimizer)
        found.append(_state(model, optimizer))
    assert all(map(torch.equal, *found))


def _clamp(gradient: Tensor) -> Tensor:
    return gradient.clamp(-1e-3, 1e-3)


@pytest.mark.parametrize("when", ["before forward", "before backward"])
@pytest.mark.usefixtures("each_backend")
def test_hooks_on_parameters_see_and_change_their_gradients(when: str) -> None:
    found, seen = [], []
    for stepping in (False, True):
        model = _network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        own: dict[str, Tensor] = {}

        def note(parameter: Tensor, name: str, own: dict[str, Tensor] = own) -> None:
            assert parameter.grad is not None
            own[name] = parameter.grad.clone()

        def hook(parameter: Tensor, name: str, note: Any = note) -> None:
            # one more whose gradient is seen when it is complete
            if name.endswith("conv1.weight"):
                parameter.register_post_accumulate_grad_hook(partial(note, name=name))
            else:
                parameter.register_hook(_clamp)

        if when == "before forward":
            for name, parameter in model.named_parameters():
                hook(parameter, name)
        if stepping:
            effdense.step_in_backward(model, optimizer)
        loss = model(images(2, 3, 37, 30, dtype=torch.float32)).square().mean()
        if when == "before backward":
            for name, parameter in model.named_parameters():
                if not name.endswith("conv1.weight"):
                    hook(parameter, name)
        loss.backward()
        optimizer.step()
        found.append(_state(model, optimizer))
        seen.append(list(own.values()))
    assert all(map(torch.equal, *found))
    assert all(map(torch.equal, *seen))
    assert len(seen[0]) == len(seen[1])


@pytest.mark.usefixtures("each_backend")
def test_gradients_that_are_asked_for_step_what_they_are_asked_for() -> None:
    ordinary, model = _network(), _network()
    effdense.step_in_backward(model, torch.optim.SGD(model.parameters(), 0.1))
    before = copy.deepcopy(dict(model.named_parameters()))
    x = images(2, 3, 37, 30, dtype=torch.float32).requires_grad_()

    def losses() -> tuple[Tensor, Tensor]:
        return ordinary(x).square().mean(), model(x).square().mean()

    expected, found = (torch.autograd.grad(loss, [x])[0] for loss in losses())
    assert torch.equal(found, expected)
    losses()[1].backward(inputs=[x])
    both = [
        torch.autograd.grad(loss, list(net.parameters()))
        for loss, net in zip(losses(), (ordinary, model), strict=True)
    ]
    assert all(map(torch.equal, *both))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    name = "features.denseblock1.denselayer2.conv1.weight"
    losses()[1].backward(inputs=[x, model.get_parameter(name)])
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert changed == [name]


def test_a_second_gradient_before_the_step_is_an_error() -> None:
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    effdense.step_in_backward(model, optimizer)
    x = images(2, 3, 37, 30, dtype=torch.float32)
    model(x).square().mean().backward()
    with pytest.raises(RuntimeError, match="allow no accumulation"):
        model(x).square().mean().backward()
    optimizer.step()
    model(x).square().mean().backward()


def test_what_cannot_step_in_backward_is_refused() -> None:
    model = _network()
    with pytest.raises(ValueError, match="not for Adagrad"):
        effdense.step_in_backward(model, torch.optim.Adagrad(model.parameters()))
    with pytest.raises(ValueError, match="differentiable"):
        effdense.step_in_backward(
            model, torch.optim.SGD(model.parameters(), 0.1, differentiable=True)
        )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="not the model's"):
        effdense.step_in_backward(model.features, optimizer)
    wrapped = object.__new__(DistributedDataParallel)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        effdense.step_in_backward(wrapped, optimizer)
    effdense.step_in_backward(model, optimizer)
    with pytest.raises(ValueError, match="already"):
        effdense.step_in_backward(model, optimizer)
    x = images(2, 3, 37, 30, dtype=torch.float32)
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match="float16 wants its loss scaled"),
    ):
        model(x)
    # without a backward there is no step
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        assert model(x).isfinite().all()
