"""Other packages' DenseNets before and after ``effdense.convert``: memory and time.

    python benchmarks/conversion.py
    python benchmarks/conversion.py --models monai-densenet121-3d --rounds 7

Peaks are resident sizes over the process's size before the model was built, each in a process
of its own, of a training step (forward, cross-entropy, backward, SGD with momentum) and of
inference (eval mode, no gradients). Seconds are of one step of each, the models in turn in a
process, the median of several rounds.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

from harness import child, packages
from harness.case import Case
from harness.case import Options as CommonOptions
from harness.results import Recorder, mebibytes, spread
from tyro.conf import arg

from effdense.commands import front_end
from effdense.machine.environment import headline
from effdense.machine.measurement import in_fresh_process
from effdense.machine.tables import table


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    models: Annotated[tuple[packages.ModelName, ...], arg(help_behavior_hint="(default: all)")] = ()
    """Which are measured."""
    batch_size: Annotated[
        int | None, arg(metavar="IMAGES", help_behavior_hint="(default: 4 or 8, by model)")
    ] = None
    """At once."""
    image_size: Annotated[
        int | None, arg(metavar="PIXELS", help_behavior_hint="(default: by model)")
    ] = None
    """Along each dimension."""
    providers: tuple[packages.ProviderName, ...] = ("original", "converted")
    """What is compared; converted-slabs is converted with save="slabs"."""
    timed: Literal["yes", "no"] = "yes"
    """Take their times too."""
    rounds: int = 5
    """Timed."""


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/conversion.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> None:
    path = options.output or Path("results") / "conversion.csv"
    rows = []
    with Recorder(path, "conversion", "cpu", options.threads) as recorder:
        print(headline(recorder.environment))
        for arch in options.models or packages.MODELS:
            case = packages.case(arch, options.batch_size, options.image_size)
            rows += measure(case, options, recorder)
            print(f"{arch}: done", file=sys.stderr)
    header = ["model, input", "", "training, MiB", "inference, MiB", "s/step", "s/inference"]
    print("\nPeaks of a training step and of inference; seconds: median [20 %, 80 %]\n")
    print(table(header, rows))
    print(f"\n{path}")


def measure(case: Case, options: Options, recorder: Recorder) -> list[list[str]]:
    """A row of the table for each provider; what can't be measured is blank, and why in the CSV."""
    package = packages.MODELS[cast(packages.ModelName, case.arch)]
    name = f"`{package.line}`, {case.batch_size} x {case.size}"
    if importlib.util.find_spec(package.module) is None:
        recorder.add("original", case, "peak", None, "B", status="not installed")
        return [[name, f"{package.module} is not installed", *[""] * 4]]
    cells = {provider: [name, provider] for provider in options.providers}
    for provider, row in cells.items():
        for work, metric in ((child.training, "peak"), (child.inference, "inference peak")):
            answer = in_fresh_process(
                work, options.threads, provider=provider, case=case.columns(), steps=2
            )
            peak = answer.get("peak")
            detail = answer.get("error", "")
            status = "measured" if peak is not None else "failed"
            recorder.add(provider, case, metric, peak, "B", steps=2, status=status, detail=detail)
            row.append(mebibytes(peak) if peak is not None else detail)
    samples = {}
    if options.timed == "yes":
        timing = {"case": case.columns(), "names": options.providers, "rounds": options.rounds}
        samples = in_fresh_process(child.package_times, options.threads, **timing)
    for provider, row in cells.items():
        for phase in ("training", "inference"):
            own = samples.get(f"{phase} {provider}", [])
            for i, seconds in enumerate(own):
                recorder.add(provider, case, f"{phase} seconds", seconds, "s", sample=i)
            row.append(spread(own, 2) if own else "")
    return list(cells.values())


if __name__ == "__main__":
    main()
