"""Every tensor storage of a training step: how large, when it was made, when it died.

NOTE [ the split at the peak ]
At the moment of most live bytes each storage has one role:
    parameters       the model's parameters and buffers
    gradients        what became some parameter's .grad
    optimizer        the optimizer's state
    input            the batch and its targets
    features         whatever forward left alive for backward, but for the
    bottlenecks      that save="bottlenecks" keeps
    gradient buffer  the largest storage that backward made
    temporaries      everything else
and at any other moment likewise, the gradient buffer being the largest alive then.

NOTE [ meta tensors ]
A step of a network on the meta device allocates nothing and computes nothing, and makes
the same tensors in the same order: its timeline is the prediction of the real one's.
"""

from __future__ import annotations

import heapq
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..block.dense_block import DenseStage
from ..block.recomputation import Recomputed
from ..tracing import nodes_behind
from .meta import autocast, meta_result, simulation_of
from .workspaces import Workspaces

ROLES = (
    "parameters",
    "gradients",
    "optimizer",
    "input",
    "features",
    "bottlenecks",
    "gradient buffer",
    "temporaries",
)


@dataclass
class _Storage:
    nbytes: int
    phase: str
    born: int
    born_at: str
    # the place in use when it was made, and the one it belongs to
    place: str
    born_seconds: float
    died: int | None = None
    died_seconds: float = math.inf
    role: str | None = None


@dataclass
class Training:
    """A network ready to be trained on one batch by cross-entropy, on meta tensors or real ones.

    Where it returns several tensors, their losses are added.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    x: Tensor
    target: Tensor | None
    """Classes; None for class 0 of every image, or of every position where the network classifies
    each."""
    amp: torch.dtype | None = None
    """What autocast computes in; None for no autocast."""
    gradients_stay: bool = False
    """Gradients are there from the beginning, as DistributedDataParallel's buckets are where
    gradients are views of them, and what backward makes is added to them."""

    def make_optimizer_state(self) -> None:
        """Give the optimizer the state it has after a first step, by one with gradients of 0."""
        wanted = [p for p in self.model.parameters() if p.requires_grad]
        # not for all at once: steps in backward never have all gradients either
        for first in range(0, len(wanted), 32):
            for p in wanted[first : first + 32]:
                p.grad = torch.zeros_like(p)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.gradients_stay:
            for p in wanted:
                p.grad = torch.zeros_like(p)

    def loss(self) -> Tensor:
        """Forward, to a scalar."""
        with autocast(self.x.device, self.amp):
            outputs = tree_leaves(self.model(self.x))
            losses = [self._cross_entropy(y) for y in outputs if isinstance(y, Tensor)]
            return losses[0] if len(losses) == 1 else sum(losses, self.x.new_zeros(()))

    def _cross_entropy(self, output: Tensor) -> Tensor:
        target = self.target
        if target is None:
            shape = output.shape[:1] + output.shape[2:]
            target = torch.zeros(shape, dtype=torch.int64, device=output.device)
        return F.cross_entropy(output, target)

    def step(self) -> None:
        """One training step."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Peak:
    """The moment of most live bytes."""

    parts: dict[str, int]
    """Bytes by role."""
    total: int
    """Their sum."""
    phase: str
    place: str
    """The group of parameters that was in use."""
    kept: dict[str, int]
    """Bytes that forward left alive for backward, by place."""
    sizes: tuple[int, ...]
    """Bytes of each storage alive at the peak."""
    highs: dict[tuple[str, str], int]
    """The highest of what ``resident`` is the highest of, by phase and place."""
    resident: int
    """The highest sum of live bytes, of what convolutions take inside, and of compiled code that is
    kept; the latter two on meta tensors that stand for a CPU's."""
    positions: dict[str, int]
    """Batch times pixels of each dense block in linear memory."""


class Moment(NamedTuple):
    """Live bytes by role just after a storage was made or died."""

    seconds: float
    """Since forward began."""
    phase: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Timeline(TorchDispatchMode):
    """Records storages made while it is active; ``peak`` analyses them afterwards.

    Sees what operators return; what a CPU's take inside is in workspaces.py.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: list[_Storage] = []
        self._alive: dict[int, _Storage] = {}
        self._places: dict[int, str] = {}
        self._clock = 0
        self._phase, self._place = "setup", ""
        # (clock, seconds, name), in order
        self._phases: list[tuple[int, float, str]] = []
        self._kept: dict[str, int] = {}
        self._positions: dict[str, int] = {}
        self._workspaces = Workspaces()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._places:
            for argument in args:
                if isinstance(argument, Tensor):
                    key = argument.untyped_storage()._cdata
                    self._place = self._places.get(key, self._place)
        out = meta_result(func, args, kwargs or {})
        if out is NotImplemented:
            out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._lazy_clone.default:
            # what is shared until it is written
            self._see(out, 0)
        elif isinstance(out, torch.Tensor):
            self._see(out)
        elif out is not None:
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self._see(leaf)
        self._workspaces.see(self._clock, func, args, out)
        return out

    def _see(self, tensor: torch.Tensor, nbytes: int | None = None) -> None:
        storage = tensor.untyped_storage()
        # the address of the C++ object: views share it, and it is ours until the storage dies
        key = storage._cdata
        if key in self._alive:
            return
        self._clock += 1
        now = time.perf_counter()
        place = self._place
        size = storage.nbytes() if nbytes is None else nbytes
        record = _Storage(size, self._phase, self._clock, place, place, now)
        self._storages.append(record)
        self._alive[key] = record
        weakref.finalize(storage, self._bury, key).atexit = False

    def _bury(self, key: int) -> None:
        self._clock += 1
        record = self._alive.pop(key)
        record.died, record.died_seconds = self._clock, time.perf_counter()

    def enter_phase(self, phase: str) -> None:
        """What follows belongs to this phase: setup, forward, backward or update."""
        if phase == "backward":
            for record in self._alive.values():
                if record.phase == "forward":
                    self._kept[record.place] = self._kept.get(record.place, 0) + record.nbytes
                if record.role is None:
                    record.role = "features"
        self._phase = phase
        self._phases.append((self._clock, time.perf_counter(), phase))

    def name_places(self, places: Iterable[tuple[str, Tensor]]) -> None:
        """From now on an operation on one of these tensors is at the place of that name."""
        self._places = {tensor.untyped_storage()._cdata: name for name, tensor in places}

    def assign(self, role: str, tensors: Iterable[Tensor]) -> None:
        """Give tensors a role, those that have none yet."""
        for tensor in tensors:
            self._see(tensor)
            record = self._alive[tensor.untyped_storage()._cdata]
            if record.role in (None, "features"):
                record.role = role

    def locate(self, stage: KeptByStage) -> None:
        """Say of what a dense block keeps where it belongs: it is made before it is used."""
        here = (self._places.get(t.untyped_storage()._cdata) for t in stage.parameters)
        place = next((name for name in here if name is not None), "")
        for tensor in (stage.features, *stage.bottlenecks):
            self._alive[tensor.untyped_storage()._cdata].place = place
        self._positions[place] = stage.features.numel() // stage.features.shape[1]

    def peak(self) -> Peak:
        """The moment of most live bytes; see NOTE [ the split at the peak ]."""
        births = [(s.born, s.nbytes, s) for s in self._storages]
        deaths = [(s.died, -s.nbytes, s) for s in self._storages if s.died is not None]
        live = most = when = 0
        highs: dict[tuple[str, str], int] = {}
        last, resident = None, 0
        for clock, change, storage in sorted(births + deaths, key=lambda event: event[0]):
            live += change
            taken = live + self._workspaces.at(clock)
            resident = max(resident, taken)
            if change > 0:
                moment = storage.phase, storage.born_at
                highs[moment] = max(taken, highs.get(moment, 0))
            if live > most:
                most, when, last = live, clock, storage
        at_peak = [
            s for s in self._storages if s.born <= when and (s.died is None or s.died > when)
        ]
        # See NOTE [ the split at the peak ].
        split = dict.fromkeys(ROLES, 0)
        loose = [s for s in at_peak if s.role is None]
        made_in_backward = [s.nbytes for s in loose if s.phase == "backward"]
        split["gradient buffer"] = max(made_in_backward, default=0)
        split["temporaries"] = sum(s.nbytes for s in loose) - split["gradient buffer"]
        for s in at_peak:
            if s.role is not None:
                split[s.role] += s.nbytes
        sizes = tuple(s.nbytes for s in at_peak)
        phase, place = ("", "") if last is None else (last.phase, last.born_at)
        return Peak(split, most, phase, place, self._kept, sizes, highs, resident, self._positions)

    def moments(self) -> list[Moment]:
        """Live bytes from the beginning of forward on; see NOTE [ the split at the peak ]."""
        events = [(s.born, s.born_seconds, s, True) for s in self._storages]
        events += [(s.died, s.died_seconds, s, False) for s in self._storages if s.died is not None]
        parts = dict.fromkeys(ROLES, 0)
        # what backward made and nothing is known of, largest first; the dead are passed over
        loose: list[tuple[int, int, _Storage]] = []
        gone: set[int] = set()
        began, phases = self._phases[0][1], list(self._phases)
        phase, found = "setup", []
        for clock, seconds, storage, born in sorted(events, key=lambda event: event[0]):
            while phases and phases[0][0] < clock:
                phase = phases.pop(0)[2]
            sign = 1 if born else -1
            role = storage.role or "temporaries"
            parts[role] += sign * storage.nbytes
            if storage.role is None and storage.phase == "backward":
                if born:
                    heapq.heappush(loose, (-storage.nbytes, storage.born, storage))
                else:
                    gone.add(storage.born)
            while loose and loose[0][1] in gone:
                heapq.heappop(loose)
            if phase == "setup":
                continue
            buffer = -loose[0][0] if loose else 0
            now = {**parts, "gradient buffer": buffer}
            now["temporaries"] -= buffer
            found.append(Moment(seconds - began, phase, now))
        return found


def record_step(
    build: Callable[[], Training],
    *,
    places: Callable[[nn.Module], Iterable[tuple[str, Tensor]]] = nn.Module.named_parameters,
) -> Peak:
    """The peak of one training step with optimizer state in place.

    Args:
        build: makes the training; its tensors count too.
        places: (name, tensor) pairs of a model; see :class:`Peak`.
    """
    return _recorded(build, places).peak()


def live_memory(build: Callable[[], Training]) -> list[Moment]:
    """Live bytes by role at every moment of one training step with optimizer state in place.

    Args:
        build: makes the training, on any device; on meta only the order of moments means
            anything, not their seconds. On a real device recording slows a step down.
    """
    return _recorded(build, nn.Module.named_parameters).moments()


def _recorded(
    build: Callable[[], Training],
    places: Callable[[nn.Module], Iterable[tuple[str, Tensor]]],
) -> Timeline:
    timeline = Timeline()
    with timeline, ExitStack() as stack:
        job = build()
        stack.enter_context(simulation_of(job.x))
        model, optimizer = job.model, job.optimizer
        timeline.assign("parameters", [*model.parameters(), *model.buffers()])
        timeline.assign("input", [job.x] if job.target is None else [job.x, job.target])
        job.make_optimizer_state()
        states = [v for s in optimizer.state.values() for v in s.values()]
        timeline.assign("optimizer", [v for v in states if torch.is_tensor(v)])
        timeline.name_places(places(model))
        timeline.enter_phase("forward")
        loss = job.loss()
        _locate_all(timeline, loss)
        timeline.enter_phase("backward")
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        timeline.assign("gradients", gradients)
        timeline.enter_phase("update")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del gradients
    return timeline


def _locate_all(timeline: Timeline, loss: Tensor) -> None:
    # in a function of its own: what was offloaded comes back here, and must not stay
    for stage in stages(loss):
        timeline.assign("bottlenecks", stage.bottlenecks)
        timeline.locate(stage)


_STAGE: Any = DenseStage._backward_cls
_RECOMPUTED: Any = Recomputed._backward_cls


class KeptByStage(NamedTuple):
    """What one dense block in linear memory keeps for backward; features or its input."""

    features: Tensor
    bottlenecks: Sequence[Tensor]
    parameters: Sequence[Tensor]


def stages(output: Tensor) -> Iterator[KeptByStage]:
    """The dense blocks in linear memory behind ``output``, as autograd's graph knows them."""
    for node in nodes_behind(output):
        if isinstance(node, _RECOMPUTED):
            features, *parameters = node.saved_tensors
            yield KeptByStage(features, (), parameters)
        elif isinstance(node, _STAGE):
            # in the order of DenseStage.forward: X, seed, four statistics, bottlenecks, tensors
            kept, last = node.saved_tensors, 6 + node.num_kept
            tensors = [t for t in kept[last:] if t is not None]
            yield KeptByStage(kept[0], kept[6:last], tensors)
