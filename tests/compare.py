"""Twin networks and the one way in which core tests compare tensors.

Errors are relative to the largest element of the expected tensor, tensor by tensor.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from effdense import reference
from effdense.dense_block import dropout_mask

GRADIENT_TOLERANCE = 1e-10
BUFFER_TOLERANCE = 1e-12

SMALL: dict[str, Any] = {
    "growth_rate": 4,
    "block_config": (2, 3),
    "num_init_features": 6,
    "num_classes": 5,
    "small_inputs": True,
}


class Step(NamedTuple):
    """What one forward and backward leave behind."""

    output: Tensor
    gradients: dict[str, Tensor | None]
    input_gradient: Tensor | None
    buffers: dict[str, Tensor]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected element; both in float64."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = (actual - expected).abs().max().item()
    scale = expected.abs().max().item()
    if difference == 0:
        return 0.0
    return difference / scale if scale > 0 else float("inf")


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


def randomize_norms(model: nn.Module, seed: int = 0) -> None:
    """Norm weights of both signs and some zero, biases, running statistics, one eps per norm."""
    generator = torch.Generator().manual_seed(seed)
    for i, norm in enumerate(norms_of(model)):
        norm.eps = 1e-5 * 10 ** (i % 4)
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            if tensor is not None:
                value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.data.copy_(value)
        if norm.weight is not None:
            norm.weight.data[::5] = 0
        if norm.running_var is not None:
            value = torch.rand(norm.running_var.shape, generator=generator, dtype=torch.float64)
            norm.running_var.copy_(value + 0.5)


def norms_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


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
    return ours, naive


def images(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(output: Tensor, start: int = 0, batch_size: int | None = None) -> Tensor:
    """A scalar whose gradient differs from element to element.

    Where the output is that of images ``start`` and following of a batch of ``batch_size``, the
    scalars of all its parts add up to that of the batch.
    """
    generator = torch.Generator().manual_seed(2)
    shape = (len(output) if batch_size is None else batch_size, *output.shape[1:])
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (output.double() * weight[start : start + len(output)]).sum()


def step(
    model: nn.Module,
    x: Tensor,
    *,
    input_grad: bool = True,
    call: Callable[[Tensor], Tensor] | None = None,
    loss: Callable[[Tensor], Tensor] = loss_of,
) -> Step:
    """One forward and backward from fresh gradients; ``call`` replaces ``model(x)``."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_(input_grad)
    output = model(x) if call is None else call(x)
    loss(output).backward()
    return Step(
        output.detach().clone(),
        {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        x.grad,
        {n: b.clone() for n, b in model.named_buffers()},
    )


def stages_in(*outputs: Tensor) -> int:
    """How many fused stages (blocks with their tails) stand in the outputs' graph."""
    seen: set[Any] = set()
    waiting = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return sum(type(node).__name__ == "DenseStageBackward" for node in seen)


@contextlib.contextmanager
def shared_masks(seed: int, block_config: Sequence[int]) -> Iterator[None]:
    """Inside, the naive network's dropout uses the masks ours uses after ``manual_seed(seed)``.

    Ours draws one seed per block that drops anything, from the global generator. A naive
    forward must call every layer's dropout, in order.
    """
    layers = [(block, layer) for block, n in enumerate(block_config) for layer in range(n)]
    order = itertools.cycle(layers)
    generator = torch.Generator()
    seeds: dict[int, int] = {}

    def dropout(new: Tensor, p: float, training: bool = True) -> Tensor:
        block, layer = next(order)
        if (block, layer) == (0, 0):
            seeds.clear()
            generator.manual_seed(seed)
        if not training:
            return new
        if block not in seeds:
            drawn = torch.empty((), dtype=torch.int64).random_(generator=generator)
            seeds[block] = int(drawn)
        n, k, *spatial = new.shape
        mask = dropout_mask(seeds[block], layer, (new.numel() // k, k), p, new.dtype, new.device)
        return new * mask.view(n, *spatial, k).movedim(-1, 1)

    torch.manual_seed(seed)
    with mock.patch.object(F, "dropout", dropout):
        yield
