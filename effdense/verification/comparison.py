"""How two networks are compared: by tests, and by ``python -m effdense verify``.

Errors are relative to the largest element of the expected tensor, tensor by tensor, but
for narrow types: where rounding flips a ReLU, ours or the naive network's, one element's
error is a thousand times the others'. So there errors are those of all tensors of one kind
together, and the medians over several inputs are compared (the rule of flash-attention's
tests: at most twice the error of plain PyTorch in the same type, and a floor).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# added to twice the naive error, per type
FLOOR = {torch.float32: 1e-7, torch.bfloat16: 1e-3, torch.float16: 1e-4}

# Of predicted memory on a CPU: what isn't tensors (modules, a library's tables), and a share; in 16
# bits the code that oneDNN compiles for convolutions, which no prediction counts.
_OTHER_BYTES, _SHARE, _NARROW_SHARE = 2 << 20, 0.05, 0.2

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class Step(NamedTuple):
    """What one forward and backward leave behind."""

    output: Tensor
    gradients: dict[str, Tensor | None]
    input_gradient: Tensor | None
    buffers: dict[str, Tensor]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected element; both in float64."""
    assert actual.shape == expected.shape, f"shapes {actual.shape} and {expected.shape}"
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = (actual - expected).abs().max().item()
    scale = expected.abs().max().item()
    if difference == 0:
        return 0.0
    return difference / scale if scale > 0 else float("inf")


def near_prediction(measured: int, computed_in: torch.dtype) -> float:
    """Bytes by which the predicted resident size of a step may be off."""
    return (_NARROW_SHARE if computed_in.itemsize == 2 else _SHARE) * measured + _OTHER_BYTES


def errors_by_kind(actual: Step, exact: Step) -> dict[str, float]:
    """Relative errors by kind: output, input gradient, gradients of weights, of norms, buffers."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def add(kind: str, a: Tensor | None, e: Tensor | None) -> None:
        assert (a is None) == (e is None), f"{kind}: None in one of the two"
        if a is not None and e is not None:
            pairs[kind].append((a.double().flatten(), e.double().flatten()))

    add("output", actual.output, exact.output)
    add("input gradient", actual.input_gradient, exact.input_gradient)
    for name, gradient in exact.gradients.items():
        *_, module, parameter = ["", *name.split(".")]
        kind = f"{parameter} of norms" if "norm" in module else "other weights"
        add(kind, actual.gradients[name], gradient)
    for name, buffer in exact.buffers.items():
        if buffer.is_floating_point():
            add(name.rpartition(".")[2], actual.buffers[name], buffer)
    found = {}
    for kind, both in pairs.items():
        a, e = (torch.cat(tensors) for tensors in zip(*both, strict=True))
        found[kind] = float((a - e).norm() / e.norm())
    return found


def randomize_norms(model: nn.Module, seed: int = 0) -> None:
    """Norm weights of both signs and some zero, biases, running statistics, one eps per norm."""
    generator = torch.Generator().manual_seed(seed)
    norms: list[Any] = [module for module in model.modules() if isinstance(module, _NORMS)]
    for i, norm in enumerate(norms):
        norm.eps = 1e-5 * 10 ** (i % 4)
        for tensor in (norm.weight, norm.bias, getattr(norm, "running_mean", None)):
            if tensor is not None:
                value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.data.copy_(value)
        if norm.weight is not None:
            norm.weight.data[::5] = 0
        if getattr(norm, "running_var", None) is not None:
            value = torch.rand(norm.running_var.shape, generator=generator, dtype=torch.float64)
            norm.running_var.copy_(value + 0.5)


def norms_of(model: nn.Module) -> list[Any]:
    """A model's batch norms."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def weighted_sum(output: Tensor, start: int = 0, batch_size: int | None = None) -> Tensor:
    """A scalar whose gradient differs from element to element.

    Where the output is that of images ``start`` and following of a batch of ``batch_size``, the
    scalars of all its parts add up to that of the batch.
    """
    generator = torch.Generator().manual_seed(2)
    shape = (len(output) if batch_size is None else batch_size, *output.shape[1:])
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (output.double() * weight[start : start + len(output)].to(output.device)).sum()


def step(
    model: nn.Module,
    x: Tensor,
    *,
    input_grad: bool = True,
    call: Callable[[Tensor], Tensor] | None = None,
    loss: Callable[[Tensor], Tensor] = weighted_sum,
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
