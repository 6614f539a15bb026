"""Whole networks on the Triton backend against the torch backend: same numbers while training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import effdense
from effdense.backends.triton_backend import TritonBackend
from effdense.block import cuts
from effdense.verification.comparison import step

Tensor = torch.Tensor


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operations that the Triton backend was asked for."""
    calls: list[str] = []
    run = TritonBackend._run

    def noted(self: TritonBackend, operation: str, function: Callable[..., Any], *a: Any, **k: Any):
        calls.append(function.__name__)
        return run(self, operation, function, *a, **k)

    monkeypatch.setattr(TritonBackend, "_run", noted)
    return calls


def train(model: torch.nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def with_backend(model: torch.nn.Module, backend: str) -> torch.nn.Module:
    model = copy.deepcopy(model)
    module: Any
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    return model


def batches(steps: int, *size: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(2, 3, *size, generator=generator),
            torch.randint(10, (2,), generator=generator),
        )
        for _ in range(steps)
    ]


def assert_same_training(model: torch.nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    ours, theirs = with_backend(model, "triton"), with_backend(model, "torch")
    losses = train(ours, data), train(theirs, data)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    found, expected = dict(ours.state_dict()), dict(theirs.state_dict())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("save", effdense.SAVE_MODES)
def test_two_steps_of_a_small_network(save: effdense.Save, kernel_calls: list[str]) -> None:
    torch.manual_seed(0)
    model = effdense.DenseNet(12, (2, 2), 24, num_classes=10, small_inputs=True, save=save)
    # the second begins with the first one's gradients and momentum
    assert_same_training(model, batches(2, 8, 8))
    if save == "all":
        # plain autograd: the reference for the rest
        return
    assert {
        *("statistics", "finish_gradient", "bn_relu_conv1x1", "bn_relu_conv1x1_backward"),
        *("bn_relu_conv3", "bn_relu_conv3_backward"),
        *("bn_relu_avg_pool", "bn_relu_avg_pool_backward"),
        *("bn_relu_global_pool", "bn_relu_global_pool_backward"),
    } == set(kernel_calls)


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({"bn_size": None}, (6, 6)),
        ({"drop_rate": 0.3}, (7, 5)),
        ({"spatial_dims": 1}, (9,)),
        ({"spatial_dims": 3}, (4, 3, 5)),
        ({"small_inputs": False}, (33, 21)),
    ],
    ids=["without bottleneck", "dropout, odd", "1-D", "3-D", "ImageNet stem"],
)
def test_one_step_of_other_networks(arguments: dict[str, Any], size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    options = {"small_inputs": True} | arguments
    model = effdense.DenseNet(5, (2, 2), 7, num_classes=10, **options)
    assert_same_training(model, batches(1, *size))


def test_bottlenecks_by_slabs_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 lines, and of 2 that are left."""
    torch.manual_seed(0)
    monkeypatch.setattr(cuts, "_LEAST_LINES", 3)
    monkeypatch.setattr(TritonBackend, "images_per_step", lambda *_: 1)
    model = effdense.DenseNet(5, (2,), 7, num_classes=10, small_inputs=True, save="slabs")
    assert_same_training(model, batches(1, 5, 4))


@pytest.mark.parametrize("save", ["features", "bottlenecks"])
def test_what_a_block_returns_may_be_changed_in_place(save: effdense.Save) -> None:
    torch.manual_seed(0)
    model: Any = effdense.DenseNet(5, (2,), 7, num_classes=10, small_inputs=True, save=save)
    ((images, _),) = batches(1, 5, 4)

    def gradients(network: Any) -> list[Tensor]:
        features = network.features[:-1](images)
        features += 1
        features = F.relu(features, inplace=True)
        reached = [p for n, p in network.named_parameters() if "conv" in n or "layer" in n]
        return list(torch.autograd.grad(features.square().mean(), reached))

    found, expected = (gradients(with_backend(model, name)) for name in ("triton", "torch"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_frozen_norms() -> None:
    torch.manual_seed(0)
    model = effdense.DenseNet(5, (2, 2), 7, num_classes=10, small_inputs=True)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
                assert module.running_mean is not None
                module.running_mean.normal_(std=0.1)
    assert_same_training(model, batches(1, 6, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = effdense.DenseNet(5, (3,), 7, num_classes=10, small_inputs=True)
    ((images, labels),) = batches(1, 6, 6)

    def gradients(model: torch.nn.Module, autocast: bool) -> list[Tensor]:
        with torch.autocast("cpu", dtype, enabled=autocast):
            loss = F.cross_entropy(model(images), labels)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    reference = gradients(with_backend(model, "torch"), False)
    formula = gradients(with_backend(model, "torch"), True)
    ours = gradients(with_backend(model, "triton"), True)
    worst = [
        torch.stack([(a - b).abs().max() / b.abs().max().clamp_min(1e-3) for a, b in pairs]).max()
        for pairs in (zip(ours, reference, strict=True), zip(formula, reference, strict=True))
    ]
    # the interpreter truncates bfloat16 where torch rounds: up to twice the error of each step
    assert worst[0] <= 2 * worst[1] * (2 if dtype == torch.bfloat16 else 1)


def test_parameters_that_are_views_of_other_orders() -> None:
    torch.manual_seed(0)
    model = effdense.DenseNet(5, (2, 2), 7, num_classes=10, small_inputs=True).eval()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                order = list(range(parameter.dim()))[::-1]
                apart = torch.stack([parameter.detach().permute(order).contiguous()] * 2, -1)
                setattr(module, name, torch.nn.Parameter(apart[..., 0].permute(order)))
    ((images, _),) = batches(1, 5, 4)
    steps = [step(with_backend(model, name), images) for name in ("triton", "torch")]
    torch.testing.assert_close(steps[0].output, steps[1].output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(steps[0].gradients, steps[1].gradients, rtol=1e-3, atol=1e-4)
