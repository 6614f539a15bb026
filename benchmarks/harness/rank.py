"""One of several processes that train a provider together.

Run by torchrun as ``-m harness.rank REQUEST`` (JSON); rank 0 writes the answer to the
file that the request names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import effdense
from effdense.engine.distributed import leave_process_group
from effdense.engine.records import write_atomically
from effdense.machine.memory import volunteer_for_the_oom_killer
from effdense.norms.synchronization import unsynchronised

from . import providers
from .case import Case

# Python entry points through which synchronised batch norms exchange statistics.
_COLLECTIVES = [
    name
    # the last of torch 2.14's
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single")
    if hasattr(dist, name)
]


@contextlib.contextmanager
def count_bytes(model: DistributedDataParallel) -> Iterator[dict[str, int]]:
    """Bytes this process hands over: ``gradients`` by the reducer, ``statistics`` by others."""
    counted = {"gradients": 0, "statistics": 0}
    originals = {name: getattr(dist, name) for name in _COLLECTIVES}
    reducing = False

    # Without annotations: DDP compares them with its types, and here they are strings.
    def hook(state, bucket):
        nonlocal reducing
        counted["gradients"] += bucket.buffer().numel() * bucket.buffer().element_size()
        reducing = True
        try:
            return default_hooks.allreduce_hook(state, bucket)
        finally:
            reducing = False

    def wrapper(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            # all_gather and its kin name the output first
            given = args[0] if name == "all_reduce" else args[1]
            if not reducing:
                counted["statistics"] += given.numel() * given.element_size()
            return originals[name](*args, **kwargs)

        return call

    model.register_comm_hook(None, hook)
    for name in _COLLECTIVES:
        setattr(dist, name, wrapper(name))
    try:
        yield counted
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def main() -> None:
    request = json.loads(sys.argv[1])
    volunteer_for_the_oom_killer()
    torch.set_num_threads(request["threads"])
    case = Case(**request["case"])
    gpu = case.device != "cpu"
    if gpu:
        local = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(local)
        case = dataclasses.replace(case, device=f"cuda:{local}")
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        answer = measure(request, case, gpu)
        if dist.get_rank() == 0:
            text = json.dumps(answer)
            write_atomically(Path(request["answer"]), lambda path: _write(path, text))
    finally:
        leave_process_group()


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def measure(request: dict[str, Any], case: Case, gpu: bool) -> dict[str, Any]:
    """Seconds per step, with and without communication, in alternating samples."""
    job = providers.setup(request["provider"], case)
    if request["synchronise"]:
        # torch's own has no CPU path
        kind = nn.SyncBatchNorm if gpu else effdense.SyncBatchNorm
        job.model = kind.convert_sync_batchnorm(job.model)
    # Buffers are not broadcast: every process has its own batch norm, or all have the same.
    model = DistributedDataParallel(
        job.model,
        device_ids=[torch.cuda.current_device()] if gpu else None,
        broadcast_buffers=False,
    )
    job.model = model
    with count_bytes(model) as counted:
        job.step()
        warm = dict(counted)
        job.step()
    communicated = {kind: counted[kind] - warm[kind] for kind in counted}

    steps = request["steps"] or _steps_for(job.step, request["seconds"], gpu)
    together, alone = [], []
    for _ in range(request["rounds"]):
        together.append(_sample(job.step, steps, gpu))
        with model.no_sync(), unsynchronised():
            alone.append(_sample(job.step, steps, gpu))
    return {"together": together, "alone": alone, "steps": steps, "bytes": communicated}


def _steps_for(step: Any, seconds: float, gpu: bool) -> int:
    """Steps in a sample, the same in all processes."""
    once = _sample(step, 1, gpu)
    return max(1, math.ceil(seconds / max(once, 1e-4)))


def _sample(step: Any, steps: int, gpu: bool) -> float:
    """Seconds per step of the slowest process."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if gpu:
        torch.cuda.synchronize()
    taken = torch.tensor((time.perf_counter() - start) / steps, dtype=torch.float64)
    taken = taken.to("cuda") if gpu else taken
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    # Zero on every process alike: the steps were shorter than a tick of the clock.
    return taken.item() or _sample(step, 2 * steps, gpu)


if __name__ == "__main__":
    main()
