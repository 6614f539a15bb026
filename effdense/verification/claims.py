"""Is it correct? A network held against its naive twin, claim by claim."""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autocast import autocast
from ..backends.precision import float32_products
from ..backends.self_check import operation_errors
from ..block.forwards import BlockForward
from ..conversion import convert
from ..errors import first_line
from .comparison import (
    FLOOR,
    Step,
    errors_by_kind,
    randomize_norms,
    relative_error,
    step,
    weighted_sum,
)
from .hidden_states import INPUT, RECOMPUTED, block_inputs, first_tensor, hidden_states
from .rows import TOLERANCE, Largest, Row, Status, guarded, judged, with_nan_last

# Central differences along a direction of length 1: further, and ReLUs change sides on the way
# (along one of length 300 the slope in a 3-D block was off by a hundredth); nearer, and rounding
# shows in gradients smaller than a thousandth of the output.
_STEP, _DIFFERENCE_TOLERANCE, _LEAST_GRADIENT = 1e-6, 1e-5, 1e-3
_LEARNING_RATE, _MOMENTUM = 0.01, 0.9


class Twins(NamedTuple):
    """The naive network and ours, or a model as it was and converted: equal parameters."""

    naive: nn.Module
    ours: nn.Module

    @classmethod
    def of(cls, naive: nn.Module, ours: nn.Module, device: torch.device) -> Twins:
        """Both in float64 and training mode, with random norms and without dropout."""
        for model in (naive, ours):
            model.to(device=device, dtype=torch.float64).train()
            _without_dropout(model)
            randomize_norms(model)
        ours.load_state_dict(naive.state_dict())
        return cls(naive, ours)

    def copies(self) -> Twins:
        """With parameters and buffers of their own."""
        return Twins(copy.deepcopy(self.naive), copy.deepcopy(self.ours))


def _without_dropout(model: nn.Module) -> None:
    """Masks are drawn in another order by ours, which is no error."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(getattr(module, "drop_rate", None), float):
            module.drop_rate = 0.0  # type: ignore[assignment]


def training_loss(output: Tensor) -> Tensor:
    """Cross-entropy against fixed random classes, or where there are none a mean of squares."""
    if output.dim() < 2 or output.shape[1] < 2:
        return output.double().square().mean()
    generator = torch.Generator().manual_seed(4)
    shape = (output.shape[0], *output.shape[2:])
    target = torch.randint(output.shape[1], shape, generator=generator)
    return F.cross_entropy(output, target.to(output.device))


class Comparison:
    """The checks of one pair of networks on inputs of one shape.

    Args:
        twins: see :meth:`Twins.of`; not changed.
        shape: of a batch, (N, channels, *spatial).
        optimizer_steps: taken in lockstep.
    """

    def __init__(self, twins: Twins, shape: Sequence[int], optimizer_steps: int) -> None:
        self._twins, self._shape, self._steps = twins, tuple(shape), optimizer_steps
        self._device = next(twins.naive.parameters()).device

    def exact(self) -> Iterator[Row]:
        """Everything in float64, where only the order of summation differs."""
        with _reproducible():
            yield from guarded("hidden states", self._hidden_states)
            yield from guarded("one training step", self._one_step)
            yield from guarded("save modes", self._save_modes)
            yield from guarded("finite differences", self._finite_differences)
            yield from guarded("optimiser steps in lockstep", self._lockstep)

    def narrow(self, dtype: torch.dtype) -> Iterator[Row]:
        """float32, or 16 bits under autocast: see comparison.py for the rule."""
        name = _name(dtype)
        with _reproducible():
            yield from guarded(f"errors in {name}", lambda: self._narrow(dtype))

    # ------------------------------------------------------------------ checks

    def _hidden_states(self) -> Iterator[Row]:
        twins, errors = self._twins.copies(), Largest()
        convert(twins.ours, "bottlenecks")
        seen, found = 0, hidden_states(*twins, self._input(0))
        for kind, name, actual, expected in found:
            seen += kind in (INPUT, RECOMPUTED)
            errors.add(kind, name, relative_error(actual, expected))
        blocks = [m for m in twins.ours.modules() if isinstance(m, BlockForward)]
        status: Status = "ok" if 0 < seen == len(blocks) else "FAILED"
        yield Row("runs in linear memory", "dense blocks", f"{seen} of {len(blocks)}", "", status)
        yield from errors.rows("float64")

    def _one_step(self) -> Iterator[Row]:
        twins, errors, x = self._twins.copies(), Largest(), self._input(0)
        naive, ours = (_step(model, x, training_loss) for model in twins)
        errors.add("output", "", relative_error(ours.output, naive.output))
        losses = (training_loss(s.output).double() for s in (ours, naive))
        errors.add("loss", "", relative_error(*losses))
        for name, gradient in naive.gradients.items():
            own = ours.gradients[name]
            errors.add("gradients of parameters", name, _both(own, gradient))
        both = ours.input_gradient, naive.input_gradient
        errors.add("gradient of the input", "", _both(*both))
        for name, buffer in naive.buffers.items():
            errors.add("buffers after a step", name, _both(ours.buffers[name], buffer))
        yield from errors.rows("float64")
        with torch.no_grad():
            evaluated = [first_tensor(model.eval()(x)) for model in twins]
        yield judged("output in eval mode", "float64", relative_error(*evaluated[::-1]), TOLERANCE)

    def _save_modes(self) -> Iterator[Row]:
        steps: dict[str, Step] = {}
        for save in ("features", "bottlenecks", "slabs", "input", "all"):
            ours = copy.deepcopy(self._twins.ours)
            convert(ours, save)
            steps[save] = _step(ours, self._input(0), training_loss)
        base = steps.pop("features")
        for save, found in steps.items():
            pairs = [(found.output, base.output), (found.input_gradient, base.input_gradient)]
            pairs += [(found.gradients[name], g) for name, g in base.gradients.items()]
            pairs += [(found.buffers[name], b) for name, b in base.buffers.items()]
            largest = max((_both(a, e) for a, e in pairs), key=with_nan_last)
            claim = f'save="{save}" is save="features"'
            if save in ("slabs", "all"):
                yield judged(claim, f"float64, {len(pairs)} tensors", largest, TOLERANCE)
            else:
                same = all(_identical(a, e) for a, e in pairs)
                compared = f"bit for bit, {len(pairs)} tensors"
                yield Row(claim, compared, f"{largest:.1e}", "0", "ok" if same else "FAILED")

    def _finite_differences(self) -> Iterator[Row]:
        """Of one dense block, along a random direction in the input and in each parameter."""
        twins, errors = self._twins.copies(), Largest()
        found = {name: m for name, m in twins.ours.named_modules() if isinstance(m, BlockForward)}
        name, block = next(iter(found.items()))
        channels = block_inputs(twins.naive, [name], self._input(0))[name][1]
        generator = torch.Generator().manual_seed(5)
        shape = (2, channels, *(5, 6, 4)[: len(self._shape) - 2])
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(self._device)
        module: Any = block
        taken = step(module, x)
        gradients = {"input": taken.input_gradient, **taken.gradients}
        tensors = {"input": x, **{n: p.data for n, p in module.named_parameters()}}
        # of a large block some: each takes two forwards
        for chosen in list(tensors)[:: max(1, len(tensors) // 40)]:
            gradient, tensor = gradients[chosen], tensors[chosen]
            if gradient is None:
                continue
            direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            direction = (direction / direction.norm()).to(self._device)
            values, kept = [], tensor.clone()
            for sign in (1, -1):
                tensor.add_(direction, alpha=sign * _STEP)
                with torch.no_grad():
                    values.append(weighted_sum(module(x)).item())
                tensor.copy_(kept)
            slope = (values[0] - values[1]) / (2 * _STEP)
            expected = (gradient * direction).sum().item()
            # what a random direction of length 1 sees of a gradient
            scale = gradient.norm().item() / math.sqrt(gradient.numel())
            scale = max(scale, _LEAST_GRADIENT * taken.output.norm().item())
            errors.add("gradient by finite differences", chosen, abs(slope - expected) / scale)
        yield from errors.rows(f"float64, {name or 'the block'}", _DIFFERENCE_TOLERANCE)

    def _lockstep(self) -> Iterator[Row]:
        twins, errors = self._twins.copies(), Largest()
        optimizers = [
            torch.optim.SGD(model.parameters(), _LEARNING_RATE, momentum=_MOMENTUM)
            for model in twins
        ]
        for i in range(self._steps):
            x, losses = self._input(i), []
            for model, optimizer in zip(twins, optimizers, strict=True):
                loss = training_loss(first_tensor(model(x)))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach().double())
            errors.add("losses in lockstep", f"step {i + 1}", relative_error(*losses[::-1]))
        naive, ours = (model.state_dict() for model in twins)
        for name, value in naive.items():
            errors.add(f"state after {self._steps} SGD steps", name, _both(ours[name], value))
        yield from errors.rows("float64")

    def _narrow(self, dtype: torch.dtype) -> Iterator[Row]:
        amp = None if dtype == torch.float32 else dtype
        pooled: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        # A ReLU whose input is within rounding of zero makes one batch's error ten times another's.
        for seed in range(11):
            twins = self._twins.copies()
            twins.naive.float(), twins.ours.float()
            twins.ours.load_state_dict(twins.naive.state_dict())
            exact = copy.deepcopy(self._twins.naive)
            # The rounding of weights and input is nobody's error.
            exact.load_state_dict(twins.naive.state_dict())
            x = self._input(seed).float()
            truth = _step(exact, x.double(), weighted_sum)
            for which, model in enumerate((twins.ours, twins.naive)):
                found = errors_by_kind(_step(model, x, weighted_sum, amp), truth)
                for kind, error in found.items():
                    pooled[kind][which].append(error)
        compared = f"{_name(dtype)}{' autocast' if amp else ''} against float64, naive"
        for kind, both in pooled.items():
            error, naive = (statistics.median(errors) for errors in both)
            row = judged(kind, f"{compared} {naive:.1e}", error, 2 * naive + FLOOR[dtype])
            yield row

    def _input(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 1)
        x = torch.randn(self._shape, generator=generator, dtype=torch.float64)
        return x.to(self._device)


def operations(backend: Any, device: torch.device, dtype: torch.dtype, each: bool) -> Iterator[Row]:
    """A backend's operations against float64: a row each, or one for all."""
    tolerance, largest = 0.0, Largest()
    for operation, error, tolerance in operation_errors(backend, device, dtype):
        compared = f"{_name(dtype)} on {device} against float64"
        if isinstance(error, Exception):
            line = first_line(error)
            raised = f"{compared}: {type(error).__name__}: {line}"
            yield Row(f"{backend.name}: {operation}", raised, "", f"{tolerance:.0e}", "FAILED")
        elif each:
            yield judged(f"{backend.name}: {operation}", compared, error, tolerance)
        else:
            largest.add(f"operations of the {backend.name} backend", operation, error)
    yield from largest.rows(_name(dtype), tolerance, "operations")


# -------------------------------------------------------------------- helpers


def _both(actual: Tensor | None, expected: Tensor | None) -> float:
    """Relative error; infinite where only one of the two is there, or whole numbers differ."""
    if actual is None or expected is None:
        return 0.0 if actual is expected else math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else math.inf
    return relative_error(actual, expected)


def _identical(actual: Tensor | None, expected: Tensor | None) -> bool:
    if actual is None or expected is None:
        return actual is expected
    return torch.equal(actual, expected)


def _step(
    model: nn.Module,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    amp: torch.dtype | None = None,
) -> Step:
    def call(x: Tensor) -> Tensor:
        with autocast(x.device.type, amp):
            return first_tensor(model(x))

    return step(model, x, call=call, loss=loss)


@contextmanager
def _reproducible() -> Iterator[None]:
    """Deterministic algorithms, whole float32 products, and new memory filled with NaN."""
    cudnn = torch.backends.cudnn
    before, benchmark = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.benchmark = False
    try:
        with float32_products(tf32=False), warnings.catch_warnings():
            # what has no deterministic algorithm shows as a difference, if it makes one
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        cudnn.benchmark = benchmark


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
