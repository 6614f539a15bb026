"""What must hold on any device, on the devices there are: nothing here needs more than torch.

``python -m benchmarks.gpu`` runs these on a GPU; where there is none, its half is skipped.
Networks and images of the tests' helpers are on the fixture's device already.
"""

from __future__ import annotations

import io
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import effdense
from effdense import SAVE_MODES, reference
from effdense.backends.dropout import dropout_mask, layer_keys
from effdense.backends.select import get_backend
from effdense.verification.comparison import relative_error
from tests.helpers.compare import (
    SMALL,
    Step,
    assert_identical,
    images,
    loss_of,
    randomize_norms,
    step,
    twins,
)
from tests.helpers.replaying import replaying

# float64 is torch's on a GPU; the kernels and the compiled loops have float32
TYPES = {"float64": (torch.float64, 1e-10), "float32": (torch.float32, 2e-3)}
each_type = pytest.mark.parametrize("kind", TYPES)
each_save = pytest.mark.parametrize("save", SAVE_MODES)
IMAGES = (4, 3, 17, 15)


def pair(device: torch.device, kind: str, save: str = "features", **options: Any) -> Any:
    """Our network and the naive one, and a batch."""
    dtype = TYPES[kind][0]
    return *twins(save, dtype=dtype, **options), images(*IMAGES, dtype=dtype)


def assert_alike(actual: Step, expected: Step, tolerance: float) -> None:
    assert relative_error(actual.output, expected.output) <= tolerance
    for one, other in ((actual.gradients, expected.gradients), (actual.buffers, expected.buffers)):
        for name, value in other.items():
            if value is not None:
                found = one[name]
                assert found is not None
                assert relative_error(found, value) <= tolerance, name


# --------------------------------------------------------------------- parity


@each_save
@each_type
def test_a_step_equals_the_naive_networks(save: str, kind: str, device: torch.device) -> None:
    ours, naive, x = pair(device, kind, save)
    assert_alike(step(ours, x), step(naive, x), TYPES[kind][1])


@each_type
@pytest.mark.parametrize(
    "options", [{"bn_size": None}, {"small_inputs": False}], ids=["plain", "ImageNet"]
)
def test_other_networks_equal_the_naive_ones(
    options: dict[str, Any], kind: str, device: torch.device
) -> None:
    ours, naive, _ = pair(device, kind, **options)
    x = images(4, 3, 45, 38, dtype=TYPES[kind][0]).to(device)
    assert_alike(step(ours, x), step(naive, x), TYPES[kind][1])


@each_type
def test_volumes_equal_the_naive_networks(kind: str, device: torch.device) -> None:
    ours, naive, _ = pair(device, kind, spatial_dims=3)
    x = images(2, 3, 6, 7, 5, dtype=TYPES[kind][0]).to(device)
    assert_alike(step(ours, x), step(naive, x), TYPES[kind][1])


# ----------------------------------------------------------------- save modes


@pytest.mark.parametrize("other", ["bottlenecks", "input"])
def test_save_modes_agree_bit_for_bit(other: str, device: torch.device) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        steps = []
        for save in ("features", other):
            model, _, x = pair(device, "float32", save, drop_rate=0.3)
            torch.manual_seed(3)
            steps.append(step(model, x))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_identical(*steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_are_the_same_bits_everywhere(dtype: torch.dtype, device: torch.device) -> None:
    key, expected = layer_keys(torch.tensor(11), 3)[2], torch.empty(333, 24, dtype=dtype)
    dropout_mask(key, 0.2, expected)
    found = torch.empty(333, 24, dtype=dtype, device=device)
    get_backend("auto", device, dtype).dropout_mask(key.to(device), 0.2, found)
    assert torch.equal(found.cpu(), expected)


# ------------------------------------------------------------------ precision


@pytest.mark.real_device
def test_autocast_errs_no_more_than_the_naive_network(device: torch.device) -> None:
    ours, naive, x = pair(device, "float32")
    exact = step(pair(device, "float64")[1], x.double())

    def errors(model: Any) -> list[float]:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            output = model(x)
        loss_of(output.float()).backward()
        pairs: list[tuple[Any, Any]] = [(output, exact.output)]
        pairs += [(p.grad, exact.gradients[n]) for n, p in model.named_parameters()]
        return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]

    ours_errors, naive_errors = errors(ours), errors(naive)
    assert max(ours_errors) <= 2 * max(naive_errors)


# -------------------------------------------------------------------- hazards


def test_a_change_before_backward_raises(device: torch.device) -> None:
    model, _, x = pair(device, "float32")
    loss = model(x).sum()
    with torch.no_grad():
        model.features.denseblock1.denselayer1.conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_backward_needs_retain_graph(device: torch.device) -> None:
    model, _, x = pair(device, "float32")
    loss = model(x).sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), once, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_checkpoint_around_the_network_moves_buffers_once(device: torch.device) -> None:
    steps = []
    for around in (False, True):
        model, _, x = pair(device, "float64", drop_rate=0.3)
        torch.manual_seed(4)
        x.requires_grad_()

        def call(x: Tensor, model: Any = model) -> Tensor:
            return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

        steps.append(step(model, x, call=call if around else None))
    assert_alike(steps[1], steps[0], 1e-10)


# ----------------------------------------------------------------- offloading


def test_offloading_changes_no_bit(device: torch.device) -> None:
    steps = []
    for offloaded in (False, True):
        model, _, x = pair(device, "float64")
        with effdense.offload(min_bytes=0) if offloaded else nullcontext():
            steps.append(step(model, x))
    assert_identical(*steps)


# ----------------------------------------------------------------- conversion


@each_type
def test_a_converted_network_equals_the_original(kind: str, device: torch.device) -> None:
    torch.manual_seed(0)
    models = [reference.DenseNet(**SMALL) for _ in range(2)]
    for model in models:
        randomize_norms(model)
        model.to(device, TYPES[kind][0])
    models[1].load_state_dict(models[0].state_dict())
    effdense.convert(models[1])
    x = images(*IMAGES, dtype=TYPES[kind][0]).to(device)
    assert_alike(step(models[1], x), step(models[0], x), TYPES[kind][1])


# --------------------------------------------------------- resumption, graphs


def training(device: torch.device) -> Any:
    model, _, _ = pair(device, "float32", drop_rate=0.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def take(number: int) -> None:
        optimizer.zero_grad()
        x = images(*IMAGES, dtype=torch.float32, seed=number).to(device)
        model(x).square().sum().backward()
        optimizer.step()

    return model, optimizer, take


def random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@pytest.mark.real_device
def test_a_run_goes_on_with_the_same_bits(device: torch.device) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        model, optimizer, take = training(device)
        torch.manual_seed(6)
        for number in range(2):
            take(number)
        kept = io.BytesIO()
        state = model.state_dict(), optimizer.state_dict(), random_state(device)
        torch.save(state, kept)
        take(2)
        kept.seek(0)
        weights, moments, random = torch.load(kept, weights_only=True)
        again, optimizer, take = training(device)
        again.load_state_dict(weights), optimizer.load_state_dict(moments)
        if device.type == "cuda":
            torch.cuda.set_rng_state(random.cpu(), device)
        else:
            torch.set_rng_state(random)
        take(2)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.real_device
def test_graphs_take_the_same_steps(device: torch.device, monkeypatch: Any) -> None:
    on_a_gpu = device.type == "cuda"
    if not on_a_gpu:
        monkeypatch.setenv("EFFDENSE_BACKEND", "torch")
    with nullcontext() if on_a_gpu else replaying():
        models = []
        for captured in (False, True):
            model, _, take = training(device)
            if captured:
                x = images(*IMAGES, dtype=torch.float32, seed=9).to(device)
                graphs = effdense.cuda_graphs(model, x)
                assert graphs.fault is None
                assert len(graphs.stages) == 2
            torch.manual_seed(8)
            for number in range(3):
                take(number)
            models.append(model)
    expected = models[0].state_dict()
    for name, value in models[1].state_dict().items():
        # what a library sums as it comes may differ
        assert relative_error(value.double(), expected[name].double()) <= 1e-4, name
