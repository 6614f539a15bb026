"""The correctness gate: green for the real providers, red for a broken one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import throughput
import torch
from harness import providers
from harness.case import Case
from harness.gate import disagreement
from harness.providers import PROVIDERS, setup

CASE = Case("densenet_bc", depth=22, growth_rate=6, batch_size=4, image_size=8)
NAMES = [name for name, provider in PROVIDERS.items() if not provider.compiled and name != "naive"]


def loss_and_gradients(name: str, case: Case = CASE, breaks=None):
    job = setup(name, case)
    if breaks is not None:
        breaks(job)
    loss = job.loss()
    loss.backward()
    found = {n: p.grad for n, p in job.model.named_parameters() if p.grad is not None}
    if name in PROVIDERS and PROVIDERS[name].step_in_backward:
        # of the first step, and the gradients are gone
        assert not found
        state = job.optimizer.state
        found = {n: state[p]["momentum_buffer"] for n, p in job.model.named_parameters()}
    gradients = {n: gradient.double() for n, gradient in found.items()}
    return loss.item(), gradients


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_every_provider_agrees_with_the_naive_net(name, dtype):
    case = Case("densenet_bc", 22, 6, 4, 8, dtype)
    found = disagreement(loss_and_gradients("naive", case), loss_and_gradients(name, case), dtype)
    assert not found.red, found.describe()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision-memory-efficient", "checkpoint", "effdense-input"])
def test_imagenet_networks_agree_too(name):
    # Not 32 pixels: norms over two values, as there in the last block, amplify rounding.
    case = Case("densenet121", 0, 0, 2, 64, "float64")
    found = disagreement(
        loss_and_gradients("naive", case), loss_and_gradients(name, case), "float64"
    )
    assert not found.red, found.describe()


@pytest.mark.parametrize("dims", [1, 3])
def test_networks_of_other_dimensions_agree_too(dims):
    case = Case("densenet_bc", 22, 6, 4, 8, "float64", spatial_dims=dims)
    truth = loss_and_gradients("naive", case)
    for name in NAMES:
        if dims not in PROVIDERS[name].dims:
            continue
        found = disagreement(truth, loss_and_gradients(name, case), "float64")
        assert not found.red, f"{name}: {found.describe()}"


def test_channels_last_of_volumes():
    case = Case("densenet_bc", 10, 4, 2, 8, spatial_dims=3)
    job = setup("naive-channels-last", case)
    assert job.x.shape == (2, 3, 8, 8, 8)
    assert job.x.is_contiguous(memory_format=torch.channels_last_3d)
    weight = job.model.get_parameter("features.denseblock1.denselayer1.conv2.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert setup("naive", case).x.is_contiguous()


def test_anybody_s_network_is_a_provider():
    truth = loss_and_gradients("naive")
    loss, gradients = loss_and_gradients("effdense.reference:DenseNet")
    assert not disagreement(truth, (loss, gradients), "float32").red
    # of other names in the same order
    renamed = {name.replace("norm5", "norm_final"): g for name, g in gradients.items()}
    assert renamed.keys() != gradients.keys()
    assert not disagreement(truth, (loss, renamed), "float32").red
    # and in another order
    swapped = dict(
        zip(sorted(gradients), [gradients[n] for n in sorted(gradients)[::-1]], strict=True)
    )
    assert disagreement(truth, (loss, {f"own.{n}": g for n, g in swapped.items()}), "float32").red


def freeze_a_weight(job):
    next(job.model.parameters()).requires_grad_(False)


def negate_a_norm(job):
    with torch.no_grad():
        job.model.features.denseblock1.denselayer2.norm2.weight.neg_()


def scale_a_gradient(job):
    job.model.features.denseblock2.denselayer1.norm1.bias.register_hook(lambda grad: 1.2 * grad)


def poison_a_gradient(job):
    job.model.classifier.bias.register_hook(lambda grad: grad * math.nan)


@pytest.mark.parametrize(
    "breaks", [freeze_a_weight, negate_a_norm, scale_a_gradient, poison_a_gradient]
)
def test_a_broken_provider_is_red(breaks):
    truth = loss_and_gradients("naive")
    broken = loss_and_gradients("effdense-features", breaks=breaks)
    assert disagreement(truth, broken, "float32").red


def test_autocast_allows_twice_the_naive_nets_own_error():
    truth, same = loss_and_gradients("naive"), loss_and_gradients("naive-channels-last")
    naive = disagreement(truth, same, "bfloat16")._replace(gradient=0.1, worst=0.3)
    ours = naive._replace(gradient=0.15, worst=0.5)
    assert ours.red
    assert not ours.relative_to(naive).red
    assert ours._replace(gradient=0.25).relative_to(naive).red


PEAKS = {"flops": 1e11, "bytes": 1e10}


def test_no_speedup_is_printed_while_the_gate_is_red(capsys):
    times = {"naive": [2.0, 2.0, 2.0], "effdense-features": [1.0, 0.8, 1.0]}
    throughput.print_race(CASE, times, (), False, PEAKS)
    green = capsys.readouterr().out
    assert "x naive" in green
    assert "2.00 [2.00, 2.30]" in green
    throughput.print_race(CASE, times, (), True, PEAKS)
    red = capsys.readouterr().out
    assert "x naive" not in red
    assert "2.00 [" not in red.replace("2.000", "")
    assert "No speed-up is stated" in red


def test_all_providers_have_the_same_parameters():
    reference = dict(setup("naive", CASE).model.named_parameters())
    for name in NAMES:
        own = dict(setup(name, CASE).model.named_parameters())
        assert own.keys() == reference.keys(), name
        assert all(torch.equal(own[key], value) for key, value in reference.items()), name


@pytest.mark.parametrize(
    "name", ["nobody", "naive:triton", "effdense-features:cuda", "compile-budget:2"]
)
def test_an_unknown_provider_is_named(name):
    with pytest.raises(ValueError, match=name.partition(":")[0]):
        providers.find(name)


def test_a_provider_runs_on_every_backend_there_is():
    for backend in providers.BACKENDS:
        assert providers.find(f"effdense-features:{backend}")[1] == backend
    block: Any = setup("effdense-features:cpu", CASE).model.get_submodule("features.denseblock1")
    assert block.backend == "cpu"
