"""One provider in a process of its own, stepping when told to.

Run as ``python -m harness.worker`` by :mod:`harness.speed`; requests and answers are
lines of JSON on standard input and output.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from effdense.errors import first_line
from effdense.machine.measurement import timed
from effdense.machine.memory import volunteer_for_the_oom_killer
from effdense.memory.timeline import Training

from . import providers
from .case import Case


class Worker:
    """Answers requests: each method is one, its arguments are the request's other fields."""

    job: Training

    def setup(self, provider: str, case: dict[str, Any], threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.job = providers.setup(provider, Case(**case))
        return {}

    def gradients(self, path: str) -> dict[str, Any]:
        """Save the gradients of one step in float64 and answer with its loss."""
        model = self.job.model
        loss = self.job.loss()
        loss.backward()
        found = {
            name.removeprefix("_orig_mod."): p.grad.double().cpu().contiguous()
            for name, p in model.named_parameters()
            if p.grad is not None
        }
        torch.save(found, path)
        model.zero_grad(set_to_none=True)
        return {"loss": loss.item()}

    def warm_up(self, seconds: float) -> dict[str, Any]:
        """Two steps, then one timed: its seconds, and how many a sample of ``seconds`` takes."""
        for _ in range(2):
            self.job.step()
        once = self._time(1)
        if once < seconds / 4:
            # one short step says little on a coarse clock
            few = max(1, int(seconds / 4 / max(once, 1e-3)))
            once = self._time(few) / few
        return {"seconds": once, "steps": max(1, math.ceil(seconds / max(once, 1e-4)))}

    def sample(self, steps: int) -> dict[str, Any]:
        """Seconds per step, over ``steps`` steps or, where the clock is too coarse, more.

        A step among steps is timed: one goes before, untimed, after which the caches, and on
        a GPU the allocator's memory (see release), are this process's again. The first step
        after a pause of three seconds took 0.93 s, the following ones 0.86 (densenet121,
        batch 8, save="bottlenecks", two cores of an AMD EPYC).
        """
        self.job.step()
        while (taken := self._time(steps)) <= 0:
            steps *= 2  # they were shorter than a tick of the clock
        return {"seconds": taken / steps}

    def release(self) -> dict[str, Any]:
        """Give cached GPU memory back."""
        if self._on_gpu():
            torch.cuda.empty_cache()
        return {}

    def peaks(self, device: str, dtype: str, threads: int, seconds: float) -> dict[str, Any]:
        """FLOP/s of a large matrix product and bytes/s of a large copy (read plus written)."""
        torch.set_num_threads(threads)
        gpu = device != "cpu"
        # less would be a few ticks of a coarse clock
        seconds = max(seconds, 0.1)
        n = 8192 if gpu else 2048
        a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
        b, c = a.clone(), torch.empty_like(a)
        size = (1 << 30) if gpu else (256 << 20)
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        product = best_time(lambda: torch.mm(a, b, out=c), seconds, device)
        copy = best_time(lambda: target.copy_(source), seconds, device)
        return {"flops": 2 * n**3 / product, "bytes": 2 * size / copy}

    def _on_gpu(self) -> bool:
        return self.job.x.device.type != "cpu"

    def _time(self, steps: int) -> float:
        return timed(self.job.step, steps, self.job.x.device)


def best_time(function: Callable[[], Any], seconds: float, device: torch.device | str) -> float:
    """Seconds per call: the best of up to five samples of about ``seconds`` each."""
    function()
    times = 1
    while (taken := timed(function, times, device)) < seconds:
        times = max(2 * times, int(1.2 * times * seconds / max(taken, 1e-3)))
    samples = (timed(function, times, device) for _ in range(4))
    # a coarse clock can stand still for a whole sample
    return min([taken, *(sample for sample in samples if sample > 0)]) / times


def main() -> None:
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    volunteer_for_the_oom_killer()
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {first_line(error)}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
