"""Time and peak memory of work, in a process of its own: of a training step above all.

For the library's commands, the benchmarks and the tests alike: :func:`in_fresh_process` calls a
function there, and :func:`measure_training` is what such a function measures a training by.

NOTE [ what the baseline contains ]
Interpreter, imports, thread pools and what the libraries set up in a first training
step of a tiny network: a user pays that for any model. It is taken before the model is
built, so parameters count.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ..errors import first_line
from .memory import peak_resident_bytes, resident_bytes, volunteer_for_the_oom_killer

# glibc raises this threshold as large blocks are freed, up to 32 MiB, and then keeps what
# is freed below it: peaks would depend on history. Fixed, freed tensors leave at once.
MMAP_THRESHOLD = "65536"


class Peak(NamedTuple):
    """Bytes at the start of some work, and the most over that while it was done."""

    baseline: int
    peak: int


class Trainable(Protocol):
    """A network, its optimizer and a batch, such as effdense.memory.timeline.Training."""

    def make_optimizer_state(self) -> None:
        """Give the optimizer the state it has after a first step."""

    def step(self) -> None:
        """One training step."""


def measure_training(
    build: Callable[[], Trainable],
    warm_up: Callable[[], Any],
    *,
    device: str = "cpu",
    steps: int = 1,
    samples: int = 0,
) -> dict[str, Any]:
    """``peak`` bytes over ``baseline`` of building and ``steps``, then ``samples`` of ``seconds``.

    The optimizer's state is there from the beginning, as in every step but a training's first.
    ``warm_up`` is a tiny case of the same work: see NOTE [ what the baseline contains ].
    """
    built: list[Trainable] = []

    def train() -> None:
        training = build()
        built.append(training)
        training.make_optimizer_state()
        for _ in range(steps):
            training.step()

    found = peak_memory(train, warm_up, device)._asdict()
    gpu, step = device != "cpu", built[0].step
    # on a GPU a step may be shorter than its start
    times = max(1, int(0.2 / max(timed(step, 1, device), 1e-3))) if samples and gpu else 1
    return {**found, "seconds": [timed(step, times, device) / times for _ in range(samples)]}


def peak_memory(work: Callable[[], Any], warm_up: Callable[[], Any], device: str = "cpu") -> Peak:
    """Resident memory of this process, or what torch's allocator gave out on a CUDA device.

    See NOTE [ what the baseline contains ] of ``warm_up``. An optimizer's constructor alone may
    import 150 MiB of torch's compiler, which is not the memory of the network that comes after.
    """
    if device == "cpu":
        _settle(warm_up, device)
        baseline = resident_bytes()
        work()
        return Peak(baseline, peak_resident_bytes() - baseline)
    # of any index, or none
    with torch.cuda.device(device):
        _settle(warm_up, device)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        baseline = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return Peak(baseline, torch.cuda.max_memory_allocated() - baseline)


def _settle(warm_up: Callable[[], Any], device: str) -> None:
    """Bring this process to its baseline, and start its peak again from there."""
    warm_up()
    # wakes every thread of the pool, whose stacks count as resident
    torch.randn(1 << 18, device=device).add_(1).sum().item()
    gc.collect()
    # where the system doesn't let us, the peak of the warm-up stays
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def timed(function: Callable[[], Any], times: int, device: torch.device | str) -> float:
    """Seconds that ``times`` calls take: by CUDA events where ``device`` is a GPU, or the clock."""
    if torch.device(device).type != "cpu":
        # events are of the current device, on which the work need not be
        with torch.cuda.device(device):
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


def fresh_process(function: Callable[..., Any], threads: int, **arguments: Any) -> list[str]:
    """The command line of a process that prints what ``function(**arguments)`` returns."""
    name = f"{function.__module__}:{function.__qualname__}"
    return [sys.executable, "-m", __name__, name, str(threads), json.dumps(arguments)]


def process_environment(threads: int) -> dict[str, str]:
    """Its environment variables: the same modules as here, so many OpenMP threads, plain malloc."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(threads)}


def in_fresh_process(
    function: Callable[..., dict[str, Any]], threads: int, **arguments: Any
) -> dict[str, Any]:
    """What ``function(**arguments)`` returns in a process of its own.

    Its death is an answer too: ``error``, ``out_of_memory``.

    Args:
        function: of a module, importable there as here; its result goes through JSON.
        threads: of torch and OpenMP.
        arguments: whatever goes through JSON.
    """
    env = process_environment(threads) | {"MALLOC_MMAP_THRESHOLD_": MMAP_THRESHOLD}
    command = fresh_process(function, threads, **arguments)
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
        said = first_line(
            (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        )
        return {"error": said, "out_of_memory": "MemoryError" in said}
    return found


def _answer(name: str, threads: str, arguments: str) -> None:
    """In the fresh process: print what the function returns, or why it failed."""
    volunteer_for_the_oom_killer()
    torch.set_num_threads(int(threads))
    module, _, path = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), path)(**json.loads(arguments))
    except (MemoryError, torch.OutOfMemoryError) as error:
        found = {"error": first_line(error), "out_of_memory": True}
    except Exception as error:
        # torch has no type of its own for a failed allocation on CPU
        found = {"error": f"{type(error).__name__}: {first_line(error)}"}
        found["out_of_memory"] = "allocate" in str(error).lower()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _answer(*sys.argv[1:])
