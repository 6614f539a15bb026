"""Twin networks and the one way in which core tests compare tensors.

Errors are relative to the largest element of the expected tensor, tensor by tensor.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import effdense
from effdense import reference
from effdense.backends.dropout import dropout_mask, layer_keys
from effdense.tracing import nodes_behind
from effdense.verification.comparison import Step, randomize_norms, relative_error
from effdense.verification.comparison import norms_of as norms_of
from effdense.verification.comparison import step as step
from effdense.verification.comparison import weighted_sum as loss_of  # noqa: F401, for tests
from tests.helpers.places import generator, place, placed

GRADIENT_TOLERANCE = 1e-10
BUFFER_TOLERANCE = 1e-12

SMALL: dict[str, Any] = {
    "growth_rate": 4,
    "block_config": (2, 3),
    "num_init_features": 6,
    "num_classes": 5,
    "small_inputs": True,
}


def assert_close(
    actual: Tensor, expected: Tensor, tolerance: float = GRADIENT_TOLERANCE, name: str = "tensor"
) -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def assert_same_step(actual: Step, expected: Step, tolerance: float = GRADIENT_TOLERANCE) -> None:
    """Outputs, gradients and buffers agree; a gradient is None in both or in neither."""
    assert_close(actual.output, expected.output, tolerance, "output")
    _assert_same_gradient(actual.input_gradient, expected.input_gradient, tolerance, "input")
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        _assert_same_gradient(actual.gradients[name], gradient, tolerance, name)
    assert_same_buffers(actual.buffers, expected.buffers)


def assert_same_buffers(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = BUFFER_TOLERANCE
) -> None:
    assert actual.keys() == expected.keys()
    for name, buffer in expected.items():
        if buffer.is_floating_point():
            assert_close(actual[name], buffer, tolerance, name)
        else:
            assert torch.equal(actual[name], buffer), name


def assert_identical(actual: Step, expected: Step) -> None:
    """Bit for bit."""
    assert torch.equal(actual.output, expected.output)
    pairs = [(actual.input_gradient, expected.input_gradient)]
    pairs += [(actual.gradients[name], g) for name, g in expected.gradients.items()]
    pairs += [(actual.buffers[name], b) for name, b in expected.buffers.items()]
    for a, b in pairs:
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


def _assert_same_gradient(
    actual: Tensor | None, expected: Tensor | None, tolerance: float, name: str
) -> None:
    assert (actual is None) == (expected is None), f"{name}: gradient is None in one of the two"
    if actual is not None and expected is not None:
        assert_close(actual, expected, tolerance, f"gradient of {name}")


def twins(
    save: str = "features",
    *,
    prepare: Callable[[Any], object] | None = None,
    dtype: torch.dtype = torch.float64,
    **config: Any,
) -> tuple[effdense.DenseNet, reference.DenseNet]:
    """Ours and the naive network with the same random state.

    ``config`` updates SMALL; ``prepare`` is applied to both afterwards.
    """
    torch.manual_seed(0)
    arguments = SMALL | config
    naive = reference.DenseNet(**arguments).to(dtype)
    ours = effdense.DenseNet(**arguments, save=save).to(dtype)  # type: ignore[arg-type]
    randomize_norms(naive)
    randomize_norms(ours)
    ours.load_state_dict(naive.state_dict())
    if prepare is not None:
        prepare(naive)
        prepare(ours)
    return placed(ours), placed(naive)


def images(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return placed(torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype))


def stages_in(*outputs: Tensor) -> int:
    """How many fused stages (blocks with their tails) stand in the outputs' graph."""
    return sum(type(node).__name__ == "DenseStageBackward" for node in nodes_behind(*outputs))


@contextlib.contextmanager
def shared_masks(seed: int, block_config: Sequence[int]) -> Iterator[None]:
    """Inside, the naive network's dropout uses the masks ours uses after ``manual_seed(seed)``.

    Ours draws one seed per block that drops anything, from the global generator. A naive
    forward must call every layer's dropout, in order.
    """
    layers = [(block, layer) for block, n in enumerate(block_config) for layer in range(n)]
    order = itertools.cycle(layers)
    numbers = generator()
    seeds: dict[int, Tensor] = {}

    def dropout(new: Tensor, p: float, training: bool = True) -> Tensor:
        block, layer = next(order)
        if (block, layer) == (0, 0):
            seeds.clear()
            numbers.manual_seed(seed)
        if not training:
            return new
        if block not in seeds:
            empty = torch.empty((), dtype=torch.int64, device=place())
            seeds[block] = empty.random_(generator=numbers)
        n, k, *spatial = new.shape
        mask = new.new_empty(new.numel() // k, k)
        dropout_mask(layer_keys(seeds[block], layer + 1)[layer], p, mask)
        return new * mask.view(n, *spatial, k).movedim(-1, 1)

    torch.manual_seed(seed)
    with mock.patch.object(F, "dropout", dropout):
        yield
