"""Every tensor storage of a training step: how large, when it was made, when it died.

NOTE [ the split at the peak ]
At the moment of most live bytes each storage has one role:
    parameters       the model's parameters and buffers
    gradients        what became some parameter's .grad
    optimizer        the optimizer's state
    features         whatever forward left alive for backward
    gradient buffer  the largest storage that backward made
    temporaries      everything else
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .providers import Job

ROLES = (
    "parameters",
    "gradients",
    "optimizer",
    "features",
    "gradient buffer",
    "temporaries",
)


@dataclass
class _Storage:
    nbytes: int
    phase: str
    born: int
    died: int | None = None
    role: str | None = None


class Timeline(TorchDispatchMode):
    """Records storages made while it is active; ``peak`` analyses them afterwards.

    Sees what operators return, not scratch memory inside one (a library's workspace).
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: list[_Storage] = []
        self._alive: dict[int, _Storage] = {}
        self._clock = 0
        self._phase = "setup"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self._see(out)
        elif out is not None:
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self._see(leaf)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        # the address of the C++ object: views share it, and it is ours until the storage dies
        key = storage._cdata
        if key in self._alive:
            return
        self._clock += 1
        record = _Storage(storage.nbytes(), self._phase, self._clock)
        self._storages.append(record)
        self._alive[key] = record
        weakref.finalize(storage, self._bury, key).atexit = False

    def _bury(self, key: int) -> None:
        self._clock += 1
        self._alive.pop(key).died = self._clock

    def enter_phase(self, phase: str) -> None:
        """What follows belongs to this phase: setup, forward, backward or update."""
        if phase == "backward":
            for record in self._alive.values():
                if record.role is None and record.phase != "backward":
                    record.role = "features"
        self._phase = phase

    def assign(self, role: str, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            record = self._alive.get(tensor.untyped_storage()._cdata)
            if record is not None and record.role in (None, "features"):
                record.role = role

    def peak(self) -> dict[str, int]:
        """Bytes by role at the moment of most live bytes, and their sum as "total"."""
        changes = sorted(
            [(s.born, s.nbytes) for s in self._storages]
            + [(s.died, -s.nbytes) for s in self._storages if s.died is not None]
        )
        live = most = when = 0
        for time, change in changes:
            live += change
            if live > most:
                most, when = live, time
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
        return split | {"total": most}


def record_step(build: Any) -> dict[str, int]:
    """The peak of one training step with optimizer state in place.

    ``build`` makes the :class:`~harness.providers.Job`; its tensors count too.
    """
    timeline = Timeline()
    with timeline:
        job: Job = build()
        timeline.assign("parameters", [*job.model.parameters(), *job.model.buffers()])
        job.make_optimizer_state()
        timeline.assign(
            "optimizer",
            [v for s in job.optimizer.state.values() for v in s.values() if torch.is_tensor(v)],
        )

        def phase(name: str) -> None:
            timeline.enter_phase(name)
            if name == "update":
                timeline.assign(
                    "gradients", [p.grad for p in job.model.parameters() if p.grad is not None]
                )

        job.step(phase)
    return timeline.peak()
