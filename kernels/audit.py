"""What the compilers make of the kernels, on a machine without a GPU.

``python -m effdense.kernels.audit`` cross-compiles every kernel, in every launch
configuration and type, for NVIDIA and AMD devices, and reads the machine code. It proves
nothing about speed. It does prove that nothing spills, that each configuration fits its
device's shared memory, that 16-bit products run on tensor cores, and that matrices move
128 bits at a time where their strides allow it.

The launchers themselves are called, on tensors without memory, with a launch that notes
what it was to start; so the audit cannot drift from what a device would run.
"""

from __future__ import annotations

import argparse
import importlib
import math
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effdense.backends.base import Normalization
from effdense.kernels import (
    bn_relu,
    bn_relu_conv1x1,
    bn_relu_conv1x1_backward,
    bn_relu_pool,
    finish_gradient,
    statistics,
)
from effdense.kernels.launch import Architecture, Launch, LaunchTable, interpreted

KIB = 1024


class Device(NamedTuple):
    """A compilation target, its shared memory per program and its multiprocessors."""

    target: GPUTarget
    shared_limit: int
    architecture: Architecture


DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 163 * KIB, Architecture("cuda", 80, 108)),
    "sm_86": Device(GPUTarget("cuda", 86, 32), 99 * KIB, Architecture("cuda", 86, 84)),
    "sm_89": Device(GPUTarget("cuda", 89, 32), 99 * KIB, Architecture("cuda", 89, 128)),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 227 * KIB, Architecture("cuda", 90, 132)),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 227 * KIB, Architecture("cuda", 100, 148)),
    "sm_120": Device(GPUTarget("cuda", 120, 32), 99 * KIB, Architecture("cuda", 120, 170)),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 64 * KIB, Architecture("hip", 0, 304)),
}
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Shape(NamedTuple):
    """A layer of a block: rows, prefix width, buffer width, growth rate, bottleneck width."""

    name: str
    rows: int
    c: int
    width: int
    k: int
    bottleneck: int


SHAPES = (
    # DenseNet-BC, k 24, depth 250: widths are multiples of 8
    Shape("k24", 32 * 32 * 64, 528, 1032, 24, 96),
    # k 48: multiples of 16, and a bottleneck of more than one tile
    Shape("k48", 14 * 14 * 64, 672, 2112, 48, 192),
    # k 12, depth 100: multiples of 4, too few for 128 bits of a 16-bit type
    Shape("k12", 32 * 32 * 64, 108, 216, 12, 48),
    # nothing is a multiple of anything
    Shape("odd", 7 * 7 * 13, 37, 101, 5, 17),
)


class Call(NamedTuple):
    """One kernel start, as the JIT would see it."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    options: dict[str, int]

    def key(self) -> str:
        return repr(tuple(self))


@dataclass(frozen=True)
class RecordingLaunch(Launch):
    """A launch that notes calls instead of making them."""

    calls: list[Call] = field(default_factory=list)

    def start(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        options = self.options()
        options |= {name: constants.pop(name) for name in tuple(options) if name in constants}
        signature: dict[str, str] = {}
        divisible = []
        for name, value in zip(kernel.arg_names, args, strict=False):
            if isinstance(value, Tensor):
                signature[name] = POINTERS[value.dtype]
                if value.storage_offset() * value.element_size() % 16 == 0:
                    divisible.append(name)
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
        signature |= dict.fromkeys(constants, "constexpr")
        assert set(signature) == set(kernel.arg_names), (kernel.__name__, list(signature))
        signature = {name: signature[name] for name in kernel.arg_names}
        module = kernel.fn.__module__
        call = Call(module, kernel.__name__, signature, constants, tuple(divisible), options)
        self.calls.append(call)


class Operation(NamedTuple):
    """A launcher on a shape, its entry of the launch table, and its cost by formula.

    ``bytes`` and ``flops`` are per element of X's (P, c) operand; ``bytes`` takes the
    element's size.
    """

    name: str
    table: str
    columns: Callable[[Shape], int]
    bytes: Callable[[Shape, int], float]
    flops: Callable[[Shape], float]
    run: Callable[[Shape, torch.dtype, Launch], Any]


def _matrix(rows: int, columns: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, width, dtype=dtype, device="meta")[:, :columns]


def _norm(c: int) -> Normalization:
    return Normalization(*torch.empty(4, c, device="meta"), eps=1e-5)


def _prefix(s: Shape) -> int:
    return s.c


def _growth(s: Shape) -> int:
    return s.k


def _operations() -> list[Operation]:
    """Every launcher in every mode the dense block uses."""

    def x(s: Shape, t: torch.dtype) -> Tensor:
        return _matrix(s.rows, s.c, s.width, t)

    def dense(s: Shape, t: torch.dtype, columns: int) -> Tensor:
        return _matrix(s.rows, columns, columns, t)

    def new(s: Shape, t: torch.dtype) -> Tensor:
        # the k columns a layer writes lie at any multiple of k
        return torch.empty(s.rows, s.width, dtype=t, device="meta")[:, s.c - s.k : s.c]

    def image(s: Shape, dims: int) -> tuple[int, ...]:
        return {1: (s.rows // 49, 49), 2: (s.rows // 49, 7, 7), 3: (s.rows // 49, 7, 7, 1)}[dims]

    def pooled(s: Shape, t: torch.dtype, dims: int) -> Tensor:
        shape = image(s, dims)
        return dense(s._replace(rows=shape[0] * math.prod(n // 2 for n in shape[1:])), t, s.c)

    def conv(s: Shape, t: torch.dtype, g: Launch, stats: bool) -> Any:
        w = _matrix(s.bottleneck, s.c, s.c, t)
        out = dense(s, t, s.bottleneck)
        return bn_relu_conv1x1.bn_relu_conv1x1(x(s, t), _norm(s.c), w, out, stats, g)

    def conv_backward(s: Shape, t: torch.dtype, g: Launch, need: bool) -> Any:
        w = _matrix(s.bottleneck, s.c, s.c, t)
        dy = dense(s, t, s.bottleneck)
        run = bn_relu_conv1x1_backward.bn_relu_conv1x1_backward
        return run(x(s, t), _norm(s.c), w, dy, x(s, t), need, g)

    def finish(s: Shape, t: torch.dtype, g: Launch) -> Any:
        v = torch.empty(3, s.k, device="meta")
        d, out = new(s, t), dense(s, t, s.k)
        return finish_gradient.finish_gradient(d, new(s, t), *v, 1.0, out, g)

    def apply(s: Shape, t: torch.dtype, g: Launch, correct: bool) -> Any:
        v = torch.empty(2, s.bottleneck, device="meta")
        y, dz = dense(s, t, s.bottleneck), dense(s, t, s.bottleneck)
        correction = (v[0], v[1], 1.0) if correct else None
        return bn_relu.bn_relu_backward_apply(y, _norm(s.bottleneck), dz, correction, g)

    def avg(s: Shape, t: torch.dtype, g: Launch, dims: int) -> Any:
        shape, out = image(s, dims), pooled(s, t, dims)
        rows = s._replace(rows=math.prod(shape))
        return bn_relu_pool.bn_relu_avg_pool(x(rows, t), _norm(s.c), shape, out, g)

    def avg_backward(s: Shape, t: torch.dtype, g: Launch, dims: int) -> Any:
        shape, out = image(s, dims), pooled(s, t, dims)
        rows = s._replace(rows=math.prod(shape))
        run = bn_relu_pool.bn_relu_avg_pool_backward
        return run(x(rows, t), _norm(s.c), shape, out, dense(rows, t, s.c), out, g)

    def global_(s: Shape, t: torch.dtype, g: Launch) -> Any:
        out = _matrix(s.rows // 49, s.c, s.c, t)
        return bn_relu_pool.bn_relu_global_pool(x(s, t), _norm(s.c), s.rows // 49, out, g)

    def global_backward(s: Shape, t: torch.dtype, g: Launch) -> Any:
        out = _matrix(s.rows // 49, s.c, s.c, t)
        run = bn_relu_pool.bn_relu_global_pool_backward
        return run(x(s, t), _norm(s.c), s.rows // 49, out, dense(s, t, s.c), g)

    def reduce(s: Shape, t: torch.dtype, g: Launch, accumulate: bool) -> Any:
        d = x(s, t) if accumulate else None
        run = bn_relu.bn_relu_backward_reduce
        return run(x(s, t), _norm(s.c), dense(s, t, s.c), d, g)

    def forward(s: Shape, t: torch.dtype, g: Launch) -> Any:
        return bn_relu.bn_relu(x(s, t), _norm(s.c), dense(s, t, s.c), g)

    def per(s: Shape) -> float:
        return s.bottleneck / s.c

    tiles = {dims: 1 / 2**dims for dims in (1, 2, 3)}
    found = [
        Operation(
            *("statistics of new channels", "reduce", _growth, lambda s, e: e, lambda s: 6),
            lambda s, t, g: statistics.statistics(new(s, t), g),
        ),
        Operation(
            *("statistics of a prefix", "reduce", _prefix, lambda s, e: e, lambda s: 6),
            lambda s, t, g: statistics.statistics(x(s, t), g),
        ),
        Operation("BN-ReLU", "map", _prefix, lambda s, e: 2 * e, lambda s: 3, forward),
        Operation(
            *("BN-ReLU sums", "reduce", _prefix, lambda s, e: 2 * e, lambda s: 8),
            partial(reduce, accumulate=False),
        ),
        Operation(
            *("BN-ReLU accumulate", "reduce", _prefix, lambda s, e: 4 * e, lambda s: 10),
            partial(reduce, accumulate=True),
        ),
        *(
            Operation(
                f"BN-ReLU input gradient{name}",
                *("map", lambda s: s.bottleneck, lambda s, e: 3 * e),
                *(lambda s, cost=cost: cost, partial(apply, correct=correct)),
            )
            for name, correct, cost in (("", True, 9), (", frozen", False, 4))
        ),
        Operation("finish gradient", "map", _growth, lambda s, e: 3 * e, lambda s: 6, finish),
        Operation(
            *("BN-ReLU-Conv1x1 + statistics", "product", _prefix),
            lambda s, e: e * (1 + per(s)),
            lambda s: 3 + 2 * s.bottleneck,
            partial(conv, stats=True),
        ),
        Operation(
            *("BN-ReLU-Conv1x1", "product", _prefix),
            lambda s, e: e * (1 + per(s)),
            lambda s: 3 + 2 * s.bottleneck,
            partial(conv, stats=False),
        ),
        Operation(
            *("BN-ReLU-Conv1x1 backward", "product_backward", _prefix),
            # a bottleneck of several tiles reads X again for each tile of dW
            lambda s, e: e * (3 + per(s) + (s.bottleneck > 128) * -(-s.bottleneck // 128)),
            lambda s: 10 + 4 * s.bottleneck,
            partial(conv_backward, need=True),
        ),
        Operation(
            *("BN-ReLU-Conv1x1 backward, no dW", "product_backward", _prefix),
            lambda s, e: e * (3 + per(s)),
            lambda s: 10 + 2 * s.bottleneck,
            partial(conv_backward, need=False),
        ),
        Operation("BN-ReLU-GlobalPool", "map", _prefix, lambda s, e: e, lambda s: 4, global_),
        Operation(
            *("BN-ReLU-GlobalPool backward", "reduce", _prefix, lambda s, e: 2 * e),
            *(lambda s: 9, global_backward),
        ),
    ]
    for dims in (1, 2, 3):
        found.append(
            Operation(
                *(f"BN-ReLU-AvgPool {dims}-D", "pool", _prefix),
                lambda s, e, dims=dims: e * (1 + tiles[dims]),
                lambda s: 4,
                partial(avg, dims=dims),
            )
        )
        found.append(
            Operation(
                *(f"BN-ReLU-AvgPool {dims}-D backward", "pool_backward", _prefix),
                lambda s, e, dims=dims: e * (2 + 2 * tiles[dims]),
                lambda s: 10,
                partial(avg_backward, dims=dims),
            )
        )
    return found


class Job(NamedTuple):
    """A call to compile for a device, and what is expected of it."""

    device: str
    dtype: str
    shape: str
    operation: str
    call: Call
    bytes: float
    flops: float


class Finding(NamedTuple):
    """What was found in a job's machine code; ``faults`` is empty where all is well."""

    job: Job
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: str
    loads: int
    stores: int
    faults: tuple[str, ...]


# kernels that write whole matrices, so that wide stores can be asked of them
WRITES_MATRIX = re.compile(
    r"bn_relu_fwd|apply|finish_gradient|conv1x1_fwd|conv1x1_bwd|avg_pool|global_pool_bwd"
)


def jobs(devices: Sequence[str], dtypes: Sequence[str], shapes: Sequence[str]) -> Iterator[Job]:
    """Every distinct compilation of the given devices, types and shapes."""
    seen = set()
    for device in devices:
        table = LaunchTable(DEVICES[device].architecture)
        for dtype in dtypes:
            for shape in SHAPES:
                if shape.name not in shapes:
                    continue
                for operation in _operations():
                    # the switch that torch itself offers for float32 products
                    for tf32 in (False, True) if dtype == "fp32" else (False,):
                        columns = operation.columns(shape)
                        like = _matrix(shape.rows, columns, shape.width, DTYPES[dtype])
                        chosen = table(operation.table, like, columns, shape.bottleneck)
                        launch = RecordingLaunch(**vars(chosen))
                        _with_tf32(tf32, operation.run, shape, DTYPES[dtype], launch)
                        for call in launch.calls:
                            if (device, call.key()) in seen:
                                continue
                            seen.add((device, call.key()))
                            cost = operation.bytes(shape, like.element_size())
                            flops = operation.flops(shape)
                            yield Job(
                                *(device, dtype, shape.name, operation.name, call, cost, flops)
                            )


def _with_tf32(tf32: bool, run: Callable[..., Any], *args: Any) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        run(*args)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def compile_call(call: Call, device: Device) -> Any:
    """The compiled kernel of ``call``, with the attributes the JIT would infer."""
    kernel = getattr(importlib.import_module(call.module), call.kernel)
    attributes = [["tt.divisibility", 16]]
    if device.target.backend == "hip":
        # what is inferred for storages of less than 2 GiB
        attributes.append(["tt.pointer_range", 32])
    attrs = {(kernel.arg_names.index(name),): attributes for name in call.divisible}
    constants = {(kernel.arg_names.index(name),): v for name, v in call.constants.items()}
    source = ASTSource(kernel, call.signature, constants, attrs)
    return triton.compile(source, target=device.target, options=call.options)


def examine(job: Job) -> Finding:
    """Compile a job and read its machine code."""
    device = DEVICES[job.device]
    compiled = compile_call(job.call, device)
    shared = compiled.metadata.shared
    if device.target.backend == "cuda":
        found = _examine_cuda(compiled.asm["cubin"])
    else:
        found = _examine_hip(compiled.asm["amdgcn"])
    registers, stack, spills, matrix, loads, stores = found
    faults = []
    if stack or spills:
        faults.append("spills")
    if shared > device.shared_limit:
        faults.append("shared memory")
    constants = job.call.constants
    product = "DOT" in constants
    if product and job.dtype != "fp32" and not matrix:
        faults.append("no tensor cores")
    if wide_accesses_expected(job):
        if not loads:
            faults.append("no 128-bit loads")
        if WRITES_MATRIX.search(job.call.kernel) and not (stores or _stores_from_mfma(job)):
            faults.append("no 128-bit stores")
    return Finding(job, registers, stack, spills, shared, matrix, loads, stores, tuple(faults))


def _stores_from_mfma(job: Job) -> bool:
    """Whether 64-bit stores are the compiler's own choice.

    AMD's writes a product from the layout in which the matrix unit leaves it, four
    neighbours a lane, rather than turn it round in shared memory. That is 64 bits of a
    16-bit type, whatever the configuration.
    """
    return job.device == "gfx942" and job.dtype != "fp32" and "DOT" in job.call.constants


def wide_accesses_expected(job: Job) -> bool:
    """Whether strides and pointers of all matrices allow 128-bit accesses."""
    size = 2 if any(t in ("*fp16", "*bf16") for t in job.call.signature.values()) else 4
    constants = job.call.constants
    aligned = min(constants.get("ALIGN", 1), constants.get("ALIGN_B", 16)) * size >= 16
    pointers = {name for name, t in job.call.signature.items() if t.startswith("*")}
    return aligned and pointers == set(job.call.divisible)


def _examine_cuda(cubin: bytes) -> tuple[int, int, int, str, int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            command = [str(tool), option, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage, sass = dump("-res-usage"), dump("-sass")
    registers, stack = (
        int(m.group(1)) if (m := re.search(rf"{name}:(\d+)", usage)) else -1
        for name in ("REG", "STACK")
    )
    assert registers > 0, usage
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    matrix = re.search(r"\b(UTC\w*MMA|HGMMA|HMMA)\b", sass)
    loads = len(re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*128|\bUTMALDG|\bUBLKCP", sass))
    stores = len(re.findall(r"\bSTG\.[\w.]*128|\bUTMASTG", sass))
    return registers, stack, spills, matrix.group(1) if matrix else "", loads, stores


def _examine_hip(assembly: str) -> tuple[int, int, int, str, int, int]:
    def value(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly).group(1))  # type: ignore[union-attr]

    matrix = re.search(r"\b(v_s?mfma)_", assembly)
    loads = len(re.findall(r"\b(?:global|buffer)_load_dwordx4", assembly))
    stores = len(re.findall(r"\b(?:global|buffer)_store_dwordx4", assembly))
    found = matrix.group(1) if matrix else ""
    # a scalar register that "spills" moves to a lane of a vector register; memory is
    # touched only where the scratch segment has a size
    stack, spills = value("private_segment_fixed_size"), value("vgpr_spill_count")
    return value("vgpr_count"), stack, spills, found, loads, stores


def audit(work: Sequence[Job], processes: int = 2) -> Iterator[Finding]:
    """Findings of all jobs, in their order."""
    if processes == 1:
        yield from map(examine, work)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(examine, work, chunksize=4)


COLUMNS = (
    *("kernel", "for", "type", "shape", "tile", "warps", "regs", "stack", "spills"),
    *("shared/limit", "matrix", "ld128", "st128", "B/elem", "FLOP/elem", "verdict"),
)


def row(finding: Finding) -> tuple[str, ...]:
    """A line of the table; a dash where none was found."""
    job = finding.job
    c = job.call.constants
    tile = "x".join(str(c[name]) for name in ("BT", "BP", "BC", "BB", "BM") if name in c)
    shared = f"{finding.shared}/{DEVICES[job.device].shared_limit}"
    dtype = f"{job.dtype}/{c['PRECISION']}" if job.dtype == "fp32" and "DOT" in c else job.dtype
    return (
        *(job.call.kernel.removesuffix("_kernel"), job.device, dtype, job.shape, tile),
        *(str(job.call.options["num_warps"]), str(finding.registers), str(finding.stack)),
        *(str(finding.spills), shared, finding.matrix or "-"),
        *(str(finding.loads or "-"), str(finding.stores or "-")),
        *(f"{job.bytes:.3g}", f"{job.flops:.3g}", ", ".join(finding.faults) or _passed(finding)),
    )


def _passed(finding: Finding) -> str:
    if not wide_accesses_expected(finding.job):
        return "ok, unaligned"
    if WRITES_MATRIX.search(finding.job.call.kernel) and not finding.stores:
        return "ok, 64-bit stores (MFMA layout)"
    return "ok"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, return 1 where anything was found wrong."""
    parser = argparse.ArgumentParser(prog="python -m effdense.kernels.audit", description=__doc__)
    parser.add_argument("--devices", nargs="+", choices=tuple(DEVICES), default=tuple(DEVICES))
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    names = tuple(shape.name for shape in SHAPES)
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--kernels", default="", help="regular expression that kernels match")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    if interpreted(statistics.statistics_fwd_kernel):
        parser.error("nothing is compiled under the interpreter: unset TRITON_INTERPRET")
    work = [
        job
        for job in jobs(options.devices, options.dtypes, options.shapes)
        if re.search(options.kernels, job.call.kernel)
    ]
    form = "{:29} {:7} {:9} {:5} {:12} {:>5} {:>4} {:>5} {:>6} {:>13} {:>8}"
    form += " {:>5} {:>5} {:>6} {:>9}  {}"
    print(form.format(*COLUMNS))
    faulty = 0
    for finding in audit(work, options.processes):
        print(form.format(*row(finding)), flush=True)
        faulty += bool(finding.faults)
    print("B/elem, FLOP/elem: of the whole operation, per element of X, by formula")
    print(f"{len(work)} compilations, {faulty} with faults")
    return int(faulty > 0)


if __name__ == "__main__":
    sys.exit(main())
