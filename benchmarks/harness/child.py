"""A fresh process that measures one provider's memory on one case.

Run as ``python -m harness.child REQUEST`` by :mod:`harness.measure`, where REQUEST and
the last line of output are JSON. To check a figure with another tool, run the same
command under it: ``baseline + peak`` is the process's largest resident size.

NOTE [ what the baseline contains ]
Interpreter, imports, thread pools and what the libraries set up in a first training
step of a tiny network: a user pays that for any model. It is taken before the model is
built, so parameters count.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import time
from typing import Any

import torch

from effdense import timeline

from . import grid, machine, packages, providers
from .case import CIFAR_FAMILY, Case
from .worker import timed


def main() -> None:
    request = json.loads(sys.argv[1])
    machine.volunteer_for_the_oom_killer()
    torch.set_num_threads(request["threads"])
    try:
        if request["mode"] == "grid":
            answer = _grid(grid.from_request(request["configuration"]), request.get("timed", 0))
        else:
            modes = {"resident": _resident, "live": _live, "cuda": _cuda}
            modes |= {"inference": _inference, "package times": _package_times}
            answer = modes[request["mode"]](request, Case(**request["case"]))
    except (MemoryError, torch.OutOfMemoryError) as error:
        answer = {"error": _first_line(error), "out_of_memory": True}
    except Exception as error:
        # torch has no type of its own for a failed allocation on CPU
        refused = "can't allocate memory" in str(error) or "allocate" in str(error).lower()
        answer = {"error": f"{type(error).__name__}: {_first_line(error)}"}
        answer["out_of_memory"] = refused
    print(json.dumps(answer), flush=True)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def _warm_up(request: dict[str, Any], case: Case) -> None:
    """One step of a tiny network of the same provider.

    See NOTE [ what the baseline contains ]. An optimizer's constructor alone may import
    150 MiB of torch's compiler, which is not the memory of the network that comes after.
    """
    if case.arch in packages.MODELS:
        # its imports count as the interpreter's
        packages.setup(request["provider"], dataclasses.replace(case, batch_size=2)).step()
    else:
        tiny = Case(CIFAR_FAMILY, 10, 4, 2, 8, case.dtype, case.device)
        providers.setup(request["provider"], tiny).step()
    # wakes every thread of the pool, whose stacks count as resident
    torch.randn(1 << 18, device=case.device).add_(1).sum().item()
    gc.collect()


def _setup(provider: str, case: Case) -> timeline.Training:
    if case.arch in packages.MODELS:
        return packages.setup(provider, case)
    return providers.setup(provider, case)


def _limit(request: dict[str, Any]) -> None:
    if request.get("memory_limit"):
        machine.limit_memory(request["memory_limit"])


def _resident(request: dict[str, Any], case: Case) -> dict[str, Any]:
    """Peak resident bytes over the baseline, over some steps."""
    _warm_up(request, case)
    _limit(request)
    machine.reset_peak_resident()
    baseline = machine.resident_bytes()
    start = time.perf_counter()
    job = _setup(request["provider"], case)
    # as in every step but a training's first
    job.make_optimizer_state()
    for _ in range(request["steps"]):
        job.step()
    return {
        "baseline": baseline,
        "peak": machine.peak_resident_bytes() - baseline,
        "seconds": time.perf_counter() - start,
    }


def _inference(request: dict[str, Any], case: Case) -> dict[str, Any]:
    """Peak resident bytes over the baseline of forwards in eval mode without gradients."""
    _warm_up(request, case)
    machine.reset_peak_resident()
    baseline = machine.resident_bytes()
    job = _setup(request["provider"], case)
    job.model.eval()
    with torch.inference_mode():
        for _ in range(request["steps"]):
            job.model(job.x)
    return {"baseline": baseline, "peak": machine.peak_resident_bytes() - baseline}


def _package_times(request: dict[str, Any], case: Case) -> dict[str, Any]:
    """Seconds of training steps and of inference, original and converted in turn."""
    jobs = {provider: packages.setup(provider, case) for provider in packages.PROVIDERS}
    samples: dict[str, list[float]] = {}
    for turn in range(request["rounds"] + 1):
        for provider, job in jobs.items():
            job.model.train()
            training = timed(job.step, 1, False)
            job.model.eval()
            with torch.inference_mode():
                inference = timed(lambda job=job: job.model(job.x), 1, False)
            if turn > 0:  # the first is a warm-up
                samples.setdefault(f"training {provider}", []).append(training)
                samples.setdefault(f"inference {provider}", []).append(inference)
    return samples


def _live(request: dict[str, Any], case: Case) -> dict[str, Any]:
    """Peak live tensor bytes of a step, by role."""
    _warm_up(request, case)
    _limit(request)
    peak = timeline.record_step(lambda: providers.setup(request["provider"], case))
    return peak.parts | {"total": peak.total}


def _grid(configuration: grid.Configuration, timed: int) -> dict[str, Any]:
    """Peak resident bytes over the baseline of one step, then peak live bytes of another.

    ``timed`` steps in between are timed, each in seconds.
    """
    job = configuration.tiny().training()
    job.step()
    torch.randn(1 << 18).add_(1).sum().item()
    del job
    gc.collect()
    machine.reset_peak_resident()
    baseline = machine.resident_bytes()
    job = configuration.training()
    job.make_optimizer_state()
    job.step()
    peak = machine.peak_resident_bytes() - baseline
    seconds = []
    for _ in range(timed):
        start = time.perf_counter()
        job.step()
        seconds.append(time.perf_counter() - start)
    del job
    gc.collect()
    if timed:
        return {"peak": peak, "seconds": seconds}
    return {"peak": peak, "live": timeline.record_step(configuration.training).total}


def _cuda(request: dict[str, Any], case: Case) -> dict[str, Any]:
    """Peaks of torch's allocator over some steps, and the process's memory by the driver."""
    from effdense.engine.telemetry import Gpu  # yaml and tyro, which no other mode needs

    torch.cuda.set_device(case.device)
    _warm_up(request, case)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    baseline = torch.cuda.memory_allocated()
    gpu = Gpu.of(torch.device(case.device))
    process_before = gpu.bytes_of_process(os.getpid())
    start = time.perf_counter()
    job = providers.setup(request["provider"], case)
    # as in every step but a training's first
    job.make_optimizer_state()
    for _ in range(request["steps"]):
        job.step()
    torch.cuda.synchronize()
    process_after = gpu.bytes_of_process(os.getpid())
    return {
        "baseline": baseline,
        "peak": torch.cuda.max_memory_allocated() - baseline,
        "reserved": torch.cuda.max_memory_reserved(),
        # The caching allocator gives nothing back, so the end is the peak.
        "process": process_after,
        "process_baseline": process_before,
        "seconds": time.perf_counter() - start,
    }


if __name__ == "__main__":
    main()
