"""How kernels are started: tile sizes, splits over rows, and what is kept between launches.

A launcher of an operation looks a :class:`Start` up by the layout of its matrices; where there
is none yet, it has the :class:`Launcher` prepare one, which derives integers, alignment,
constants and tile from the kernel's declaration and the launch table. So a launch that was
made before costs the host a look-up and Triton's compiled launcher, and nothing else: no
strings, no binding of arguments, no context of a device that already is the current one.

The tests inject tables that shrink tiles until every edge is hit, and the audit a launcher
that notes what a real device would be asked to run.

NOTE [ Aligned integers ]
Triton vectorises a memory access only as far as it can prove the alignment of every
stride and bound in it, and it proves divisibility by 16 or nothing. Launchers therefore pass
each integer divided by the largest power of two (up to 16) that divides all integers of its
group, and that power as the compile-time constant ALIGN; the kernel multiplies them
back, and the divisor is known to the compiler. Integers are excluded from Triton's own
specialisation, so that the layers of a block, each of another width, share one binary.

Prefixes of a feature buffer are C0 + l k channels wide: 516 or 750 or 108, multiples of 2 or
4. The rows of X and D are therefore padded to a multiple of PADDING elements, and kernels
load up to the multiple behind the prefix (it is in the row) and put zeros behind c by a
select: what lies there are other layers' channels, or nothing, and a NaN must not survive.
Alignment is then that of the row stride alone, PAD the constant that says so. A matrix that
does not begin at such a multiple, or whose rows are not padded, is loaded up to c.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.testing
from torch import Tensor
from triton.runtime import driver

from effdense.backends.sharing import address, is_shared
from effdense.backends.told import Told

T = TypeVar("T")

STORAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PADDING = 16
"""Elements that the row strides of X and D are a multiple of; see NOTE [ Aligned integers ]."""


def _direct_launches() -> bool:
    """Whether a compiled kernel is called as this module knows how to: Triton 3.4 and newer."""
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    return found is not None and (int(found[1]), int(found[2])) >= (3, 4)


DIRECT = _direct_launches()


def jit(function: Callable[..., None] | None = None, /, **groups: tuple[str, ...]) -> Any:
    """``triton.jit`` for a kernel whose launches are prepared by a :class:`Launcher`.

    Args:
        groups: by the name of a constant (ALIGN), the integers that are passed divided by
            their common power of two, which is that constant. See NOTE [ Aligned integers ].

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


class Architecture(NamedTuple):
    """What the launch table may depend on.

    ``kind`` is "cuda", "hip" or "interpreter"; ``number`` the compute capability times
    ten (0 elsewhere); ``multiprocessors`` how many programs run at once at the least.
    """

    kind: str
    number: int = 0
    multiprocessors: int = 1

    @staticmethod
    def of(device: torch.device) -> Architecture:
        """The architecture of a CUDA or ROCm device."""
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            return Architecture("hip", 0, properties.multi_processor_count)
        number = 10 * properties.major + properties.minor
        return Architecture("cuda", number, properties.multi_processor_count)


@dataclass(frozen=True)
class Launch:
    """Tile sizes and compiler options of one operation.

    Args:
        block_p: rows of a tile.
        block_c: channels of a tile.
        block_b: columns of a product's tile on the bottleneck side.
        num_warps: warps of a program.
        num_stages: loop iterations whose loads are in flight.
        programs: how many programs a reduction over rows is split into, at most. It
            bounds the workspace of partial results and fixes their order.
        registers: of a thread, at most; None leaves them to the compiler. NVIDIA
            only.
    """

    block_p: int = 64
    block_c: int = 64
    block_b: int = 64
    num_warps: int = 4
    num_stages: int = 2
    programs: int = 256
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """What the compiler is told beside the kernel's own constants."""
        found = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.registers is not None:
            found["maxnreg"] = self.registers
        return found

    def split_rows(self, rows: int, tiles: int) -> tuple[int, int]:
        """Rows of one program and the number of such ranges, where ``tiles`` programs share each.

        Every range holds at least one row.
        """
        wanted = max(1, self.programs // tiles)
        steps = cdiv(cdiv(rows, self.block_p), wanted)
        return steps * self.block_p, cdiv(rows, steps * self.block_p)


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


def layouts(*matrices: Tensor) -> list[tuple[Any, ...]]:
    """All of each matrix that a prepared launch depends on, but the alignment of its address."""
    return [(x.shape, x.stride(), x.storage_offset() % PADDING, x.dtype) for x in matrices]


def pad(x: Tensor) -> int:
    """The constant PAD of a matrix; see NOTE [ Aligned integers ]."""
    padded = x.stride(0) % PADDING == 0 and x.storage_offset() % PADDING == 0
    return PADDING if padded else 1


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least ``n``, within [low, high]."""
    return min(high, max(low, 1 << max(0, n - 1).bit_length()))


def alignment(*integers: int) -> int:
    """The largest power of two up to 16 that divides all ``integers``."""
    return math.gcd(16, *integers)


def matrices(*tensors: Tensor) -> None:
    """Check what every operation asks of its (P, c) arguments when it is prepared.

    Raises:
        ValueError: for a type without kernels.
    """
    for t in tensors:
        if t.dtype not in STORAGE_DTYPES:
            raise ValueError(
                f"the Triton kernels store float16, bfloat16 or float32, got {t.dtype}; "
                'use backend="torch"'
            )
        assert t.dim() == 2, t.shape
        assert t.stride(1) == 1 or t.shape[1] == 1, t.stride()


def written(*tensors: Tensor) -> None:
    """Tell autograd that a kernel wrote ``tensors``: Triton's stores are invisible to it."""
    if not tensors[0].is_inference():
        torch.autograd.graph.increment_version(tensors)


def empty(like: Tensor, *shape: int) -> Tensor:
    """A float32 workspace or result on the device of ``like``."""
    if like.dtype == torch.float32:
        # half of what torch.empty costs the host
        return like.new_empty(*shape)
    return torch.empty(shape, dtype=torch.float32, device=like.device)


class Family(NamedTuple):
    """What devices have in common that launches depend on.

    Args:
        product_rows: of a tile that the widest tensor-core instruction takes, at least.
        registers: the limit a thread's registers are given in products, where the assembler,
            left alone, would spill a few bytes to fit one more program; None elsewhere, where
            it would spill for being given one.
        compact: at most 100 KiB of shared memory for a program.
        lanes: threads of a warp.
        pipelined: loads of coming iterations wait in shared memory. AMD's compiler keeps them
            in registers, so its backward gets one stage.
        float32_lanes: of a multiprocessor. Exact products spill in other tiles on 64 than on 128.
        blackwell: of that generation, whose own assembler spills exact float32 products in tiles
            that others' holds.
    """

    product_rows: int = 16
    registers: int | None = None
    compact: bool = False
    lanes: int = 32
    pipelined: bool = True
    float32_lanes: int = 128
    blackwell: bool = False


AMPERE = Family(float32_lanes=64)
ORIN = Family()
COMPACT = Family(registers=255, compact=True)
HOPPER = Family(product_rows=64)
BLACKWELL = Family(product_rows=64, registers=255, blackwell=True)
COMPACT_BLACKWELL = Family(registers=255, compact=True, blackwell=True)
CDNA = Family(lanes=64, pipelined=False)
FAMILIES = {
    80: AMPERE,
    87: ORIN,
    **dict.fromkeys((86, 89), COMPACT),
    90: HOPPER,
    **dict.fromkeys((100, 103), BLACKWELL),
    **dict.fromkeys((120, 121), COMPACT_BLACKWELL),
}

# Elements of a tile. Pooling keeps several positions of each window in flight.
_ELEMENTS = {"map": 4096, "reduce": 2048, "pool": 2048, "pool_backward": 1024}


class LaunchTable:
    """Hand-reasoned launch configurations by operation, shape and architecture.

    No entry was tuned on a device. They follow from sizes and from what the audit finds
    in the machine code: elementwise tiles hold 16 or 32 elements a thread, enough loads
    in flight and no more; products keep a bottleneck of up to 128 columns in one tile, so
    that X is read once; of the tiles that then spill no registers, the largest that
    leaves room for two programs on a multiprocessor. Where rows are few, tiles shrink until
    every multiprocessor has a program: a product then reads X more than once, from the L2
    cache, which holds all of it (7 MB at 4,096 rows of 900 channels).
    """

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.family = FAMILIES.get(architecture.number, ORIN)
        if architecture.kind == "hip":
            self.family = CDNA

    def __call__(self, operation: str, like: Tensor, channels: int, bottleneck: int = 0) -> Launch:
        """The configuration of ``operation`` on matrices like ``like`` (P, channels).

        ``operation`` is "map" (elementwise), "reduce" (elementwise with column sums),
        "pool", "pool_backward", "global_pool" (``like`` its result), "product",
        "product_backward" or one of :meth:`_conv3`.
        """
        if self.architecture.kind == "interpreter":
            return self._interpreter(channels, bottleneck)
        # where accesses are narrower than 128 bits, more addresses are in flight
        align = pad(like) if pad(like) > 1 else alignment(like.stride(0), channels)
        aligned = align * like.element_size() >= 16
        wide = like.dtype == torch.float32
        rows = like.shape[0]
        if operation == "global_pool":
            return self._global_pool(rows, channels, wide)
        if operation.startswith("conv3"):
            return self._conv3(operation, like, channels, bottleneck)
        if operation in _ELEMENTS:
            return self._elementwise(operation, rows, channels, wide, aligned)
        block_b = power_of_two(bottleneck, 16, 128)
        if operation == "product":
            if wide and self.family.blackwell and channels % 4:
                # addresses of a weight that is read less than 128 bits at a time leave no room for
                # the products of 128 columns: four to six registers spilled (sm_121)
                block_b = min(block_b, 64)
            return self._product(rows, block_b, cdiv(bottleneck, block_b), wide)
        if operation == "product_backward":
            return self._product_backward(bottleneck, block_b, wide, aligned)
        raise AssertionError(operation)

    def _elementwise(
        self, operation: str, rows: int, channels: int, wide: bool, aligned: bool
    ) -> Launch:
        # 128 bits a thread along the channels; thin column ranges get more rows instead
        block_c = power_of_two(channels, 16, 64 if wide else 128)
        elements = _ELEMENTS[operation] if aligned else max(512, _ELEMENTS[operation] // 4)
        # 8 elements for each lane, so that a 16-bit type still moves 128 bits
        elements = max(elements, 32 * self.family.lanes if self.family.lanes > 32 else 0)
        if operation.startswith("pool"):
            # windows, of up to eight rows
            rows = cdiv(rows, 8)
        tiles = cdiv(channels, block_c)
        least = 128 // block_c if block_c < 128 else 1
        block_p = max(elements // block_c, 1)
        while block_p > least and cdiv(rows, block_p) * tiles < self.architecture.multiprocessors:
            block_p //= 2
        warps = 4
        if self.family.lanes > 32:
            # 128 bits for each lane, of tiles that became small too
            warps = max(1, min(4, block_p * block_c // ((4 if wide else 8) * self.family.lanes)))
        # left alone, the assembler spills four registers of pooling's backward to fit one program
        # more
        limited = operation == "pool_backward" and self.family.pipelined
        # and Hopper's two, of sums in narrow accesses
        limited |= operation == "reduce" and wide and not aligned and self.family == HOPPER
        # a range's loop is serial: hide latency with programs
        programs = 4 * self.architecture.multiprocessors
        return Launch(block_p, block_c, 16, warps, 1, programs, 255 if limited else None)

    def _global_pool(self, images: int, channels: int, wide: bool) -> Launch:
        # a program for each image and tile of channels: 64 bytes of a row at the least
        block_c = power_of_two(channels, 16, 64 if wide else 128)
        while block_c > 32 and images * cdiv(channels, block_c) < self.architecture.multiprocessors:
            block_c //= 2
        return Launch(4096 // block_c, block_c, 16, 4, 1)

    def _product(self, rows: int, block_b: int, parts: int, wide: bool) -> Launch:
        hip = not self.family.pipelined
        block_p = 64 if wide or hip else 128
        tile = block_p * block_b
        while cdiv(rows, block_p) * parts < self.architecture.multiprocessors and tile > 256:
            if block_p > block_b or block_b == 16:
                block_p //= 2
            else:
                block_b, parts = block_b // 2, 2 * parts
            tile = block_p * block_b
        warps = 8 if tile >= (64 if wide or hip else 128) * 128 else 4
        registers = self.family.registers
        block_c = 16 if wide else 32
        if hip and block_p < 64:
            # 128 bits of X for each lane
            per_lane = (4 if wide else 8) * self.family.lanes
            warps = max(1, min(warps, block_p * block_c // per_lane))
        if tile == 64 * 64 and not hip and (wide or self.family in (AMPERE, ORIN)):
            # left alone, the assembler spills two to six registers to fit one program more; exact
            # products of float32 spill up to eight in four warps of Blackwell
            registers, warps = 255, 8 if wide and self.family.registers is not None else warps
        if wide or hip:
            return Launch(block_p, block_c, block_b, warps, 2, registers=registers)
        return Launch(block_p, 32, block_b, warps, 3, registers=registers)

    def _product_backward(self, bottleneck: int, block_b: int, wide: bool, aligned: bool) -> Launch:
        programs = 2 * self.architecture.multiprocessors
        if not self.family.pipelined:
            return Launch(16 if wide else 64, 32, block_b, 4, 1, programs)
        if wide and self.family == BLACKWELL:
            # of 16 rows and 64 channels exact products spill up to 111 registers, TF32's two
            return Launch(32, 32, block_b, 8, 1, programs, 255 if bottleneck > 128 else None)
        if wide:
            # half the channels would be half of a 128-bit store for each of so many threads; half
            # the threads spill 55 registers of TF32 products (sm_90). The two launches of a
            # bottleneck wider than a tile want the limit, which on sm_80 makes spills. There exact
            # products of a tile of 128 columns behind a frozen norm spill 18 registers unless rows
            # to come wait in shared memory, which on sm_87 makes them 103.
            limited = bottleneck > 128 and self.family not in (AMPERE, HOPPER)
            stages = 2 if 64 < bottleneck <= 128 and self.family == AMPERE else 1
            registers = 255 if limited else None
            return Launch(16, 64, block_b, 8, stages, programs, registers)
        if aligned and self.family.product_rows == 64:
            if self.family.registers is not None:
                # of 64 rows sm_100 spills 18 to 79 registers, in one mode of the kernel or another;
                # of 128 columns 4, in the launches of a bottleneck that is wider
                block_b = block_b if bottleneck <= 128 else 64
                return Launch(32, 64, block_b, 8, 2, programs)
            # 64 channels with 128 columns of dY spill 10 registers (sm_90)
            return Launch(64, 64 if block_b < 128 else 32, block_b, 8, 2, programs)
        block_c = 64 if aligned else 32
        # in four warps 64 columns of dY spill up to four registers on consumers' Blackwell
        most = 64 if self.family.compact else 128
        return Launch(32, block_c, block_b, 8 if block_b >= most else 4, 2, programs)

    def _conv3(self, operation: str, like: Tensor, channels: int, growth: int) -> Launch:
        """Of the 3-wide convolution: "conv3", and backward "conv3_backward", "conv3_weight".

        Tiles of rows and, where these are few, of columns shrink until there is a program for
        every multiprocessor. They keep 16 rows at the least, one step of a matrix unit.
        """
        wide = like.dtype == torch.float32
        hip = not self.family.pipelined
        rows = like.shape[0]
        # given no limit, the assembler spills a few bytes to fit one program more; Hopper's
        # does so in float32 alone
        registers = None if hip or (self.family == HOPPER and not wide) else 255

        def warps_of(block_p: int, columns: int, most: int) -> int:
            # a lane has 128 bits of Y at the least
            lanes = block_p * columns * like.element_size() // 16
            return max(1, min(most, lanes // self.family.lanes))

        if operation == "conv3_weight":
            # tap by tap, or line by line, it fills any device with ranges of rows
            block_k = power_of_two(growth, 16, 32)
            block_b = power_of_two(channels, 16, 32 if wide else 64)
            programs = 2 * self.architecture.multiprocessors
            stages = 1 if wide or hip else 2
            # beside three accumulators, 64 rows are more than registers hold before Hopper
            block_p = 32 if wide or self.family.product_rows == 16 else 64
            if wide and self.family.blackwell:
                # of 32 rows exact products spill up to 59; in eight warps they would not, but then
                # one program fits on a multiprocessor where now there are two
                block_p = 16
            while block_p > 16 and 3 * cdiv(rows, block_p) < self.architecture.multiprocessors:
                block_p //= 2
            warps = warps_of(block_p, block_b, 4)
            return Launch(block_p, block_k, block_b, warps, stages, programs, registers)
        if operation == "conv3":
            columns, block_n = growth, power_of_two(growth, 16, 32 if wide else 64)
            block_p, least = 64 if wide else 128, 16
        else:
            columns, block_n = channels, power_of_two(channels, 16, 32 if wide else 64)
            block_p, least = 32 if wide else 64, 32

        def programs_of(block_p: int, block_n: int) -> int:
            return cdiv(rows, block_p) * cdiv(columns, block_n)

        while programs_of(block_p, block_n) < self.architecture.multiprocessors:
            if block_p > 32:
                block_p //= 2
            elif block_n > least:
                block_n //= 2
            elif block_p > 16:
                block_p //= 2
            else:
                break
        if operation == "conv3":
            block_c, stages = 16 if wide else 32, 2 if wide or hip else 3
            warps = warps_of(block_p, block_c, 4 if block_p > 32 else 2)
            return Launch(block_p, block_c, block_n, warps, stages, 0, registers)
        block_k, stages = power_of_two(growth, 16, 32), 1 if wide or hip else 2
        warps = warps_of(block_p, block_n, 4)
        return Launch(block_p, block_k, block_n, warps, stages, 0, registers)

    def _interpreter(self, channels: int, bottleneck: int) -> Launch:
        # its cost is per program and hardly per element
        block_c = power_of_two(channels, 16, 128)
        return Launch(512, block_c, power_of_two(bottleneck, 16, 256), programs=4)


class SearchedLaunchTable(LaunchTable):
    """A launch table that times alternatives on the device it runs on, once per shape class.

    Opt-in (see TritonBackend): the first call for a class takes seconds, and which of
    two near-equal alternatives wins may differ from machine to machine, and with it the
    order of summation. The winner is written to ``directory`` in a file named by device
    and version, and read from there by later processes. Of several processes rank 0 tries, and
    tells the others; where it has no word for one, that goes by the table.
    """

    def __init__(
        self,
        architecture: Architecture,
        device_name: str,
        directory: Path,
        time: Callable[[Callable[[], Any]], Any] = triton.testing.do_bench,
        told: Told | None = None,
    ) -> None:
        super().__init__(architecture)
        self.time = time
        # decided in this process: by trial, by an earlier process's, or by rank 0
        self._settled: set[str] = set()
        name = re.sub(r"[^\w.]+", "-", device_name)
        self.file = directory / f"{name}-triton-{triton.__version__}-torch-{torch.__version__}.json"
        self._told = Told(self.file.stem) if told is None else told
        self.choices: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            self.choices = json.loads(self.file.read_text())

    @staticmethod
    def shape_class(operation: str, like: Tensor, channels: int, bottleneck: int) -> str:
        """Shapes that share a choice: same type and alignment, sizes of one power of two."""
        rows, c, b = (power_of_two(n, 1, 1 << 40) for n in (like.shape[0], channels, bottleneck))
        dtype = str(like.dtype).removeprefix("torch.")
        align = pad(like) if pad(like) > 1 else alignment(like.stride(0), channels)
        return f"{operation}/{dtype}/{rows}x{c}x{b}/{align}"

    def __call__(self, operation: str, like: Tensor, channels: int, bottleneck: int = 0) -> Launch:
        """The choice of this shape class where one was searched, else the table's."""
        first = super().__call__(operation, like, channels, bottleneck)
        choice = self.choices.get(self.shape_class(operation, like, channels, bottleneck))
        return first if choice is None else replace(first, **choice)

    def search(
        self,
        operation: str,
        like: Tensor,
        channels: int,
        bottleneck: int,
        run: Callable[[Launch], Any],
    ) -> None:
        """Choose for this shape class unless done; ``run`` is the operation on scratch data."""
        key = self.shape_class(operation, like, channels, bottleneck)

        def best() -> dict[str, Any]:
            times: list[tuple[float, int, Launch]] = []
            for i, launch in enumerate(_neighbours(self(operation, like, channels, bottleneck))):
                # a tile too large for this device is no error, only not a candidate
                with contextlib.suppress(triton.runtime.errors.OutOfResources):
                    times.append((float(self.time(partial(run, launch))), i, launch))
            found = min(times)[2]
            names = ("block_p", "block_c", "num_warps", "num_stages")
            return {name: getattr(found, name) for name in names}

        self._settle(key, lambda: self.choices.get(key) or best())

    def choose(
        self,
        operation: str,
        like: Tensor,
        channels: int,
        bottleneck: int,
        alternatives: dict[str, Callable[[], Any]],
    ) -> str | None:
        """The name of the fastest of ``alternatives`` to do ``operation`` for this shape class.

        None where rank 0 should have said, and did not.
        """
        key = "choice of " + self.shape_class(operation, like, channels, bottleneck)

        def fastest() -> dict[str, Any]:
            kept = self.choices.get(key)
            if kept and kept["name"] in alternatives:
                return kept
            times = {name: float(self.time(run)) for name, run in alternatives.items()}
            return {"name": min(times, key=lambda name: times[name])}

        return self._settle(key, fastest).get("name")

    def _settle(self, key: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self._settled:
            self._settled.add(key)
            tried = False

            def find_here() -> dict[str, Any]:
                nonlocal tried
                tried = True
                return find()

            self.choices[key] = self._told(key, find_here) or {}
            if tried:
                self._write()
        return self.choices[key]

    def _write(self) -> None:
        # a directory that cannot be written costs the next process a search, no more
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            whole = self.file.with_suffix(f".{os.getpid()}")
            whole.write_text(json.dumps(self.choices, indent=1, sort_keys=True))
            whole.replace(self.file)


def _neighbours(first: Launch) -> list[Launch]:
    """``first``, and it with half or twice the rows, channels or warps, or one stage more."""
    found = [first, replace(first, num_stages=first.num_stages + 1)]
    for name, low, high in (("block_p", 16, 256), ("block_c", 16, 256), ("num_warps", 1, 16)):
        now = getattr(first, name)
        for other in (now // 2, now * 2):
            if low <= other <= high:
                found.append(replace(first, **{name: other}))
    return found
