"""What the fused path can't honour takes the plain path, is honoured there, and is named once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import effdense
from effdense import reference
from tests.helpers.compare import (
    assert_same_step,
    images,
    loss_of,
    norms_of,
    stages_in,
    step,
    twins,
)

Change = Callable[[Any], object]


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class _OwnLayer(reference.DenseLayer):
    def forward(self, features: Tensor) -> Tensor:
        return -super().forward(features)


class _Tagged(nn.Parameter):
    pass


def _replace(layer: Any, name: str, module: nn.Module) -> None:
    setattr(layer, name, module.double())


def _own_layer(model: Any) -> None:
    model.features.denseblock2.denselayer2.__class__ = _OwnLayer


def _patched_forward(model: Any) -> None:
    relu = model.features.denseblock2.denselayer2.relu1
    relu.forward = lambda x: F.leaky_relu(x, 0.2)


def _narrow_last_layer(model: Any) -> None:
    conv = model.features.denseblock2.denselayer3.conv2
    conv.weight = nn.Parameter(conv.weight[:1].detach().clone())
    conv.out_channels = 1
    model.features.norm5 = nn.BatchNorm2d(model.features.norm5.num_features - 3).double()
    width = model.features.norm5.num_features
    model.classifier = nn.Linear(width, 5).double()
    with torch.no_grad():
        model.classifier.weight.copy_(torch.linspace(-1, 1, 5 * width).view(5, width))
        model.classifier.bias.zero_()


def _weight_norm(model: Any) -> None:
    weight_norm(model.features.denseblock2.denselayer2.conv1)


def _spectral_norm(model: Any) -> None:
    torch.manual_seed(0)
    parametrizations.spectral_norm(model.features.denseblock2.denselayer2.conv2)


def _layer2(change: Callable[[Any], object]) -> Change:
    return lambda model: change(model.features.denseblock2.denselayer2)


# The reason that is named; none for layers that are recomputed instead (recomputation.py).
CHANGES: dict[str, tuple[Change, str]] = {
    "forward hook on a convolution": (
        _layer2(lambda layer: layer.conv1.register_forward_hook(lambda m, i, o: 2 * o)),
        "conv1 has hooks",
    ),
    "pre-hook on a norm": (
        _layer2(lambda layer: layer.norm2.register_forward_pre_hook(lambda m, i: i[0] + 1)),
        "norm2 has hooks",
    ),
    "backward hook on a layer": (
        _layer2(lambda layer: layer.register_full_backward_hook(lambda m, i, o: (i[0] * 2,))),
        "denselayer2 has hooks",
    ),
    "hook on a ReLU": (
        _layer2(lambda layer: layer.relu1.register_forward_hook(lambda m, i, o: o * 3)),
        "relu1 has hooks",
    ),
    "parametrisation": (
        _layer2(lambda x: parametrize.register_parametrization(x.conv1, "weight", _Doubled())),
        "conv1 is parametrised",
    ),
    "spectral norm": (_spectral_norm, "conv2 is parametrised"),
    "weight norm": (_weight_norm, "conv1 has hooks"),
    "pruning": (
        _layer2(lambda layer: prune.l1_unstructured(layer.conv2, "weight", 0.5)),
        "conv2 has hooks",
    ),
    "group norm": (
        _layer2(lambda layer: _replace(layer, "norm2", nn.GroupNorm(2, 16))),
        "",
    ),
    "another activation": (
        _layer2(lambda layer: _replace(layer, "relu2", nn.SiLU())),
        "",
    ),
    "no affine map": (
        _layer2(lambda layer: _replace(layer, "norm2", nn.BatchNorm2d(16, affine=False))),
        "",
    ),
    "dilated convolution": (
        _layer2(lambda layer: vars(layer.conv2).update(dilation=(2, 2), padding=(2, 2))),
        "",
    ),
    "bias": (
        # the gradient of a bias before a batch norm is zero up to rounding
        _layer2(lambda x: setattr(x.conv1, "bias", nn.Parameter(torch.ones(16).double(), False))),
        "",
    ),
    "extra child": (
        _layer2(lambda layer: layer.add_module("gate", nn.Identity())),
        "",
    ),
    "layer type with its own forward": (_own_layer, ""),
    "forward replaced on an instance": (_patched_forward, "relu1 has hooks"),
    "unequal growth": (_narrow_last_layer, ""),
    "transition without its pooling": (
        lambda model: _replace(model.features.transition1, "pool", nn.MaxPool2d(2)),
        "pool is a MaxPool2d",
    ),
    "hook inside a transition": (
        lambda model: model.features.transition1.conv.register_forward_hook(lambda m, i, o: -o),
        "conv has hooks",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_honoured_and_named_once(name: str) -> None:
    change, reason = CHANGES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        ours, naive = twins(prepare=change)
    x = images(2, 3, 8, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = step(ours, x)
        fused = stages_in(ours(x))
    found = [str(w.message) for w in caught if "effdense" in str(w.message)]
    assert len(found) == bool(reason)
    assert all(reason in message and "layer by layer" in message for message in found)
    assert fused > 0, "the rest of the network stays fused"
    expected = step(naive, x)
    assert_same_step(actual, expected._replace(buffers=actual.buffers))


def test_hooks_inside_a_block_are_called() -> None:
    ours, _ = twins()
    seen: list[torch.Size] = []
    conv: Any = ours.features.get_submodule("denseblock1.denselayer1.conv2")
    handle = conv.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    with pytest.warns(UserWarning, match="conv2 has hooks"):
        ours(images(2, 3, 8, 8))
    handle.remove()
    assert seen == [(2, 4, 8, 8)]
    assert stages_in(ours(images(2, 3, 8, 8))) == 2


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, effdense.SyncBatchNorm])
@pytest.mark.parametrize("training", [False, True])
def test_synchronised_batch_norm_of_one_process_is_fused(kind: Any, training: bool) -> None:
    """What several make of it: test_synchronization.py."""
    ours, naive = twins(small_inputs=False)
    ours = kind.convert_sync_batchnorm(ours)
    assert {type(norm) for norm in norms_of(ours)} == {kind}
    ours.train(training), naive.train(training)
    x = images(2, 3, 35, 29)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_step(step(ours, x), step(naive, x))
    assert stages_in(ours(x)) == 2


def test_a_parameter_subclass_takes_the_plain_path() -> None:
    ours, _ = twins()
    layer: Any = ours.features.get_submodule("denseblock1.denselayer1")
    layer.conv1.weight = _Tagged(layer.conv1.weight.detach())
    with pytest.warns(UserWarning, match="conv1 holds a _Tagged"):
        ours(images(2, 3, 8, 8))


def test_removed_pruning_is_fused_again() -> None:
    ours, naive = twins()
    for model in (ours, naive):
        conv: Any = model.features.get_submodule("denseblock1.denselayer1.conv2")
        prune.l1_unstructured(conv, "weight", 0.5)
        prune.remove(conv, "weight")
    x = images(2, 3, 8, 8)
    assert_same_step(step(ours, x), step(naive, x))
    assert stages_in(ours(x)) == 2


@pytest.mark.parametrize("kind", ["block", "transition", "features"])
def test_a_subclass_with_its_own_forward_is_called(kind: str) -> None:
    calls: list[str] = []

    class Block(effdense.DenseBlock):
        def forward(self, x: Tensor) -> Tensor:
            calls.append("block")
            return super().forward(x)

    class Transition(effdense.Transition):
        def forward(self, x: Tensor) -> Tensor:
            calls.append("transition")
            return super().forward(x)

    class Features(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            calls.append("features")
            return super().forward(x)

    ours, naive = twins()
    features: Any = ours.features
    if kind == "block":
        features.denseblock1.__class__ = Block
    elif kind == "transition":
        features.transition1.__class__ = Transition
    else:
        features.__class__ = Features
    x = images(2, 3, 8, 8)
    assert_same_step(step(ours, x), step(naive, x))
    assert calls == [kind]


def test_modules_added_to_features_run() -> None:
    ours, naive = twins()
    for model in (ours, naive):
        model.features.add_module("extra", nn.Hardtanh())
    x = images(2, 3, 8, 8)
    assert_same_step(step(ours, x), step(naive, x))


def test_a_changed_first_layer_runs() -> None:
    ours, naive = twins()
    first = nn.Sequential(nn.Conv2d(1, 3, 1), ours.features.get_submodule("conv0")).double()
    for model in (ours, naive):
        model.features.conv0 = first
    x = images(2, 1, 8, 8)
    gradients = []
    for model in (ours, naive):
        first.zero_grad()
        loss_of(model(x)).backward()
        gradients.append([p.grad.clone() for p in first.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))
