"""A converted and an own network behave in PyTorch as the original does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import effdense
from effdense import reference
from effdense.backends.sharing import address
from effdense.block.forwards import set_save
from effdense.tracing import nodes_behind
from effdense.verification.comparison import randomize_norms
from tests.helpers.compare import (
    assert_close,
    assert_same_buffers,
    assert_same_step,
    images,
    norms_of,
    stages_in,
    step,
)
from tests.helpers.ranks import by_ranks

CONFIG: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 8}


@pytest.fixture(params=["own", "converted"])
def networks(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Ours and the original, in float64, with norms as after training."""
    torch.manual_seed(0)
    arguments = CONFIG | {"bn_size": 2, "num_classes": 5}
    naive: Any = torchvision.models.DenseNet(**arguments).double()
    randomize_norms(naive)
    ours: Any = copy.deepcopy(naive)
    if request.param == "converted":
        return effdense.convert(ours), naive
    ours = effdense.DenseNet(**arguments).double()
    randomize_norms(ours)
    ours.load_state_dict(naive.state_dict())
    return ours, naive


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


X = (2, 3, 37, 33)

# ------------------------------------------------------------- subclasses of Tensor


class Tagged(Tensor):
    """A plain wrapper, as MONAI's MetaTensor is."""


@pytest.mark.usefixtures("no_warnings")
def test_a_subclass_of_tensor_comes_back_as_from_the_original(networks: Any) -> None:
    ours, naive = networks
    x = images(*X).as_subclass(Tagged)
    assert_same_step(step(ours, x), step(naive, x))
    assert type(ours(x)) is type(naive(x)) is Tagged
    assert stages_in(ours(x)) == 2
    for name in ("features", "features.denseblock1", "features.transition1"):
        given = x if name == "features" else images(2, 8 if "block" in name else 16, 6, 5)
        found, expected = (m.get_submodule(name)(given.as_subclass(Tagged)) for m in networks)
        assert type(found) is type(expected) is Tagged
        assert_close(found.as_subclass(Tensor), expected.as_subclass(Tensor))


def test_monais_tensors_keep_what_they_carry(networks: Any) -> None:
    monai = pytest.importorskip("monai.data", exc_type=ImportError)
    ours, naive = networks
    x = monai.MetaTensor(images(*X), meta={"affine of": "a patient"})
    found, expected = ours(x), naive(x)
    assert type(found) is type(expected) is monai.MetaTensor
    assert found.meta["affine of"] == "a patient"
    assert_close(found.as_tensor(), expected.as_tensor())


# --------------------------------------------------------------------- hooks, checkpoints


def test_global_hooks_see_every_module(networks: Any) -> None:
    seen: list[list[str]] = []
    for model in networks:
        names = {module: name for name, module in model.named_modules()}
        called: list[str] = []

        def see(module: nn.Module, *_: Any, called: list[str] = called, names: Any = names) -> None:
            called.append(names[module])

        handles = [
            nn.modules.module.register_module_forward_pre_hook(see),
            nn.modules.module.register_module_forward_hook(see),
        ]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "effdense")
                model(images(*X)).sum().backward()
        finally:
            for handle in handles:
                handle.remove()
        seen.append(called)
    assert set(seen[0]) == set(seen[1])
    assert stages_in(networks[0](images(*X))) == 2


def test_global_hooks_are_said_to_cost_memory(networks: Any) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: None)
    try:
        with pytest.warns(UserWarning, match="hooks for all modules"):
            networks[0].features(images(*X))
    finally:
        handle.remove()


def test_flops_are_those_of_the_original(networks: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in networks:
        with warnings.catch_warnings(), FlopCounterMode(display=False) as counter:
            warnings.filterwarnings("ignore", "effdense")
            model(images(*X)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_norms_move_once_under_a_checkpoint_around_features(
    networks: Any, use_reentrant: bool
) -> None:
    ours, naive = networks
    x = images(*X)

    def head(model: Any, features: Tensor) -> Tensor:
        return model.classifier(F.adaptive_avg_pool2d(F.relu(features), 1).flatten(1))

    given = x.clone().requires_grad_()
    output = head(ours, checkpoint(ours.features, given, use_reentrant=use_reentrant))
    output.square().sum().backward()
    own = x.clone().requires_grad_()
    head(naive, naive.features(own)).square().sum().backward()
    assert given.grad is not None
    assert own.grad is not None
    assert_close(given.grad, own.grad)
    assert_same_buffers(dict(ours.named_buffers()), dict(naive.named_buffers()))
    for (name, one), other in zip(ours.named_parameters(), naive.parameters(), strict=True):
        assert_close(one.grad, other.grad, name=name)


# ---------------------------------------------------------------------- in-place operations


def _written(model: Any, x: Tensor) -> Tensor:
    """Features, where the output of every block and transition is changed in place."""
    for name, module in model.features.named_children():
        x = module(x)
        if name.startswith(("denseblock", "transition")):
            x *= 0.75
            x += torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)[:, None, None]
    return F.relu(x, inplace=True)


def _headless(model: Any, x: Tensor) -> Tensor:
    return F.relu(model.features[:-1](x), inplace=True)


def _without_classifier(model: Any, x: Tensor) -> Tensor:
    features = model.features(x)
    features += 1
    return features


@pytest.mark.parametrize("call", [_written, _headless, _without_classifier])
@pytest.mark.parametrize("save", effdense.SAVE_MODES)
@pytest.mark.usefixtures("each_backend", "nan_filled_memory")
def test_what_is_returned_may_be_changed_in_place(networks: Any, save: str, call: Any) -> None:
    set_save(networks[0], save)  # type: ignore[arg-type]
    x = images(*X)
    for _ in range(2):
        actual, expected = (step(m, x, call=partial(call, m)) for m in networks)
        assert_same_step(actual, expected)


class _Tanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh_()


@pytest.mark.parametrize("save", [s for s in effdense.SAVE_MODES if s != "all"])
@pytest.mark.parametrize("newest_first", [False, True])
def test_what_a_recomputed_block_returns_may_be_changed_in_place(
    save: str, newest_first: bool
) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            convs = [nn.Conv2d(5 + 3 * i, 3, 3, padding=1) for i in range(2)]
            self.layers = nn.ModuleList(nn.Sequential(conv, nn.SiLU()) for conv in convs)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.cat([layer(x), x] if newest_first else [x, layer(x)], 1)
            return x

    naive = Chain().double()
    ours = effdense.convert(copy.deepcopy(naive), save=save)  # type: ignore[arg-type]
    x = images(2, 5, 6, 4)
    actual, expected = (step(nn.Sequential(m, _Tanh()), x) for m in (ours, naive))
    assert "RecomputedBackward" in {type(node).__name__ for node in nodes_behind(ours(x))}
    assert_same_step(actual, expected)


_READERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "norm": lambda model, x: model.features.norm5(x),
    "convolution": lambda model, x: F.conv2d(x, torch.ones(3, x.shape[1], 3, 3).to(x)),
    "pooling": lambda model, x: F.adaptive_avg_pool2d(F.relu(x), 1),
    "concatenation": lambda model, x: torch.cat([x, F.interpolate(x, scale_factor=1)], 1),
    "transition": lambda model, x: effdense.Transition(x.shape[1], 4).to(x)(x),
    "block": lambda model, x: effdense.DenseBlock(
        effdense.reference.dense_layers(2, x.shape[1], 4, 2)
    ).to(x)(x),
}


@pytest.mark.parametrize("save", ["features", "bottlenecks"])
@pytest.mark.parametrize("reader", _READERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_memory_is_shared_where_nobody_writes(
    networks: Any, reader: str, save: str, dtype: torch.dtype, each_backend: str
) -> None:
    if (each_backend, dtype) == ("cpu", torch.bfloat16):
        pytest.skip("there are no loops for 16 bits")
    ours, _ = networks
    set_save(ours, save)  # type: ignore[arg-type]
    ours.to(dtype)
    block = ours.features.denseblock2
    x = images(2, 8, 6, 5, dtype=dtype).requires_grad_()
    features = block(x)
    saved = features.grad_fn.saved_tensors[0]
    addresses = address(saved), address(features)
    loss = _READERS[reader](ours, features).float().square().sum()
    loss.backward(retain_graph=True)
    assert addresses == (address(saved), address(features))
    assert addresses[0] == addresses[1]
    with torch.no_grad():
        features.zero_()
    assert addresses[0] == address(saved) != address(features)


# --------------------------------------------------------------- changed after conversion


def _freeze(model: Any) -> None:
    for norm in norms_of(model):
        norm.eval()
        norm.requires_grad_(False)


def _each_layer(model: Any) -> list[Any]:
    return [m for name, m in model.named_modules() if "denselayer" in name.split(".")[-1]]


def _group_norms(model: Any) -> None:
    for layer in _each_layer(model):
        layer.norm1 = nn.GroupNorm(1, layer.norm1.num_features).double()


def _activations(model: Any) -> None:
    for layer in _each_layer(model):
        layer.relu2 = nn.SiLU()


@pytest.mark.parametrize("change", [_freeze, _group_norms, _activations])
@pytest.mark.usefixtures("no_warnings")
def test_what_is_changed_later_stays_in_linear_memory(networks: Any, change: Any) -> None:
    ours, naive = networks
    x = images(*X)
    ours(x), naive(x)
    for model in networks:
        change(model)
    assert_same_step(step(ours, x), step(naive, x))
    nodes = {type(node).__name__ for node in nodes_behind(ours(x))}
    assert {"DenseStageBackward", "RecomputedBackward"} & nodes
    assert "CatBackward0" not in nodes


@pytest.mark.parametrize("what", ["lora", "pruning"])
def test_weights_that_are_computed_later_are_said_to_cost_memory(networks: Any, what: str) -> None:
    class LowRank(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.ones(len(weight), 1).double())

        def forward(self, weight: Tensor) -> Tensor:
            return weight + (self.up @ self.up.T)[:, :1, None, None]

    ours, naive = networks
    x = images(*X)
    ours(x), naive(x)
    for model in networks:
        conv = _each_layer(model)[0].conv2
        if what == "lora":
            nn.utils.parametrize.register_parametrization(conv, "weight", LowRank(conv.weight))
        else:
            prune.l1_unstructured(conv, "weight", 0.5)
    with pytest.warns(UserWarning, match="quadratic memory"):
        actual = step(ours, x)
    expected = step(naive, x)
    assert_same_step(actual, expected._replace(buffers=actual.buffers))


# ----------------------------------------------------------------- layouts and mistakes


def test_gradients_have_their_parameters_strides(networks: Any) -> None:
    for model in networks:
        model.to(memory_format=torch.channels_last)
        model(images(*X)).sum().backward()
    for (name, one), other in zip(
        networks[0].named_parameters(), networks[1].parameters(), strict=True
    ):
        assert one.grad.stride() == one.stride() == other.stride(), name
        assert_close(one.grad, other.grad, name=name)


@pytest.mark.parametrize("shape", [(3, 37, 33), (2, 3, 37), (2, 1, 37, 33), (1, 2, 3, 37, 33)])
def test_an_input_that_does_not_fit_is_told_what_would(networks: Any, shape: Any) -> None:
    ours, _ = networks
    # torchvision's own first convolution speaks for a converted network
    expected = r"\(N, 3, H, W\)" if isinstance(ours, effdense.DenseNet) else "input"
    with pytest.raises((ValueError, RuntimeError), match=expected):
        ours(images(*shape))
    block = ours.get_submodule("features.denseblock1")
    with pytest.raises(ValueError, match=r"expected input of shape \(N, 8, H, W\), got"):
        block(images(*shape))


def test_sharded_blocks_run_fused_and_give_the_originals_gradients(tmp_path: Path) -> None:
    """FSDP2, whose forward changes the classes of modules and forbids to copy them."""
    block = torchvision.models.DenseNet(**CONFIG).features.denseblock1
    with pytest.raises(ValueError, match=r"containers|1D or 2D") as refusal:
        # a mesh of no use: what a block itself is refused for is said before
        fully_shard(block, mesh=SimpleNamespace(ndim=3))  # type: ignore[call-overload]
    if "containers" in str(refusal.value):
        pytest.skip("this torch shards no ModuleDict, such as torchvision's dense blocks")
    found = by_ranks("sharded_steps", 2, tmp_path)
    names = [name.removeprefix("naive ") for name in found if name.startswith("naive ")]
    assert len(names) > 30
    for kind in ("converted", "own"):
        for name in names:
            assert_close(found[f"{kind} {name}"], found[f"naive {name}"], name=f"{kind} {name}")


def test_an_image_without_its_batch_dimension_is_told_so() -> None:
    model = effdense.DenseNet(**CONFIG)
    with pytest.raises(ValueError, match=r"needs a batch dimension: x\[None\]"):
        model(torch.randn(3, 37, 33))
    with pytest.raises(ValueError, match=r"\(N, 1, D, H, W\)"):
        effdense.DenseNet(**CONFIG, in_channels=1, spatial_dims=3)(torch.randn(1, 40, 40, 40))


def test_reference_networks_have_a_first_derivative_of_a_derivative() -> None:
    """That save="all" is the way to second derivatives: it is torch's own graph."""
    naive = reference.densenet_bc(10, 4).double()
    ours = effdense.densenet_bc(10, 4, save="all").double()
    ours.load_state_dict(naive.state_dict())
    x = images(2, 3, 8, 8)
    products = [
        torch.autograd.functional.hvp(lambda v, m=m: m(v * v).sum(), x, torch.ones_like(x))[1]
        for m in (ours, naive)
    ]
    assert_close(products[0], products[1])


def test_a_single_layer_that_is_a_sequence_is_one_layer() -> None:
    """It was taken for the container of the layers."""
    layer = nn.Sequential(nn.Conv2d(5, 3, 3, padding=1), nn.Tanh()).double()
    ours, naive = effdense.DenseBlock([layer]), reference.DenseBlock([copy.deepcopy(layer)])
    x = images(2, 5, 6, 4)
    assert ours(x).shape == (2, 8, 6, 4)
    assert_same_step(step(ours, x), step(naive, x))


# ---------------------------------------------------------------------- the profiler


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_profiler_sees_what_a_block_computes(backend: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    block = effdense.DenseNet(**CONFIG, backend=backend).get_submodule("features.denseblock1")
    x = torch.randn(2, 8, 6, 5, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        block(x).sum().backward()
    seen = {event.key for event in profiled.key_averages()}
    loops = {"bn_relu_conv1x1", "bn_relu_conv3", "bn_relu_conv1x1_backward"}
    products = {"aten::mm", "aten::convolution", "aten::convolution_backward"}
    expected = {f"effdense::{loop}" for loop in loops} if backend == "cpu" else products
    assert expected <= seen


# -------------------------------------------------------- layers that are no functions


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 2, 1).double()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * self.calls


def test_a_layer_that_computes_something_else_in_backward_is_an_error() -> None:
    block = effdense.DenseBlock([_Counting()])
    with pytest.raises(RuntimeError, match="layer 0 of a dense block computed something else"):
        block(images(2, 5, 6, 4)).sum().backward()
    plain = effdense.DenseBlock([_Counting()])
    plain.save = "all"
    plain(images(2, 5, 6, 4)).sum().backward()
