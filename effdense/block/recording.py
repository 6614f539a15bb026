"""Recording a model's stages as graphs, and the proof that they do what was done before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..norms.synchronization import synchronises
from ..recognition.objections import BATCH_NORMS
from ..tracing import nodes_behind
from .captured import Holder, Layout, Order, Run, Seen, Stage, recorder

# Largest accepted difference between a replay and the step without graphs, in units of the
# largest value: the same kernels in the same order, but for what a library sums as it comes.
_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float64: 1e-10}
_TOLERANCE_FLOAT32 = 1e-3
_WARM_UPS = 2


class Device(Protocol):
    """What records and replays: a CUDA device (cuda_graphs.py), or what stands for it in tests."""

    def current(self) -> AbstractContextManager[Any]:
        """Inside, it is the current device."""
        ...

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Call ``function`` as it will be recorded, on a stream beside the current one."""
        ...

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What ``function`` returns, without values yet, and what gives them values."""
        ...

    def random_state(self) -> Tensor: ...

    def set_random_state(self, state: Tensor) -> None: ...


class CannotCapture(Exception):
    """Why a model's graphs are not used."""


class _Expected(NamedTuple):
    """What a stage gave without graphs."""

    output: Tensor
    buffers: list[Tensor]
    gradients: list[Tensor | None]
    """Of the input, where it has one, and the parameters."""


class Recording:
    """Records the stages of one forward of a model, then their backwards.

    Args:
        device: what records.
        model: whose forward it is.
    """

    def __init__(self, device: Device, model: nn.Module) -> None:
        self.device, self.model = device, model
        self.stages: list[Stage] = []
        self.left_out: dict[str, str] = {}
        """Why stages are not recorded, by name."""
        self._names = {id(module): name for name, module in model.named_modules()}
        self._order = Order()
        self._holders: list[Holder] = []
        self._expected: list[_Expected] = []
        self._inputs: list[list[Tensor]] = []

    def run(self, forward: Callable[[], Any]) -> None:
        """Record all stages that ``forward`` comes to; leaves no trace in the model's state.

        Raises:
            CannotCapture: where one can't be recorded, or replayed is not what it was.
        """
        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        random = self.device.random_state()
        token = recorder.set(self)
        try:
            with self.device.current():
                forward()
                recorder.set(None)
                for stage in reversed(self.stages):
                    self._record_backward(stage)
        except BaseException:
            self.release()
            raise
        finally:
            recorder.reset(token)
            self.device.set_random_state(random)
            _put_back(buffers, before)
            self._expected, self._inputs = [], []

    def release(self) -> None:
        """Forget all graphs, and give back their memory."""
        for holder in self._holders:
            holder.stages.clear()
        self.stages = []

    def stage(self, owners: Sequence[nn.Module], x: Tensor, run: Run) -> Tensor | None:
        """Record one stage's forward and return what it gives, detached from x."""
        name = self._names.get(id(owners[0]), type(owners[0]).__name__)
        reason = _objection(owners)
        output = None
        if reason is None:
            stage = Stage(owners, len(self.stages), name, self._order)
            output, reason = self._record_forward(stage, owners, x, run)
        if reason is None:
            return output
        self.left_out[name] = reason
        # what it does inside is not to be recorded by itself
        token = recorder.set(None)
        try:
            return run(x)
        finally:
            recorder.reset(token)

    def _record_forward(
        self, stage: Stage, owners: Sequence[nn.Module], x: Tensor, run: Run
    ) -> tuple[Tensor | None, str | None]:
        # before what the modules hold is noted
        holder = vars(owners[0]).setdefault("captured", Holder())
        stage.layout, stage.seen = Layout.of(x), Seen(owners, x)
        stage.x = x.detach().clone()
        given = stage.x.detach().requires_grad_(x.requires_grad)
        inputs = [*([given] if x.requires_grad else []), *stage.parameters]
        if not inputs:
            return None, "nothing in it needs a gradient"
        buffers = [buffer for owner in owners for buffer in owner.buffers()]
        before = [buffer.clone() for buffer in buffers]
        random = self.device.random_state()

        def put_back() -> None:
            self.device.set_random_state(random)
            _put_back(buffers, before)

        def output() -> Tensor | None:
            # inside, stages of its own are parts of this one
            token = recorder.set(None)
            try:
                with torch.enable_grad():
                    return run(given)
            finally:
                recorder.reset(token)

        def whole_step() -> _Expected | str:
            y = output()
            if y is None:
                return "it does not run fused"
            if any(type(node).__name__ == "RecomputedBackward" for node in nodes_behind(y)):
                return "its layers are recomputed by autograd"
            if not y.requires_grad:
                return "nothing in it needs a gradient"
            moved = [buffer.clone() for buffer in buffers]
            dy = _random_like(y)
            found = torch.autograd.grad(y, inputs, dy, allow_unused=True)
            return _Expected(y.detach(), moved, list(found))

        for _ in range(_WARM_UPS):
            expected = self.device.warm_up(whole_step)
            put_back()
            if isinstance(expected, str):
                return None, expected
        try:
            y, stage.forward = self.device.record(output)
            put_back()
            stage.forward()
        except Exception as error:
            raise CannotCapture(f"recording the forward of {stage.name}: {error}") from error
        _compare(stage.name, "output", y, expected.output)
        for buffer, value in zip(buffers, expected.buffers, strict=True):
            _compare(stage.name, "a buffer", buffer, value, expected.output.dtype)
        put_back()
        holder.stages.append(stage)
        self._holders.append(holder)
        self.stages.append(stage)
        self._expected.append(expected)
        self._inputs.append(inputs)
        stage.y = y
        return y.detach().clone().requires_grad_(), None

    def _record_backward(self, stage: Stage) -> None:
        inputs, expected = self._inputs[stage.index], self._expected[stage.index]
        stage.dy = _random_like(stage.y)

        def gradients() -> list[Tensor | None]:
            found = torch.autograd.grad(stage.y, inputs, stage.dy, allow_unused=True)
            needs_x = stage.layout.requires_grad
            dx = found[0] if needs_x else None
            return [dx, *_in_one_piece(stage, found[needs_x:])]

        try:
            found, stage.backward = self.device.record(gradients)
            stage.backward()
        except Exception as error:
            raise CannotCapture(f"recording the backward of {stage.name}: {error}") from error
        # what forward kept for it is the pool's again
        stage.y = stage.y.detach()
        stage.dx = found[0]
        ours = [*found[:1], *stage.parameter_gradients()][not stage.layout.requires_grad :]
        for actual, value in zip(ours, expected.gradients, strict=True):
            if actual is not None and value is not None:
                _compare(stage.name, "a gradient", actual, value, expected.output.dtype)


def _put_back(buffers: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for buffer, value in zip(buffers, before, strict=True):
        # past autograd's counting of versions: frozen statistics may be kept for a backward
        buffer.data.copy_(value)


def _in_one_piece(stage: Stage, found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Put gradients behind each other in ``stage.gradients``, each laid out densely."""
    stage.places, size = [], 0
    given = [gradient for gradient in found if gradient is not None]
    for gradient in found:
        if gradient is None:
            stage.places.append(None)
        else:
            dense = torch.empty_like(gradient, device="meta").stride()
            stage.places.append((gradient.shape, dense, size))
            size += gradient.numel()
    if not given:
        stage.gradients = None
        return []
    flat = torch.empty(size, dtype=given[0].dtype, device=given[0].device)
    stage.gradients = flat
    torch._foreach_copy_([flat.as_strided(*p) for p in stage.places if p is not None], given)
    return [flat]


def _objection(owners: Sequence[nn.Module]) -> str | None:
    """Why a stage can't be recorded, or None."""
    for owner in owners:
        if synchronises(owner):
            return "its norms take statistics over several processes"
        if getattr(owner, "offload", False):
            return "what it keeps is offloaded"
        for module in owner.modules():
            if isinstance(module, BATCH_NORMS) and module.training and module.momentum is None:
                return "a norm without momentum counts its batches in Python"
        kinds = {p.dtype for p in owner.parameters() if p.requires_grad}
        if len(kinds) > 1:
            return "its parameters are of several types"
    return None


def _random_like(y: Tensor) -> Tensor:
    generator = torch.Generator(y.device).manual_seed(0)
    return torch.randn(y.shape, generator=generator, dtype=torch.float32, device=y.device).to(
        y.dtype
    )


def _compare(
    stage: str, what: str, actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None
) -> None:
    if not expected.is_floating_point():
        difference, tolerance = float(not torch.equal(actual, expected)), 0.0
    else:
        tolerance = _TOLERANCE.get(dtype or expected.dtype, _TOLERANCE_FLOAT32)
        scale = expected.abs().max().clamp(min=1e-30)
        difference = ((actual.detach() - expected).abs().max() / scale).item()
    # not "difference > tolerance": a NaN has to fail
    if not difference <= tolerance:
        raise CannotCapture(
            f"replayed, {what} of {stage} differs by {difference:.2g} of its largest value from "
            f"the step without graphs"
        )
