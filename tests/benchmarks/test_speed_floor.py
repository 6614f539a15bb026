"""effdense is faster than the naive network on a CPU, by a margin that no neighbour's load takes.

Processor time, which a neighbour stretches little, of steps taken in turn by one process on one
thread: of each network the lower quartile, since whatever disturbs a step makes it longer.
"""

from __future__ import annotations

import time
from statistics import quantiles

import pytest
import torch
from harness import providers
from harness.case import Case

# (100, k 12) in batches of 16, a quarter of those of docs/benchmarks.md: a step of 64 takes the
# naive network three seconds of a quiet core
CASE = Case("densenet_bc", 100, 12, 16, 32)
FLOOR = 1.5
STEPS = 4


@pytest.mark.slow
def test_features_are_half_as_fast_again_as_naive_channels_last() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        jobs = {
            name: providers.setup(name, CASE)
            for name in ("naive-channels-last", "effdense-features")
        }
        for job in jobs.values():
            job.step()
        times: dict[str, list[float]] = {name: [] for name in jobs}
        # once more, with more samples, before it counts
        for _ in range(2):
            for _ in range(STEPS):
                for name, job in jobs.items():
                    start = time.process_time()
                    job.step()
                    times[name].append(time.process_time() - start)
            naive, ours = (quantiles(taken, n=4)[0] for taken in times.values())
            if naive >= FLOOR * ours:
                return
    finally:
        torch.set_num_threads(threads)
    pytest.fail(
        f"{naive / ours:.2f} times as fast as naive channels-last, less than {FLOOR}: {times}"
    )
