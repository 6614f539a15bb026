"""Recording a model's stages as graphs, and the proof that they do what was done before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..norms.synchronization import agreed, process_group, sharing, synchronises
from ..recognition.objections import BATCH_NORMS
from ..tracing import nodes_behind, recorded_constants
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

    def records_collectives(self, group: Any) -> bool:
        """Whether those of a process group are recorded, too."""
        ...

    def records_stale_streams(self) -> bool:
        """Whether a backward is recorded that autograd has on another stream than its own."""
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

    NOTE [ all or none ]
    Replays of stages whose norms synchronise wait for the other processes. So with such norms
    what one process finds against a recording is against it in all: they agree before each
    replay that checks it, and after.

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
        found = [process_group(module) for module in model.modules()]
        groups = {id(group): group for group in found if group is not None}
        self._differ = len(groups) > 1
        # where they differ, stages that synchronise are left out, and nobody waits
        self._group = None if self._differ else next(iter(groups.values()), None)
        self._place = torch.device("cpu")
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
        # a cast weight that is kept would be recorded in place of the cast
        cached = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)
        try:
            with self.device.current():
                forward()
                recorder.set(None)
                for stage in reversed(self.stages):
                    with self._by_all(f"the backward of {stage.name}", stage):
                        self._record_backward(stage)
                    with self._by_all(f"the backward of {stage.name}"):
                        self._check_backward(stage)
        except BaseException:
            self.release()
            raise
        finally:
            recorder.reset(token)
            torch.set_autocast_cache_enabled(cached)
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
        self._place = x.device
        reason = self._agree(self._objection(owners))
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
            reason = self._agree(_objection_to(y, owners))
            if reason is not None:
                return reason
            assert y is not None  # which is an objection
            moved = [buffer.clone() for buffer in buffers]
            dy = _random_like(y)
            found = torch.autograd.grad(y, inputs, dy, allow_unused=True)
            return _Expected(y.detach(), moved, list(found))

        for _ in range(_WARM_UPS):
            expected = self.device.warm_up(whole_step)
            put_back()
            if isinstance(expected, str):
                return None, expected
        with self._by_all(f"the forward of {stage.name}", stage):
            y, stage.forward = self.device.record(output)
            put_back()
        with self._by_all(f"the forward of {stage.name}"):
            stage.forward()
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

    def _objection(self, owners: Sequence[nn.Module]) -> str | None:
        """Why a stage can't be recorded, or None."""
        for owner in owners:
            if synchronises(owner):
                if self._differ:
                    return "norms of the model take statistics over different processes"
                for module in owner.modules():
                    group, known = sharing(module)
                    if group is not None and known is None:
                        return (
                            "its norms take statistics over several processes, and nobody said "
                            "how many images each has (effdense.known_images)"
                        )
                if not self.device.records_collectives(self._group):
                    return "its norms take statistics over several processes, not by NCCL"
            if getattr(owner, "offload", False):
                return "what it keeps is offloaded"
            for module in owner.modules():
                if isinstance(module, BATCH_NORMS) and module.training and module.momentum is None:
                    return "a norm without momentum counts its batches in Python"
            kinds = {p.dtype for p in owner.parameters() if p.requires_grad}
            if len(kinds) > 1:
                return "its parameters are of several types"
        return None

    def _agree(self, fault: str | None) -> str | None:
        """``fault``, or that another process has one; see NOTE [ all or none ]."""
        if self._group is None or agreed(fault is None, self._group, self._place):
            return fault
        return fault or "another process can not"

    @contextmanager
    def _by_all(self, doing: str, recorded: Stage | None = None) -> Iterator[None]:
        """Inside, all processes do the same, ``recorded`` is being recorded; or all give up.

        Raises:
            CannotCapture: where this or another process had an error.
        """
        token = recorded_constants.set(None if recorded is None else recorded.constants)
        fault, cause = None, None
        try:
            yield
        except CannotCapture as error:
            fault, cause = str(error), error.__cause__
        except Exception as error:
            fault, cause = f"recording {doing}: {error}", error
        finally:
            recorded_constants.reset(token)
        fault = self._agree(fault)
        if fault is not None:
            raise CannotCapture(fault) from cause

    def _record_backward(self, stage: Stage) -> None:
        inputs = self._inputs[stage.index]
        stage.dy = _random_like(stage.y)

        def gradients() -> list[Tensor | None]:
            found = torch.autograd.grad(stage.y, inputs, stage.dy, allow_unused=True)
            needs_x = stage.layout.requires_grad
            dx = found[0] if needs_x else None
            return [dx, *_in_one_piece(stage, found[needs_x:])]

        found, stage.backward = self.device.record(gradients)
        # what forward kept for it is the pool's again
        stage.y = stage.y.detach()
        stage.dx = found[0]

    def _check_backward(self, stage: Stage) -> None:
        expected = self._expected[stage.index]
        stage.backward()
        ours = [stage.dx, *stage.parameter_gradients()][not stage.layout.requires_grad :]
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


def _objection_to(y: Tensor | None, owners: Sequence[nn.Module]) -> str | None:
    """Why what a stage did can't be recorded, or None."""
    if y is None:
        return "it does not run fused"
    for node in nodes_behind(y):
        if type(node).__name__ == "RecomputedBackward":
            if any(synchronises(owner) for owner in owners):
                return "its layers, which are recomputed, take statistics over several processes"
            objection: str | None = node.objection()
            return objection
    return None if y.requires_grad else "nothing in it needs a gradient"


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
