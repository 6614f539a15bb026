"""What is measured in a process of its own: see effdense.machine.measurement.in_fresh_process."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from effdense.engine.distributed import leave_process_group
from effdense.machine.measurement import fresh_process, measure_training, peak_memory, timed
from effdense.machine.memory import limit_memory
from effdense.memory import timeline

from . import grid, packages, providers
from .case import CIFAR_FAMILY, Case


def _warm_up(provider: str, case: Case, memory_limit: int | None = None) -> None:
    """One step of a tiny network of the same provider; then the limit."""
    if case.arch in packages.MODELS:
        # its imports count as the interpreter's; of a large volume, a step would take minutes and
        # more than the measurement
        small = dataclasses.replace(case, batch_size=2, image_size=min(64, case.image_size))
        packages.setup(provider, small).step()
    else:
        tiny = Case(CIFAR_FAMILY, 10, 4, 2, 8, case.dtype, case.device, case.spatial_dims)
        providers.setup(provider, tiny).step()
    if memory_limit is not None:
        limit_memory(memory_limit)


def _setup(provider: str, case: Case) -> timeline.Training:
    if case.arch in packages.MODELS:
        return packages.setup(provider, case)
    return providers.setup(provider, case)


def training(
    provider: str,
    case: dict[str, Any],
    steps: int,
    memory_limit: int | None = None,
    live: bool = False,
) -> dict[str, Any]:
    """``peak`` bytes over ``baseline``, over some steps.

    Afterwards, where asked, what is ``live`` at most in another step, by role. On a GPU also what
    torch's allocator took at most, ``reserved``, and what the driver says of the ``process``.
    """
    own = Case(**case)
    found = measure_training(
        lambda: _setup(provider, own),
        lambda: _warm_up(provider, own, memory_limit),
        device=own.device,
        steps=steps,
    )
    if own.device != "cpu":
        from effdense.engine.telemetry import Gpu  # yaml and tyro, which nothing else here needs

        found["reserved"] = torch.cuda.max_memory_reserved()
        # the caching allocator gives nothing back, so the end is the peak
        found["process"] = bytes_of_process(Gpu.of(torch.device(own.device)), os.getpid())
    if live:
        gc.collect()
        peak = timeline.record_step(lambda: _setup(provider, own))
        found["live"] = peak.parts | {"total": peak.total}
    return found


def bytes_of_process(gpu: Any, pid: int) -> int | None:
    """What a process takes of a GPU; None where the driver won't say.

    Inside a container the driver may know a process by another number; then the figure is only
    taken if a single process uses the GPU.

    Args:
        gpu: an :class:`effdense.engine.telemetry.Gpu`.
        pid: of the process.
    """
    if gpu.nvml is None:
        return None
    with suppress(Exception):
        running = gpu.nvml.nvmlDeviceGetComputeRunningProcesses(gpu.handle)
        own = [process for process in running if process.pid == pid]
        if not own and len(running) == 1:
            own = running
        return int(own[0].usedGpuMemory) if own and own[0].usedGpuMemory else None
    return None


def inference(provider: str, case: dict[str, Any], steps: int) -> dict[str, Any]:
    """``peak`` bytes over ``baseline`` of forwards in eval mode without gradients."""
    own = Case(**case)

    def infer() -> None:
        job = _setup(provider, own)
        job.model.eval()
        with torch.inference_mode():
            for _ in range(steps):
                job.model(job.x)

    return peak_memory(infer, lambda: _warm_up(provider, own))._asdict()


def package_times(case: dict[str, Any], names: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of training steps and of inference, of several providers in turn."""
    own = Case(**case)
    jobs = {provider: packages.setup(provider, own) for provider in names}
    samples: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for provider, job in jobs.items():
            job.model.train()
            training = timed(job.step, 1, "cpu")
            job.model.eval()
            with torch.inference_mode():
                inference = timed(lambda job=job: job.model(job.x), 1, "cpu")  # type: ignore[misc]
            if turn > 0:  # the first is a warm-up
                samples.setdefault(f"training {provider}", []).append(training)
                samples.setdefault(f"inference {provider}", []).append(inference)
    return samples


def configured(configuration: dict[str, Any], samples: int = 0) -> dict[str, Any]:
    """``peak`` bytes of a step, then ``samples`` of ``seconds``; without any, ``live`` bytes."""
    own = grid.from_request(configuration)
    with ExitStack() as stack:
        if own.ddp is not None:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            other = fresh_process(
                second,
                torch.get_num_threads(),
                configuration=configuration,
                store=str(folder / "store"),
            )
            process = stack.enter_context(
                subprocess.Popen(other, env=os.environ, stdout=subprocess.DEVNULL)
            )
            stack.callback(process.wait)
            stack.enter_context(_group_of_two(0, folder / "store"))
        return _configured(own, samples)


def second(configuration: dict[str, Any], store: str) -> dict[str, Any]:
    """What the other of two processes does."""
    with _group_of_two(1, Path(store)):
        return _configured(grid.from_request(configuration), 0)


@contextmanager
def _group_of_two(rank: int, store: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        yield
    finally:
        leave_process_group()


def _configured(own: grid.Configuration, samples: int) -> dict[str, Any]:
    # buckets are laid out anew in the second step, and their memory is all in use from the third
    steps = 1 if own.ddp is None else 3
    found = measure_training(own.training, own.tiny().training().step, steps=steps, samples=samples)
    if not samples:
        gc.collect()
        found["live"] = timeline.record_step(own.training).total
    return found
