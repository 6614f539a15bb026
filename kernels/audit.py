"""What the compilers make of the kernels, on a machine without a GPU.

``python -m effdense.kernels.audit`` cross-compiles every kernel, in every launch
configuration and type, for NVIDIA and AMD devices, and reads the machine code. It proves
nothing about speed. It does prove that nothing spills, that each configuration fits its
device's shared memory, that 16-bit products run on tensor cores, and that matrices move
128 bits at a time where their strides allow it.

What was found is kept (``$XDG_CACHE_HOME``, else ~/.cache, "effdense/audit"): an audit that is
interrupted goes on where it was, and after a change only what it touches is compiled.

What is compiled is in audited.py.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from effdense.kernels import statistics
from effdense.kernels.audited import DEVICES, DTYPES, SHAPES, RecordingLauncher, operations
from effdense.kernels.launch import interpreted
from effdense.kernels.launch_table import LaunchTable
from effdense.kernels.machine_code import Call, MachineCode, Record, compile_call, key_of, read
from effdense.machine.environment import cache_folder


class Job(NamedTuple):
    """A call to compile for a device, and what is expected of it.

    ``fill`` is programs per multiprocessor, the least of all shapes that start it.
    """

    device: str
    dtype: str
    shape: str
    operation: str
    call: Call
    bytes: float
    flops: float
    fill: float
    strict: bool


class Finding(NamedTuple):
    """What was found in a job's machine code; ``faults`` is empty where all is well."""

    job: Job
    code: MachineCode
    faults: tuple[str, ...]


# kernels that write whole matrices, so that wide stores can be asked of them; a mask of few rows
# has too few elements for a wave of programs with wide stores
WRITES_MATRIX = re.compile(
    r"bn_relu_fwd|apply|finish_gradient|conv1x1_fwd|conv1x1_bwd|conv3_bwd_input|avg_pool|"
    r"global_pool_bwd"
)


# what reads elements that lie apart, or no matrix
GATHERS = re.compile(r"pack|dropout_mask")
# passes over weights and partial results, whose work does not grow with rows times columns
SMALL = re.compile(r"sums|combine|pack")


def jobs(devices: Sequence[str], dtypes: Sequence[str], shapes: Sequence[str]) -> list[Job]:
    """Every distinct compilation of the given devices, types and shapes."""
    found: dict[tuple[str, str], Job] = {}
    for device in devices:
        architecture = DEVICES[device].architecture
        for dtype in dtypes:
            # the switch that torch itself offers for float32 products
            for precision in ("ieee", "tf32") if dtype == "fp32" else ("ieee",):
                launcher = RecordingLauncher(LaunchTable(architecture), precision)
                for shape in SHAPES:
                    if shape.name not in shapes:
                        continue
                    for operation in operations():
                        whole = shape._replace(c=shape.width) if operation.tail else shape
                        launcher.calls.clear()
                        operation.run(whole, DTYPES[dtype], launcher)
                        size = DTYPES[dtype].itemsize
                        for call, programs in launcher.calls:
                            fill = programs / architecture.multiprocessors
                            strict = shape.strict and not operation.small
                            job = Job(
                                *(device, dtype, f"{shape.name}-{shape.block}", operation.name),
                                *(call, operation.bytes(whole, size), operation.flops(whole)),
                                *(fill, strict),
                            )
                            key = device, call.key()
                            before = found.setdefault(key, job)
                            if strict and (not before.strict or fill < before.fill):
                                found[key] = job
    return list(found.values())


def measure(job: Job) -> MachineCode:
    """Compile a job and read its machine code."""
    target = DEVICES[job.device].target
    return read(compile_call(job.call, target), target)


def judge(job: Job, code: MachineCode) -> Finding:
    """What of a job's machine code is not as it should be."""
    device, faults = DEVICES[job.device], []
    if code.stack or code.spills:
        faults.append("spills")
    if code.shared > device.shared_limit:
        faults.append("shared memory")
    constants = job.call.constants
    product = "DOT" in constants
    if product and job.dtype != "fp32" and not code.matrix:
        faults.append("no tensor cores")
    # a matrix unit takes no tile smaller than this
    smallest = constants.get("BP") == constants.get("BK") == 16
    if job.strict and job.fill < 1 and not (smallest or SMALL.search(job.call.kernel)):
        faults.append("less than a wave")
    wide = wide_accesses_expected(job)
    # partial results have rows of any width, and lie in the L2 cache
    if job.strict and job.call.matrices and not wide and not GATHERS.search(job.call.kernel):
        faults.append("unaligned")
    if wide:
        if not code.loads and not GATHERS.search(job.call.kernel):
            faults.append("no 128-bit loads")
        written = code.stores or _stores_from_mfma(job)
        if WRITES_MATRIX.search(job.call.kernel) and not written:
            faults.append("no 128-bit stores")
    return Finding(job, code, tuple(faults))


def _stores_from_mfma(job: Job) -> bool:
    """Whether 64-bit stores are the compiler's own choice.

    AMD's writes a product from the layout in which the matrix unit leaves it, four
    neighbours a lane, rather than turn it round in shared memory. That is 64 bits of a
    16-bit type, whatever the configuration.
    """
    return job.device == "gfx942" and job.dtype != "fp32" and "DOT" in job.call.constants


def wide_accesses_expected(job: Job) -> bool:
    """Whether strides and addresses of X, D, Y and their gradients allow 128-bit accesses."""
    size = 2 if any(t in ("*fp16", "*bf16") for t in job.call.signature.values()) else 4
    constants = job.call.constants
    aligned = min(constants.get(name, 16) for name in ("ALIGN", "ALIGN_B")) * size >= 16
    return aligned and set(job.call.matrices) <= set(job.call.divisible)


def audit(work: Sequence[Job], record: Record, processes: int = 2) -> Iterator[Finding]:
    """Findings of all jobs, in their order; ``record`` has or gets what was found."""
    keys = [key_of(job.call, DEVICES[job.device].target) for job in work]
    missing = {k: job for k, job in zip(keys, work, strict=True) if record.get(k) is None}
    with contextlib.ExitStack() as stack:
        measured: Iterator[MachineCode] = map(measure, missing.values())
        if processes > 1 and missing:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes))
            measured = pool.imap(measure, missing.values(), chunksize=4)
        for job, key in zip(work, keys, strict=True):
            code = record.get(key)
            if code is None:
                code = next(measured)
                record.add(key, code)
            yield judge(job, code)


COLUMNS = (
    *("kernel", "for", "type", "shape", "tile", "warps", "regs", "stack", "spills"),
    *("shared/limit", "matrix", "ld128", "st128", "B/elem", "FLOP/elem", "fill", "verdict"),
)


def row(finding: Finding) -> tuple[str, ...]:
    """A line of the table; a dash where none was found."""
    job, code = finding.job, finding.code
    c = job.call.constants
    tile = "x".join(str(c[name]) for name in ("BT", "BP", "BC", "BK", "BB", "BM") if name in c)
    shared = f"{code.shared}/{DEVICES[job.device].shared_limit}"
    dtype = f"{job.dtype}/{c['PRECISION']}" if job.dtype == "fp32" and "DOT" in c else job.dtype
    return (
        *(job.call.kernel.removesuffix("_kernel"), job.device, dtype, job.shape, tile),
        *(str(job.call.options["num_warps"]), str(code.registers), str(code.stack)),
        *(str(code.spills), shared, code.matrix or "-"),
        *(str(code.loads or "-"), str(code.stores or "-")),
        *(f"{job.bytes:.3g}", f"{job.flops:.3g}", f"{job.fill:.2g}"),
        ", ".join(finding.faults) or _passed(finding),
    )


def _passed(finding: Finding) -> str:
    if finding.job.call.matrices and not wide_accesses_expected(finding.job):
        return "ok, unaligned"
    if WRITES_MATRIX.search(finding.job.call.kernel) and not finding.code.stores:
        return "ok, 64-bit stores (MFMA layout)"
    return "ok"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, return 1 where anything was found wrong."""
    parser = argparse.ArgumentParser(prog="python -m effdense.kernels.audit", description=__doc__)
    parser.add_argument("--devices", nargs="+", choices=tuple(DEVICES), default=tuple(DEVICES))
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    names = tuple(dict.fromkeys(shape.name for shape in SHAPES))
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
    form += " {:>5} {:>5} {:>6} {:>9} {:>5}  {}"
    print(form.format(*COLUMNS))
    faulty = 0
    record = Record(cache_folder("audit") / "findings.jsonl")
    for finding in audit(work, record, options.processes):
        print(form.format(*row(finding)), flush=True)
        faulty += bool(finding.faults)
    print("B/elem, FLOP/elem: of the whole operation, per element of X, by formula")
    print(
        "fill: programs per multiprocessor, at the smallest of the shapes of the README's networks"
    )
    print(f"{len(work)} compilations, {faulty} with faults")
    return int(faulty > 0)


if __name__ == "__main__":
    sys.exit(main())
