"""How kernels are started: tile sizes, splits over rows, and the table that chooses them.

A launcher never looks a configuration up: it is handed a :class:`Launch`. That is what
lets the tests shrink tiles until every edge is hit, and the audit compile what a real
device would run on a machine without one.

NOTE [ Aligned integers ]
Triton vectorises a memory access only as far as it can prove the alignment of every
stride and bound in it, and it proves divisibility by 16 or nothing. Prefixes of a
feature buffer are C0 + l k channels wide: with k = 24 a multiple of 8, never of 16, and
every 16-bit access would shrink to a single element. Launchers therefore pass each
integer divided by the largest power of two (up to 16) that divides all integers of its
group, and that power as the compile-time constant ALIGN; the kernel multiplies them
back, and the divisor is known to the compiler. Integers are excluded from Triton's own
specialisation, so that the layers of a block, each of another width, share one binary.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.testing
from torch import Tensor

STORAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = [
    *("P", "C", "B", "n_c", "n_b", "n_parts", "rows", "positions", "n_w", "M"),
    *("S0", "S1", "S2", "s_x", "s_w", "s_d", "s_dz", "s_dy", "s_out", "s_pooled"),
]
"""Integer parameters of the kernels: none is specialised (see the note above)."""


def jit(function: Callable[..., None]) -> Any:
    """``triton.jit`` without value specialisation of the integers that the function takes."""
    taken = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(do_not_specialize=[name for name in INTEGERS if name in taken])(function)


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

    def start(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Run ``kernel`` on the device of its first tensor; an empty grid is nothing to do."""
        if 0 in grid:
            return
        device = next(a for a in args if isinstance(a, Tensor)).device
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with on_device:
            kernel[grid](*args, **(self.options() | constants))

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


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least ``n``, within [low, high]."""
    return min(high, max(low, 1 << max(0, n - 1).bit_length()))


def alignment(*integers: int) -> int:
    """The largest power of two up to 16 that divides all ``integers``."""
    return math.gcd(16, *integers)


def matrices(*tensors: Tensor) -> None:
    """Check what every launcher asks of its (P, c) arguments.

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
    for t in tensors:
        if not t.is_inference():
            torch.autograd.graph.increment_version(t)


def empty(like: Tensor, *shape: int) -> Tensor:
    """A float32 workspace or result on the device of ``like``."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


# Elements of a tile. Pooling keeps several positions of each window in flight.
_ELEMENTS = {"map": 4096, "reduce": 2048, "pool": 2048, "pool_backward": 1024}


class LaunchTable:
    """Hand-reasoned launch configurations by operation, shape and architecture.

    No entry was tuned on a device. They follow from sizes and from what the audit finds
    in the machine code: elementwise tiles hold 16 or 32 elements a thread, enough loads
    in flight and no more; products keep a bottleneck of up to 128 columns in one tile, so
    that X is read once; of the tiles that then spill no registers, the largest that
    leaves room for two programs on a multiprocessor. AMD's compiler keeps pipelined
    loads in registers, so its backward gets one stage.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    def __call__(self, operation: str, like: Tensor, channels: int, bottleneck: int = 0) -> Launch:
        """The configuration of ``operation`` on matrices like ``like`` (P, channels).

        ``operation`` is "map" (elementwise), "reduce" (elementwise with column sums),
        "pool", "pool_backward", "product" or "product_backward".
        """
        if self.architecture.kind == "interpreter":
            return self._interpreter(channels, bottleneck)
        wide = like.dtype == torch.float32
        hip = self.architecture.kind == "hip"
        # where accesses are narrower than 128 bits, more addresses are in flight
        aligned = alignment(like.stride(0), channels) * like.element_size() >= 16
        programs = 2 * self.architecture.multiprocessors
        if operation in _ELEMENTS:
            # 128 bits a thread along the channels; thin column ranges (the k new ones)
            # get more rows instead
            block_c = power_of_two(channels, 16, 64 if wide else 128)
            elements = _ELEMENTS[operation] if aligned else max(512, _ELEMENTS[operation] // 4)
            if hip:
                # its warps have 64 lanes: 8 elements for each, so that a 16-bit type
                # still moves 128 bits
                elements = max(elements, 2048)
            # a range's loop is serial: hide latency with programs
            return Launch(elements // block_c, block_c, 16, 4, 1, 2 * programs)
        block_b = power_of_two(bottleneck, 16, 128)
        # Left alone, NVIDIA's assembler for these devices spills a few bytes of products to fit
        # one more program; given a limit for others, it spills where it would not.
        number = 0 if hip else self.architecture.number
        small = number in (86, 89, 120)
        registers = 255 if small or number == 100 else None
        if operation == "product":
            if wide:
                warps = 8 if block_b == 128 else 4
                return Launch(64, 16, block_b, warps, 2, registers=registers)
            if hip:
                return Launch(64, 32, block_b, 8, 2)
            warps = 8 if block_b == 128 else 4
            return Launch(128, 32, block_b, warps, 3, registers=registers)
        if operation == "product_backward":
            if wide or hip:
                if small:
                    # only the two launches of a bottleneck wider than a tile want the limit
                    registers = registers if bottleneck > 128 else None
                    return Launch(16, 64, block_b, 8, 1, programs, registers)
                return Launch(16 if wide else 64, 32, block_b, 4, 1, programs)
            if aligned and 90 <= self.architecture.number < 120:
                # their tensor cores take at least 64 rows
                return Launch(64, 64, block_b, 8, 2, programs)
            block_c = 64 if aligned else 32
            return Launch(32, block_c, block_b, 8 if block_b == 128 else 4, 2, programs)
        raise AssertionError(operation)

    def _interpreter(self, channels: int, bottleneck: int) -> Launch:
        # its cost is per program and hardly per element
        block_c = power_of_two(channels, 16, 128)
        return Launch(512, block_c, power_of_two(bottleneck, 16, 256), programs=4)


class SearchedLaunchTable(LaunchTable):
    """A launch table that times alternatives on the device it runs on, once per shape class.

    Opt-in (see TritonBackend): the first call for a class takes seconds, and which of
    two near-equal alternatives wins may differ from machine to machine, and with it the
    order of summation. The winner is written to ``directory`` in a file named by device
    and version, and read from there by later processes.
    """

    def __init__(
        self,
        architecture: Architecture,
        device_name: str,
        directory: Path,
        time: Callable[[Callable[[], Any]], Any] = triton.testing.do_bench,
    ) -> None:
        super().__init__(architecture)
        self.time = time
        name = re.sub(r"[^\w.]+", "-", device_name)
        self.file = directory / f"{name}-triton-{triton.__version__}-torch-{torch.__version__}.json"
        self.choices: dict[str, dict[str, int]] = {}
        with contextlib.suppress(OSError, ValueError):
            self.choices = json.loads(self.file.read_text())

    @staticmethod
    def shape_class(operation: str, like: Tensor, channels: int, bottleneck: int) -> str:
        """Shapes that share a choice: same type and alignment, sizes of one power of two."""
        rows, c, b = (power_of_two(n, 1, 1 << 40) for n in (like.shape[0], channels, bottleneck))
        dtype = str(like.dtype).removeprefix("torch.")
        return f"{operation}/{dtype}/{rows}x{c}x{b}/{alignment(like.stride(0), channels)}"

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
        if key in self.choices:
            return
        times: list[tuple[float, int, Launch]] = []
        for i, launch in enumerate(_neighbours(self(operation, like, channels, bottleneck))):
            # a tile too large for this device is no error, only not a candidate
            with contextlib.suppress(triton.runtime.errors.OutOfResources):
                times.append((float(self.time(partial(run, launch))), i, launch))
        best = min(times)[2]
        names = ("block_p", "block_c", "num_warps", "num_stages")
        self.choices[key] = {name: getattr(best, name) for name in names}
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
