"""CUDA graphs' stand-in on a CPU: records operations and does them again on the same tensors.

As a capture does, it notes what reaches the device and nothing of what Python thinks: torch's
operations with the tensors and numbers they were given, calls of the compiled loops, launches
in Triton's interpreter. What reads a value on the host is refused. After recording, every
tensor made meanwhile is filled with NaN: like a graph's, it has no values before a replay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import effdense.block.cuda_graphs
from effdense.backends import cpu_library, select
from effdense.backends.torch_backend import TorchBackend
from effdense.block import slabs

Entry = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _storages(tree: Any) -> set[int]:
    return {_storage(t) for t in tree_leaves(tree) if isinstance(t, Tensor)}


class Operations(TorchDispatchMode):
    """What a function did: (operation, arguments, keyword arguments, result), in order."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        if tags & set(func.tags) or func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **kwargs)
        # other views of the same memory: versions that autograd counts are not a graph's matter
        self.entries.append(
            tree_map(lambda t: t.data if isinstance(t, Tensor) else t, (func, args, kwargs, out))
        )
        return out

    def __enter__(self) -> Operations:
        self._patches = contextlib.ExitStack()
        # as on a GPU, where nobody reads a norm's weights
        self._patches.enter_context(mock.patch.object(slabs, "all_positive", return_value=False))
        self._note(cpu_library.Library, "call")
        with contextlib.suppress(ImportError):
            from effdense.kernels.launch import InterpretedStart

            self._note(InterpretedStart, "__call__")
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _note(self, owner: type, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> None:
            self.entries.append((original, args, kwargs, None))
            with _disable_current_modes():
                original(*args, **kwargs)

        self._patches.enter_context(mock.patch.object(owner, name, call))

    def again(self) -> None:
        """Do all of it again, to the same tensors."""
        with torch.no_grad(), _disable_current_modes():
            for func, args, kwargs, out in self.entries:
                if getattr(func, "namespace", None) == "c10d":
                    func(*args, **kwargs)[-1].wait()
                elif not isinstance(func, torch._ops.OpOverload) or func._schema.is_mutable:
                    func(*args, **kwargs)
                elif not _makes_nothing(func, args, kwargs, out):
                    made = func(*args, **kwargs)
                    for old, new in zip(tree_leaves(out), tree_leaves(made), strict=True):
                        if isinstance(old, Tensor):
                            old.copy_(new)

    def poison(self) -> None:
        """NaN into all that was made in here."""
        given: set[int] = set()
        made: dict[int, Tensor] = {}
        for _, args, kwargs, out in self.entries:
            given |= _storages((args, kwargs)) - made.keys()
            for t in tree_leaves(out):
                if isinstance(t, Tensor) and _storage(t) not in given:
                    made.setdefault(_storage(t), t)
        for t in made.values():
            if t.is_floating_point():
                t.fill_(float("nan"))

    def described(self) -> list[Any]:
        """Equal for equal steps: tensors by layout and place, memory in the order of its use.

        Memory that was there before is itself; what a step allocates lies anywhere.
        """
        numbers: dict[int, int] = {}

        def tensor(t: Any) -> Any:
            if isinstance(t, torch.ScriptObject):
                # a process group, or the waiting for one
                return str(t._type())
            if not isinstance(t, Tensor):
                return t if isinstance(t, (bool, int, float, str, type(None))) else str(t)
            number = numbers.setdefault(_storage(t), len(numbers))
            return number, t.storage_offset(), tuple(t.shape), t.stride(), str(t.dtype)

        return [
            (getattr(func, "__name__", str(func)), *map(tensor, tree_leaves((args, kwargs, out))))
            for func, args, kwargs, out in self.entries
        ]


def _makes_nothing(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Whether it only looks at memory otherwise, or takes some without writing it."""
    name = func.overloadpacket.__name__
    return name.startswith(("empty", "new_empty")) or _storages(out) <= _storages((args, kwargs))


class ReplayingDevice:
    """The ``Device`` of effdense.block.recording on a CPU."""

    def __init__(self) -> None:
        self.recordings: list[Operations] = []
        self.replays = 0

    def current(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with Operations() as operations:
            found = function()
        operations.poison()
        self.recordings.append(operations)

        def replay() -> None:
            self.replays += 1
            operations.again()

        return found, replay

    def records_collectives(self, group: Any) -> bool:
        return True

    def records_stale_streams(self) -> bool:
        return True

    def random_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_random_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)


@contextlib.contextmanager
def replaying(device: ReplayingDevice | None = None) -> Iterator[ReplayingDevice]:
    """Inside, ``effdense.cuda_graphs`` records on a CPU, and the torch backend is that of a GPU."""
    device = device or ReplayingDevice()
    with (
        mock.patch.object(effdense.block.cuda_graphs, "_device", return_value=device),
        mock.patch.object(select, "TorchBackend", return_value=TorchBackend("cuda")),
    ):
        yield device
