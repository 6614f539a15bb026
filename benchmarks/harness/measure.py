"""Memory of a provider: predicted, then measured in a process of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch

import effdense
from effdense import Estimate
from effdense.machine.measurement import in_fresh_process
from effdense.machine.memory import available_bytes
from effdense.memory.timeline import Peak, record_step

from . import child, counts, providers
from .case import Case

Status = Literal["measured", "does not fit", "out of memory", "failed", "interrupted"]


@dataclass
class Memory:
    """One provider's memory in bytes, or why there is none.

    ``peak`` over ``baseline`` is resident memory on a CPU and allocated memory on a GPU;
    ``live`` splits live tensor bytes at their peak by role (timeline.py). ``predicted`` is
    the peak foretold for what was not run, since it would not fit.
    """

    status: Status
    detail: str = ""
    baseline: int | None = None
    peak: int | None = None
    predicted: int | None = None
    reserved: int | None = None
    process: int | None = None
    live: dict[str, int] = field(default_factory=dict)


def memory(
    provider: str,
    case: Case,
    *,
    steps: int,
    threads: int,
    live: bool = True,
    force: bool = False,
    memory_limit: int | None = None,
) -> Memory:
    """Measure one provider, unless it is predicted not to fit and ``force`` is False.

    On a CPU the split by role is of :func:`simulated`. ``memory_limit`` in bytes makes larger
    allocations fail, as on a smaller machine.
    """
    if not force:
        needed, here = predicted_peak(provider, case), available_bytes(case.device)
        limit = f"machine has {here / 2**30:.1f} GiB free"
        if memory_limit is not None and memory_limit < here:
            here, limit = memory_limit, f"the limit is {memory_limit / 2**30:.1f} GiB"
        if needed > here:
            detail = f"needs {needed / 2**30:.1f} GiB by prediction, {limit}; not run"
            return Memory("does not fit", detail, predicted=needed)
    # no recording sees into compiled code, and not everything goes on meta tensors
    is_known = provider.partition(":")[0] in providers.PROVIDERS
    live = live and is_known and not providers.find(provider)[0].compiled
    answer = in_fresh_process(
        child.training,
        threads,
        provider=provider,
        case=case.columns(),
        steps=steps,
        memory_limit=memory_limit,
        live=live and case.device != "cpu",
    )
    if "error" in answer:
        return Memory(
            "out of memory" if answer["out_of_memory"] else "failed", str(answer["error"])
        )
    if live and case.device == "cpu":
        peak = simulated(provider, case)
        answer["live"] = peak.parts | {"total": peak.total}
    return Memory(
        "measured",
        baseline=answer["baseline"],
        peak=answer["peak"],
        reserved=answer.get("reserved"),
        process=answer.get("process"),
        live=answer.get("live", {}),
    )


# What a process takes besides live tensors: library workspaces and the allocator's slack.
# Measured on the CPU cases of the README: at most 3 % and 40 MiB.
_SLACK, _WORKSPACE = 1.03, 64 << 20


def predicted_peak(provider: str, case: Case) -> int:
    """Bytes one training step will take over the baseline, before anything runs."""
    return int(predicted_live(provider, case) * _SLACK) + _WORKSPACE


@lru_cache(maxsize=4096)
def predicted_live(provider: str, case: Case) -> int:
    """Peak live tensor bytes of a step.

    Providers of plain torch operations run once on meta tensors, which hold no data, under
    the same timeline that measures live bytes; compiled ones and anybody's own count as naive.
    effdense's are its floor plus the temporaries below, an upper bound: searches over depth ask for
    networks of thousands of layers, and effdense.estimate would take minutes for each.
    """
    found, _ = providers.find(provider)
    is_known = provider.partition(":")[0] in providers.PROVIDERS
    name = provider if is_known and not found.compiled and provider != "effdense-all" else "naive"
    if name.startswith("effdense"):
        floor = counts.floor(case)
        widest = max(block.positions * block.bottleneck for block in counts.blocks(case))
        # Y and its gradient, and once more in pieces; see dense_block.py
        total = floor.total + 3 * widest * case.element_size
        if name.startswith("effdense-bottlenecks"):
            total += counts.bottleneck_bytes(case)
        # save="input" keeps less than "features" does, but rebuilds the largest block.
        return total
    return simulated(name, case).total


def estimated(provider: str, case: Case) -> Estimate:
    """What effdense.estimate says, of any device."""
    found, variant = providers.find(provider)
    with torch.device("meta"):
        model = found.build(case, variant)
    return effdense.estimate(
        model,
        case.shape,
        dtype=getattr(torch, case.dtype),
        device="cpu" if case.device == "cpu" else "cuda",
        step_in_backward=found.step_in_backward,
    )


@lru_cache(maxsize=4096)
def simulated(provider: str, case: Case) -> Peak:
    """The peak of a step on meta tensors, of which a real one on a CPU makes the same."""
    meta = dataclasses.replace(case, device="meta")
    return record_step(lambda: providers.setup(provider, meta))
