"""How kernels are declared and started, and what is kept between launches.

A launcher of an operation looks a :class:`Start` up by the layout of its matrices; where there
is none yet, it has the :class:`Launcher` prepare one, which derives integers, alignment,
constants and tile from the kernel's declaration and the launch table. So a launch that was
made before costs the host a look-up and Triton's compiled launcher, and nothing else: no
strings, no binding of arguments, no context of a device that already is the current one.

The tests inject tables that shrink tiles until every edge is hit, and the audit a launcher
that notes what a real device would be asked to run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from effdense.backends.sharing import address, is_shared
from effdense.kernels.launch_table import Launch
from effdense.kernels.layouts import alignment

T = TypeVar("T")


def _direct_launches() -> bool:
    """Whether a compiled kernel is called as this module knows how to: Triton 3.4 and newer."""
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    return found is not None and (int(found[1]), int(found[2])) >= (3, 4)


DIRECT = _direct_launches()


def jit(function: Callable[..., None] | None = None, /, **groups: tuple[str, ...]) -> Any:
    """``triton.jit`` for a kernel whose launches are prepared by a :class:`Launcher`.

    Args:
        groups: by the name of a constant (ALIGN), the integers that are passed divided by
            their common power of two, which is that constant. See layouts.py, NOTE [ Aligned
            integers ].

    Pointers are called ``p_*``. Those of matrices, which have a row stride ``s_*``, and of
    partial results (``p_part*``) are specialised for 16-byte alignment; vectors are not, since
    slices of the block's vectors begin anywhere. No integer is specialised.
    """
    if function is None:
        return partial(jit, **groups)
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    runtime = [name for name in names if name not in function.__annotations__]
    strides = [name for name in runtime if name.startswith("s_")]
    pointers = [name for name in runtime if name.startswith("p_")]
    matrices = {n for n in pointers if any(s.startswith("s_" + n[2:]) for s in strides)}
    aligned = matrices | {name for name in pointers if name.startswith("p_part")}
    kernel = triton.jit(do_not_specialize=[n for n in runtime if n not in aligned])(function)
    kernel.groups = groups
    kernel.matrices = matrices
    return kernel


def interpreted(kernel: Any) -> bool:
    """Whether ``kernel`` was declared under the Triton interpreter (TRITON_INTERPRET=1)."""
    return not isinstance(kernel, triton.runtime.JITFunction)


class Start:
    """One kernel on matrices of one layout, ready to run.

    Called with the tensors and the floating-point numbers of a call, each in the order of the
    kernel's arguments: pointers first, then floating-point numbers, integers and constants. The
    first call goes through Triton's binder, which compiles. Later ones hand what it found, and
    addresses in place of tensors, to the compiled kernel's own launcher.
    """

    __slots__ = ("_constants", "_features", "_integers", "_matrices", "_runs", "grid", "kernel")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        integers: dict[str, int],
        constants: dict[str, Any],
    ) -> None:
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        names = list(kernel.arg_names)
        kinds = [
            "p_" if n.startswith("p_") else "i" * (n in integers) or "c" * (n in constants)
            for n in names
        ]
        assert kinds == sorted(kinds, key=["p_", "", "i", "c"].index), (kernel, names)
        assert integers.keys() <= set(names), (kernel, integers.keys() - set(names))
        self._integers = tuple(integers[name] for name in names if name in integers)
        self._constants = constants
        pointers = [name for name in names if name.startswith("p_")]
        self._matrices = [i for i, name in enumerate(pointers) if name in kernel.matrices]
        # features, which may be shared with what users were given; p_y is where there is no
        # bottleneck, p_x all else
        self._features = [i for i, name in enumerate(pointers) if name in ("p_x", "p_y")]
        # by device
        self._runs: dict[int, tuple[Any, ...]] = {}

    def __call__(self, tensors: tuple[Tensor, ...], floats: tuple[float, ...] = ()) -> None:
        device, active = tensors[0].get_device(), driver.active
        current = active.get_current_device()
        # a CPU tensor has device -1, under a driver that only counts
        if device not in (current, -1):
            with torch.cuda.device(device):
                self(tensors, floats)
            return
        shared = [i for i in self._features if is_shared(tensors[i])]
        if shared:
            readable = [address if i in shared else Tensor.data_ptr for i in range(len(tensors))]
            addresses = [of(t) for of, t in zip(readable, tensors, strict=True)]
        else:
            # a function of one's own for each would cost the host as much as all the rest
            addresses = [t.data_ptr() for t in tensors]
        bits = 0
        for i in self._matrices:
            bits |= addresses[i]
        found = self._runs.get(current)
        # a profiler's hooks are told of launches by Triton's own way of starting
        if found is None or bits & 15 or _hooked():
            compiled = self.bind(tensors, floats)
            if DIRECT and compiled is not None and not bits & 15:
                constants = [
                    self._constants[n] for n in self.kernel.arg_names if n in self._constants
                ]
                rest = (*self._integers, *constants)
                found = compiled.run, compiled.function, compiled.packed_metadata, rest
                self._runs[current] = found
            return
        run, function, metadata, rest = found
        stream = active.get_current_stream(current)
        hooks = (None, None, None)
        run(*self.grid, stream, function, metadata, *hooks, *addresses, *floats, *rest)

    def bind(self, tensors: tuple[Tensor, ...], floats: tuple[float, ...]) -> Any:
        """Run by way of Triton's binder (or its interpreter); the compiled kernel."""
        return self.kernel[self.grid](*tensors, *floats, *self._integers, **self._constants)


class InterpretedStart(Start):
    """In Triton's interpreter, on any device."""

    def __call__(self, tensors: tuple[Tensor, ...], floats: tuple[float, ...] = ()) -> None:
        self.bind(tensors, floats)


def _nothing(tensors: tuple[Tensor, ...], floats: tuple[float, ...] = ()) -> None:
    """The start of an empty grid."""


def _hooked() -> bool:
    """Whether a profiler wants to know of launches."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Variant(NamedTuple):
    """All that the compiler knows of one operation's kernels.

    Args:
        operation: the launcher's function.
        kernels: the name of each, its constants and options.
        specialised: types of what is passed, and which matrices begin at 16 bytes.
    """

    operation: Callable[..., Any]
    kernels: frozenset[tuple[str, str]]
    specialised: tuple[Any, ...]


class Untrusted(Exception):
    """An operation was prepared in a variant that is not known to be right; nothing has run."""

    def __init__(self, variant: Variant, choices: dict[str, Any]) -> None:
        super().__init__(variant.operation.__name__)
        self.variant, self.choices = variant, choices


def _specialised(key: Iterable[Any]) -> Iterator[Any]:
    """Of a key of :func:`layouts` and types: types, and alignments of addresses."""
    for item in key:
        if isinstance(item, torch.dtype):
            yield item
        elif isinstance(item, tuple) and item and isinstance(item[-1], torch.dtype):
            yield item[-1], item[2] * item[-1].itemsize % 16 == 0


def _name(item: tuple[str, Any]) -> str:
    return item[0]


class Launcher:
    """Prepares kernels for the layouts that they meet, and keeps what it prepared.

    Args:
        table: chooses tiles, as :class:`LaunchTable` does.
        precision: of float32 products, "tf32" or "ieee".
        trusted: the variants that may run; None for all.

    ``prepared`` is for the operations' own use: by operation and layout of their matrices,
    whatever they need to start their kernels again.
    """

    def __init__(
        self,
        table: Callable[..., Launch],
        precision: str = "ieee",
        trusted: Container[Variant] | None = None,
    ) -> None:
        self.table, self.precision, self.trusted = table, precision, trusted
        self.prepared: dict[tuple[Any, ...], Any] = {}
        self._choices: dict[str, Any] = {}
        self._kernels: list[tuple[str, str]] = []

    def launch(self, operation: str, like: Tensor, channels: int, bottleneck: int = 0) -> Launch:
        """What the table says; see :meth:`LaunchTable.__call__`."""
        return self.choose(operation, self.table(operation, like, channels, bottleneck))

    def choose(self, name: str, choice: T) -> T:
        """``choice``, made by sizes that the kernel is not compiled for, such as rows."""
        self._choices[name] = choice
        return choice

    def keep(self, key: tuple[Any, ...], found: T) -> T:
        """Keep ``found``, what was prepared for ``key``, an operation and its layouts.

        Raises:
            Untrusted: where only trusted variants are to run and this one is not; nothing is
                kept then.
        """
        variant = Variant(key[0], frozenset(self._kernels), tuple(_specialised(key)))
        choices, self._choices, self._kernels = self._choices, {}, []
        if self.trusted is not None and variant not in self.trusted:
            raise Untrusted(variant, choices)
        self.prepared[key] = found
        return found

    def prepare(
        self,
        kernel: Any,
        launch: Launch,
        grid: tuple[int, ...],
        integers: dict[str, int],
        **constants: Any,
    ) -> Callable[..., None]:
        """A :class:`Start` of ``kernel``: arguments, alignment and tile from its declaration.

        Args:
            integers: by the name of the argument, undivided.
            constants: all but the alignments and those of the tile, BP, BC and BB.
        """
        if 0 in grid:
            return _nothing
        passed = dict(integers)
        for constant, members in kernel.groups.items():
            constants[constant] = alignment(*(integers[name] for name in members))
            for name in members:
                passed[name] = integers[name] // constants[constant]
        tile = {"BP": launch.block_p, "BC": launch.block_c, "BB": launch.block_b}
        for name, size in tile.items():
            if name in kernel.arg_names:
                constants.setdefault(name, size)
        if "DOT" in kernel.arg_names:
            # one variant of narrow operands, whatever float32 ones are rounded to
            exact = constants["DOT"] != triton.language.float32
            constants["PRECISION"] = "ieee" if exact else self.precision
        constants |= launch.options()
        self._kernels.append((kernel.__name__, str(sorted(constants.items(), key=_name))))
        return self.start(kernel, grid, passed, constants)

    def start(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        integers: dict[str, int],
        constants: dict[str, Any],
    ) -> Callable[..., None]:
        kind = InterpretedStart if interpreted(kernel) else Start
        return kind(kernel, grid, integers, constants)
