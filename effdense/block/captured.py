"""Stages as CUDA graphs: what they launch is recorded once, and then started as a whole.

A stage is what runs as one (a stem; a block with its reader). Its forward and its backward are
one graph each, so that a network of four blocks takes ten starts a step in place of thousands
of launches. Everything between stages (first convolution, classifier, loss, optimiser, hooks
of DistributedDataParallel) runs as ever.

NOTE [ one memory ]
All graphs of a model share one pool: what backward of a stage has used up is free for the
backward of the stage before it, as in a step without graphs. So they must be started in the
order in which they were recorded: forwards from first to last, backwards from last to first,
and no forward again before backward is done with what the last one left. :class:`Order` holds
this. A forward that would break it runs without graphs, which is always right; a backward that
would (a second one, with ``retain_graph``) raises.

NOTE [ what leaves a graph ]
A graph writes where it wrote when it was recorded. Whoever receives a stage's output or
gradients may keep them beyond the next step, and autograd takes gradients as parameters'
``.grad`` without a copy where it can; both would change under their owner's eyes. So copies are
given away: of the output, of the input's gradient, and of all parameters' gradients, which lie
in one piece for that, at one launch each.

NOTE [ what a graph has read ]
Python ran when a stage was recorded and does not run again. What it looked at is noted, and
looked at again before each replay: modes, settings, hooks and children of the modules, addresses
of parameters and buffers, the input's layout, autocast and TF32. Where anything differs, the
stage runs without its graph, and says so once.

NOTE [ whose images a graph counts ]
Statistics over several processes weigh each by its images, and these weights are in the graph.
So such a stage is recorded where all processes have been told what each has (known_images), and
replayed where they are told the same: in a batch that is shared otherwise every process runs
it without its graph, those whose own share is as ever too. A stage makes the same collectives
in the same order either way, so one that replays and one that can't go together.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..autocast import autocast_dtype
from ..backends.precision import tf32_convolutions
from ..differentiation import Anchor, first_order
from ..norms.synchronization import sharing

Run = Callable[[Tensor], "Tensor | None"]


class Holder:
    """A module's recorded stages; a copy of the module has none."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Holder:
        return Holder()

    def __reduce__(self) -> Any:
        return Holder, ()


class Recorder(Protocol):
    """What records stages when they are first come to (recording.py)."""

    def stage(self, owners: Sequence[nn.Module], x: Tensor, run: Run) -> Tensor | None:
        """Record one and return what it gives, detached from x."""
        ...


recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def run_captured(owners: Sequence[nn.Module], x: Tensor, run: Run) -> Tensor | None:
    """``run(x)``, a stage of the modules ``owners``: by its graph where there is one for it."""
    recording = recorder.get()
    if recording is not None:
        return recording.stage(owners, x, run)
    holder = vars(owners[0]).get("captured")
    if holder is None or not holder.stages:
        return run(x)
    stage = _fitting(holder.stages, owners, x)
    if stage is None:
        return run(x)
    output: Tensor = _Replayed.apply(stage, Anchor(x), x, *stage.parameters)
    return output


def _fitting(stages: Sequence[Stage], owners: Sequence[nn.Module], x: Tensor) -> Stage | None:
    # what is recomputed in backward, or asked for without gradients, is not a training step
    if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
        return None
    layout = Layout.of(x)
    # called with another reader it is another stage
    alike = [
        stage
        for stage in stages
        if stage.layout == layout and stage.owners == list(owners) and stage.shares_as_recorded()
    ]
    if not alike:
        return None
    if not alike[0].seen.is_unchanged(x):
        alike[0].say("something in it changed since it was captured")
        return None
    for stage in alike:
        # a module that a step calls more than once has a stage for each call
        if stage.order.may_forward(stage.index):
            return stage
    alike[0].say("it was called again before the last call's backward")
    return None


class Layout(NamedTuple):
    """What fixed shapes mean."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @staticmethod
    def of(x: Tensor) -> Layout:
        return Layout(x.shape, x.dtype, x.device, x.requires_grad)


class Seen:
    """What Python looked at; see NOTE [ what a graph has read ]."""

    def __init__(self, owners: Sequence[nn.Module], x: Tensor) -> None:
        modules = [module for owner in owners for module in owner.modules()]
        # of each module its attributes, and what is in those that are dictionaries: parameters,
        # buffers, children, hooks of any kind. Equal dictionaries are compared without Python.
        self._now: list[dict[str, Any]] = []
        for module in modules:
            own = vars(module)
            self._now += [own, *[each for each in own.values() if isinstance(each, dict)]]
        self._then = [dict(each) for each in self._now]
        self._tensors = [t for module in modules for t in module._buffers.values() if t is not None]
        self._parameters = [p for module in modules for p in module._parameters.values()]
        self._tensors += [p for p in self._parameters if p is not None]
        self._state = self._state_of(x)

    def _state_of(self, x: Tensor) -> tuple[Any, ...]:
        return (
            autocast_dtype(x.device),
            x.device.type == "cuda" and tf32_convolutions(),
            torch.are_deterministic_algorithms_enabled(),
            [t.data_ptr() for t in self._tensors],
            [p is not None and p.requires_grad for p in self._parameters],
        )

    def is_unchanged(self, x: Tensor) -> bool:
        try:
            return self._now == self._then and self._state_of(x) == self._state
        except RuntimeError:
            # tensors that are not the same ones don't compare
            return False


class Order:
    """In which order a model's graphs may be started; see NOTE [ one memory ]."""

    def __init__(self) -> None:
        self.turn = 0
        self._last = -1
        self._lowest: int | None = None
        self._waiting: list[weakref.ref[Turn]] = []

    def _is_waiting(self) -> bool:
        """Whether what a forward left is still to be used by a backward that can come."""
        turns = [ref() for ref in self._waiting]
        return any(turn is not None and not turn.done for turn in turns)

    def may_forward(self, index: int) -> bool:
        return not self._is_waiting() or (index > self._last and self._lowest is None)

    def forward(self, index: int) -> Turn:
        if not self._is_waiting():
            self.turn += 1
            self._lowest = None
            self._waiting = []
        self._last = index
        turn = Turn(self.turn)
        self._waiting.append(weakref.ref(turn))
        return turn

    def backward(self, index: int, turn: Turn) -> None:
        if turn.number != self.turn or (self._lowest is not None and index >= self._lowest):
            raise RuntimeError(
                "backward through a step that was replayed by CUDA graphs, whose memory is in "
                "use for something else: it can run once, before the next forward; for "
                "retain_graph call release() of what effdense.cuda_graphs returned"
            )
        self._lowest, turn.done = index, True


class Turn:
    """One forward of one stage, alive as long as its backward can come."""

    def __init__(self, number: int) -> None:
        self.number, self.done = number, False


class Stage:
    """A recorded stage and the tensors that its graphs read and write."""

    def __init__(self, owners: Sequence[nn.Module], index: int, name: str, order: Order) -> None:
        self.owners, self.index, self.name, self.order = list(owners), index, name, order
        self.layout: Layout
        self.seen: Seen
        self.parameters = [p for o in owners for p in o.parameters() if p.requires_grad]
        norms = (m for owner in owners for m in owner.modules() if "process_group" in vars(m))
        # of several their modes and groups are noted like everything else
        self._norm = next((norm for norm in norms if norm.training), None)
        self._sharing = None if self._norm is None else sharing(self._norm)
        self.constants: list[Any] = []
        """What its graphs read and nobody else keeps."""
        self.x: Tensor
        self.y: Tensor
        self.dx: Tensor | None = None
        self.dy: Tensor
        self.gradients: Tensor | None = None
        """All parameters', one after the other."""
        self.places: list[tuple[torch.Size, tuple[int, ...], int] | None] = []
        """Of each parameter's: shape, strides and offset; None for one that has none."""
        self.forward: Callable[[], None]
        self.backward: Callable[[], None]
        self._said: set[str] = set()

    def shares_as_recorded(self) -> bool:
        """See NOTE [ whose images a graph counts ]."""
        return self._norm is None or sharing(self._norm) == self._sharing

    def say(self, reason: str) -> None:
        """Say once that it runs without its graph."""
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(
                f"effdense: {self.name} runs without its CUDA graph: {reason}", stacklevel=2
            )

    def parameter_gradients(self) -> list[Tensor | None]:
        """Copies; see NOTE [ what leaves a graph ]."""
        if self.gradients is None:
            return [None] * len(self.places)
        own = self.gradients.clone()
        return [None if place is None else own.as_strided(*place) for place in self.places]


class _Replayed(torch.autograd.Function):
    """``apply(stage, anchor, x, *parameters)``: the stage's output, by its graphs."""

    @staticmethod
    def forward(ctx: Any, stage: Stage, anchor: Anchor, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.anchor = anchor
        ctx.stage, ctx.turn = stage, stage.order.forward(stage.index)
        # for their versions: one that is changed before backward raises there
        ctx.save_for_backward(*parameters)
        stage.x.copy_(x)
        stage.forward()
        return stage.y.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        stage, _ = ctx.stage, ctx.saved_tensors
        stage.order.backward(stage.index, ctx.turn)
        stage.dy.copy_(grad_output)
        stage.backward()
        dx = None if stage.dx is None else stage.dx.clone()
        return None, None, dx, *stage.parameter_gradients()
