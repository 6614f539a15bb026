"""Launches, torch operations, bytes and host time of a training step, counted without a GPU.

    python benchmarks/launches.py --depth 100 --growth-rate 12
    python benchmarks/launches.py --arch densenet121 --save features

The kernels' host code runs as on an H100, up to a driver that counts launches and makes none
(see harness/launches.py), on CPU tensors. Counts are of a forward and a backward of the
second step, without optimizer. Per layer: what a layer more in each block adds. Per block:
what a block more adds beside its layers, its transition included. Host microseconds are
this process's processor time, on 2 images of 8x8, where the naive network's operations cost
little more than their calls; its own arithmetic is in them all the same. Bytes are those of the
full-size case, by effdense.kernels.traffic.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from harness import launches, roofline
from harness.case import CaseOptions
from harness.results import Recorder
from tyro.conf import arg

from effdense.commands import front_end
from effdense.machine.environment import headline
from effdense.machine.tables import table

# "slabs" launches what "features" does, and at large sizes that for every slab
SAVES = ("bottlenecks", "features", "input")


@dataclass(frozen=True, kw_only=True)
class Options(CaseOptions):
    save: Annotated[
        Literal["bottlenecks", "features", "input"] | None,
        arg(help_behavior_hint="(default: all three)"),
    ] = None
    """What is counted beside naive."""
    rounds: int = 9
    """Timed steps of each."""


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/launches.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> None:
    case = options.case
    torch.set_num_threads(options.threads)
    arguments, images = case.network(), launches.images(case)
    saves = ["naive", *([options.save] if options.save else SAVES)]
    path = options.output or Path("results") / f"launches-{case.label()}.csv"
    rows = []
    with Recorder(path, "launches", "cpu", options.threads) as recorder:
        print(headline(recorder.environment))
        print(f"{case.describe()}; counted with {tuple(images.shape)} images\n")
        seconds = launches.host_seconds(arguments, saves, images, options.rounds)
        layers = sum(arguments["block_config"])
        for save in saves:
            found = launches.per_layer(save, arguments, images)
            host = [s / layers * 1e6 for s in seconds[save]]
            ratio = launches.median_ratio(seconds[save], seconds["naive"])
            counted = {
                "launches per layer": found.layer,
                "launches per block": found.block,
                "kernel launches": found.whole.launches.total(),
                "torch operations": found.whole.operations.total(),
            }
            for metric, value in counted.items():
                recorder.add(save, case, metric, value, "", kind="formula")
            for i, value in enumerate(host):
                recorder.add(save, case, "host time per layer", value, "us", sample=i)
            cells = [f"{value:g}" for value in counted.values()]
            rows.append([save, *cells, f"{statistics.median(host):.0f}", f"{ratio:.2f}"])
            if save == saves[-1]:
                shown = found.whole
    header = ["", "per layer", "per block", "kernels", "torch", "host us/layer", "of naive"]
    print(table(header, rows))
    print(f"\n{saves[-1]}, one step, by name:")
    for counter in shown:
        print("  " + ", ".join(f"{name} {n}" for name, n in counter.most_common()))
    print("\nGB moved in a step, by operation")
    for provider in ("naive", f"effdense-{saves[-1]}"):
        print(f"  {provider}: " + _moved(roofline.operations(provider, case)))
    print(f"\n{path}")


def _moved(operations: tuple[roofline.Operation, ...]) -> str:
    total: dict[str, float] = {}
    for operation in operations:
        total[operation.name] = total.get(operation.name, 0.0) + operation.nbytes / 1e9
    ordered = sorted(total.items(), key=lambda item: -item[1])
    return f"{sum(total.values()):.1f}; " + ", ".join(f"{n} {b:.2f}" for n, b in ordered)


if __name__ == "__main__":
    main()
