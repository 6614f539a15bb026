"""Tile sizes, warps and splits over rows, by operation, shape and architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from effdense.kernels.layouts import alignment, cdiv, pad, power_of_two


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
