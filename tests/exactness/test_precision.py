"""Narrow types: at most twice the naive network's own error against float64.

The rule and its reason: effdense/verification/comparison.py.
"""

from __future__ import annotations

import copy
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effdense
from effdense import SAVE_MODES, reference
from effdense.verification.comparison import FLOOR, errors_by_kind
from tests.helpers.compare import Step, images, norms_of, randomize_norms, step, twins
from tests.helpers.places import place, placed

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.real_device]

SEEDS = range(7)
saves = pytest.mark.parametrize("save", [s for s in SAVE_MODES if s != "all"])


def _assert_at_most_twice_the_naive_error(
    run: Callable[[int], tuple[Step, Step, Step]], dtype: torch.dtype
) -> None:
    """``run(seed)`` gives our step, the naive one's and the exact one's."""
    pooled: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for seed in SEEDS:
        ours, naive, exact = run(seed)
        assert ours.output.dtype == naive.output.dtype
        for which, found in enumerate((ours, naive)):
            for kind, error in errors_by_kind(found, exact).items():
                pooled[kind][which].append(error)
    for kind, both in pooled.items():
        actual, expected = (statistics.median(errors) for errors in both)
        limit = 2 * expected + FLOOR[dtype]
        assert actual <= limit, f"{kind}: {actual:.2e}, naive {expected:.2e}"


def _runner(
    save: str, dtype: torch.dtype, autocast: bool, **config: Any
) -> Callable[[int], tuple[Step, Step, Step]]:
    def run(seed: int) -> tuple[Step, Step, Step]:
        def prepare(model: nn.Module) -> None:
            randomize_norms(model, seed)

        ours, naive = twins(save, prepare=prepare, **({"growth_rate": 8} | config))
        exact = copy.deepcopy(naive)
        narrow = torch.float32 if autocast else dtype
        ours.to(narrow), naive.to(narrow)
        # The rounding of weights and input is nobody's error.
        exact.load_state_dict(naive.state_dict())
        dims = config.get("spatial_dims", 2)
        x = images(4, 3, *[{1: 64, 2: 32, 3: 16}[dims]] * dims, seed=seed).to(narrow)
        with torch.autocast(place().type, dtype, enabled=autocast):
            found = [step(model, x) for model in (ours, naive)]
        return found[0], found[1], step(exact, x.double())

    return run


@pytest.mark.slow
@saves
@pytest.mark.parametrize("bn_size", [4, None])
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_error_of_a_narrow_model(save: str, bn_size: int | None, dtype: torch.dtype) -> None:
    _assert_at_most_twice_the_naive_error(_runner(save, dtype, False, bn_size=bn_size), dtype)


@pytest.mark.slow
@saves
@pytest.mark.parametrize("bn_size", [4, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_under_autocast(save: str, bn_size: int | None, dtype: torch.dtype) -> None:
    _assert_at_most_twice_the_naive_error(_runner(save, dtype, True, bn_size=bn_size), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_error_under_autocast_with_the_imagenet_stem(dims: int, dtype: torch.dtype) -> None:
    # torch has no narrow 3-D average pooling on a CPU: one block, no transition
    config: dict[str, Any] = {"block_config": (3,)} if dims == 3 else {}
    run = _runner("features", dtype, True, spatial_dims=dims, small_inputs=False, **config)
    _assert_at_most_twice_the_naive_error(run, dtype)


@pytest.mark.parametrize("bn_size", [4, None])
@pytest.mark.parametrize("shift", [3, 100])
def test_error_where_a_channels_mean_exceeds_its_deviation(
    shift: float, bn_size: int | None
) -> None:
    def run(seed: int) -> tuple[Step, Step, Step]:
        nets = twins(bn_size=bn_size, growth_rate=8)
        ours, naive = (copy.deepcopy(net.features.get_submodule("denseblock1")) for net in nets)
        for block in (ours, naive):
            randomize_norms(block, seed)
        exact = copy.deepcopy(naive)
        x = (images(4, 6, 16, 16, seed=seed) + shift).float()
        narrow = [step(block.float(), x) for block in (ours, naive)]
        return narrow[0], narrow[1], step(exact, x.double())

    _assert_at_most_twice_the_naive_error(run, torch.float32)


@saves
def test_double_input_stays_double_under_autocast(save: str) -> None:
    ours, _ = twins(save)
    with torch.autocast(place().type, torch.bfloat16):
        block = ours.features.get_submodule("denseblock1")
        assert block(images(2, 6, 8, 8)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float_norms_in_a_narrow_network(dtype: torch.dtype) -> None:
    def run(seed: int) -> tuple[Step, Step, Step]:
        def prepare(model: nn.Module) -> None:
            randomize_norms(model, seed)

        ours, naive = twins(growth_rate=8, prepare=prepare)
        exact = copy.deepcopy(naive)
        for model in (ours, naive):
            model.to(dtype)
            for norm in norms_of(model):
                norm.float()
        exact.load_state_dict(naive.state_dict())
        x = images(4, 3, 16, 16, dtype=dtype, seed=seed)
        return step(ours, x), step(naive, x), step(exact, x.double())

    _assert_at_most_twice_the_naive_error(run, dtype)


@pytest.mark.parametrize(
    "name",
    [
        *("norm0", "denseblock1.denselayer2.norm1", "denseblock2.denselayer1.norm2"),
        *("transition1.norm", "norm5"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_norms_of_a_wider_type_are_refused(name: str, training: bool, autocast: bool) -> None:
    """As by torch, in its words: "mixed dtype"."""
    nets = twins(small_inputs=False, dtype=torch.float32)
    x = images(2, 3, 37, 30, dtype=torch.float32)
    for net in nets:
        net.train(training)
        net.features.get_submodule(name).double()
    ours, naive = nets
    with torch.autocast(place().type, torch.bfloat16, enabled=autocast):
        with pytest.raises(RuntimeError):
            naive(x)
        with pytest.raises(ValueError, match=r"float64.*model\.float\(\)"):
            ours(x)
    # all of one type is fine
    ours.double()(x.double())


class _Recomputed(nn.Module):
    """A dense block of layers that can't be fused, between a convolution and a pooling."""

    def __init__(self, block: type[reference.DenseBlock]) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1)
        self.block = block(
            nn.Sequential(nn.GroupNorm(2, c), nn.GELU(), nn.Conv2d(c, 8, 3, padding=1))
            for c in (8, 16, 24)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.conv0(x)).mean(dim=(2, 3))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_of_recomputed_layers(dtype: torch.dtype, autocast: bool) -> None:
    def run(seed: int) -> tuple[Step, Step, Step]:
        torch.manual_seed(seed)
        naive = _Recomputed(reference.DenseBlock)
        ours = _Recomputed(effdense.DenseBlock)
        narrow = torch.float32 if autocast else dtype
        placed(naive.to(narrow)), placed(ours.to(narrow)).load_state_dict(naive.state_dict())
        exact = copy.deepcopy(naive).double()
        x = images(2, 3, 9, 10, seed=seed).to(narrow)
        with torch.autocast(place().type, dtype, enabled=autocast):
            found = [step(model, x) for model in (ours, naive)]
        return found[0], found[1], step(exact, x.double())

    _assert_at_most_twice_the_naive_error(run, dtype)
