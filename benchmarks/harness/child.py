"""A fresh process that measures one provider's memory on one case.

Run as ``python -m harness.child REQUEST`` by :mod:`harness.measure`, where REQUEST and
the last line of output are JSON. To check a figure with another tool, run the same
command under it: ``baseline + peak`` is the process's largest resident size.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from typing import Any

import torch

from effdense.machine.measurement import answer, cuda_peak, resident_peak, timed
from effdense.memory import timeline

from . import grid, machine, packages, providers
from .case import CIFAR_FAMILY, Case


def main() -> None:
    machine.volunteer_for_the_oom_killer()
    answer(_measured)


def _measured(request: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(request["threads"])
    if request["mode"] == "grid":
        return _grid(grid.from_request(request["configuration"]), request.get("timed", 0))
    modes = {"resident": _resident, "live": _live, "cuda": _cuda}
    modes |= {"inference": _inference, "package times": _package_times}
    return modes[request["mode"]](request, Case(**request["case"]))


def _warm_up(request: dict[str, Any], case: Case) -> None:
    """One step of a tiny network of the same provider."""
    if case.arch in packages.MODELS:
        # its imports count as the interpreter's
        packages.setup(request["provider"], dataclasses.replace(case, batch_size=2)).step()
    else:
        tiny = Case(CIFAR_FAMILY, 10, 4, 2, 8, case.dtype, case.device, case.spatial_dims)
        providers.setup(request["provider"], tiny).step()


def _setup(provider: str, case: Case) -> timeline.Training:
    if case.arch in packages.MODELS:
        return packages.setup(provider, case)
    return providers.setup(provider, case)


def _limit(request: dict[str, Any]) -> None:
    if request.get("memory_limit"):
        machine.limit_memory(request["memory_limit"])


def _resident(request: dict[str, Any], case: Case) -> dict[str, Any]:
    """Peak resident bytes over the baseline, over some steps."""
    start = 0.0

    def train() -> None:
        nonlocal start
        start = time.perf_counter()
        job = _setup(request["provider"], case)
        # as in every step but a training's first
        job.make_optimizer_state()
        for _ in range(request["steps"]):
            job.step()

    def warm_up() -> None:
        _warm_up(request, case)
        _limit(request)

    found = resident_peak(train, warm_up)
    return {**found._asdict(), "seconds": time.perf_counter() - start}


def _inference(request: dict[str, Any], case: Case) -> dict[str, Any]:
    """Peak resident bytes over the baseline of forwards in eval mode without gradients."""

    def infer() -> None:
        job = _setup(request["provider"], case)
        job.model.eval()
        with torch.inference_mode():
            for _ in range(request["steps"]):
                job.model(job.x)

    return resident_peak(infer, lambda: _warm_up(request, case))._asdict()


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
    job: timeline.Training | None = None

    def train() -> None:
        nonlocal job
        job = configuration.training()
        job.make_optimizer_state()
        job.step()

    peak = resident_peak(train, lambda: configuration.tiny().training().step()).peak
    assert job is not None
    seconds = []
    for _ in range(timed):
        start = time.perf_counter()
        job.step()
        seconds.append(time.perf_counter() - start)
    job = None
    gc.collect()
    if timed:
        return {"peak": peak, "seconds": seconds}
    return {"peak": peak, "live": timeline.record_step(configuration.training).total}


def _cuda(request: dict[str, Any], case: Case) -> dict[str, Any]:
    """Peaks of torch's allocator over some steps, and the process's memory by the driver."""
    from effdense.engine.telemetry import Gpu  # yaml and tyro, which no other mode needs

    gpu, start, process_before = Gpu.of(torch.device(case.device)), 0.0, None

    def train() -> None:
        nonlocal start, process_before
        process_before, start = gpu.bytes_of_process(os.getpid()), time.perf_counter()
        job = providers.setup(request["provider"], case)
        # as in every step but a training's first
        job.make_optimizer_state()
        for _ in range(request["steps"]):
            job.step()

    found = cuda_peak(train, lambda: _warm_up(request, case), case.device)
    return {
        **found._asdict(),
        "reserved": torch.cuda.max_memory_reserved(),
        # The caching allocator gives nothing back, so the end is the peak.
        "process": gpu.bytes_of_process(os.getpid()),
        "process_baseline": process_before,
        "seconds": time.perf_counter() - start,
    }


if __name__ == "__main__":
    main()
