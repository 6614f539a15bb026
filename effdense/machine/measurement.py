"""Time and peak memory of work, the latter in a process of its own.

NOTE [ what the baseline contains ]
Interpreter, imports, thread pools and what the libraries set up in a first training
step of a tiny network: a user pays that for any model. It is taken before the model is
built, so parameters count.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .memory import peak_resident_bytes, resident_bytes

# glibc raises this threshold as large blocks are freed, up to 32 MiB, and then keeps what
# is freed below it: peaks would depend on history. Fixed, freed tensors leave at once.
MMAP_THRESHOLD = "65536"


class Peak(NamedTuple):
    """Bytes at the start of some work, and the most over that while it was done."""

    baseline: int
    peak: int


def resident_peak(work: Callable[[], Any], warm_up: Callable[[], Any]) -> Peak:
    """Resident memory of this process; ``warm_up`` is a tiny case of the same ``work``.

    See NOTE [ what the baseline contains ]. An optimizer's constructor alone may import
    150 MiB of torch's compiler, which is not the memory of the network that comes after.
    """
    settle(warm_up)
    baseline = resident_bytes()
    work()
    return Peak(baseline, peak_resident_bytes() - baseline)


def settle(warm_up: Callable[[], Any], device: str = "cpu") -> None:
    """Bring this process to its baseline, and start its peak again from there."""
    warm_up()
    # wakes every thread of the pool, whose stacks count as resident
    torch.randn(1 << 18, device=device).add_(1).sum().item()
    gc.collect()
    # where the system doesn't let us, the peak of the warm-up stays
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def cuda_peak(work: Callable[[], Any], warm_up: Callable[[], Any], device: str) -> Peak:
    """Memory of a CUDA device that torch's allocator gave out."""
    torch.cuda.set_device(device)
    settle(warm_up, device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    baseline = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return Peak(baseline, torch.cuda.max_memory_allocated() - baseline)


def timed(function: Callable[[], Any], times: int, gpu: bool) -> float:
    """Seconds that ``times`` calls take: by CUDA events on a GPU, else by the clock."""
    if gpu:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(times):
            function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    for _ in range(times):
        function()
    return time.perf_counter() - begin


def ask_fresh_process(
    module: str, request: dict[str, Any], threads: int, path: Sequence[str] = ()
) -> dict[str, Any]:
    """What ``python -m module REQUEST`` answers, both JSON, the answer the last line it prints.

    Its death is an answer too: ``error``, ``out_of_memory``. See :func:`answer`.

    Args:
        module: calls :func:`answer`.
        request: the argument.
        threads: of OpenMP.
        path: folders before this process's own where modules are searched for.
    """
    env = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": MMAP_THRESHOLD,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-m", module, json.dumps(request)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return {
            "error": f"killed by {name}" + (", no memory left" if name == "SIGKILL" else ""),
            "out_of_memory": name == "SIGKILL",
        }
    lines = done.stdout.strip().splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"error": said[:300], "out_of_memory": "MemoryError" in said}
    return found


def answer(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """In the fresh process: print what ``measure`` makes of the request, or why it failed."""
    request = json.loads(sys.argv[1])
    try:
        found = measure(request)
    except (MemoryError, torch.OutOfMemoryError) as error:
        found = {"error": _first_line(error), "out_of_memory": True}
    except Exception as error:
        # torch has no type of its own for a failed allocation on CPU
        found = {"error": f"{type(error).__name__}: {_first_line(error)}"}
        found["out_of_memory"] = "allocate" in str(error).lower()
    print(json.dumps(found), flush=True)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
