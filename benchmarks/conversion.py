"""Other packages' DenseNets before and after ``effdense.convert``: memory and time.

    python benchmarks/conversion.py
    python benchmarks/conversion.py --models monai-densenet121-3d --rounds 7

Peaks are resident sizes over the process's size before the model was built, each in a process
of its own, of a training step (forward, cross-entropy, backward, SGD with momentum) and of
inference (eval mode, no gradients). Seconds are of one step of each, the original and the
converted model in turn in a process, the median of several rounds.
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
from harness.results import Recorder, mebibytes, quantiles
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
    providers: tuple[Literal["original", "converted"], ...] = packages.PROVIDERS
    """Whose memory is measured."""
    timed: Literal["yes", "no"] = "yes"
    """Take both's times too."""
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
            rows.append(measure(case, options, recorder))
            print(f"{arch}: done", file=sys.stderr)
    header = ["model, input", "original", "converted", "ratio", "inference", "converted", "ratio"]
    header += ["s/step", "converted", "s/inference", "converted"]
    print("\nPeak MiB of a training step and of inference; seconds, medians\n")
    print(table(header, rows))
    print(f"\n{path}")


def measure(case: Case, options: Options, recorder: Recorder) -> list[str]:
    """A row of the table; what can't be measured is blank and its reason a row of the CSV."""
    package = packages.MODELS[cast(packages.ModelName, case.arch)]
    name = f"`{package.line}`, {case.batch_size} x {case.size}"
    if importlib.util.find_spec(package.module) is None:
        recorder.add("original", case, "peak", None, "B", status="not installed")
        return [f"{name}: {package.module} is not installed", *[""] * 10]
    cells = [name]
    for work, metric in ((child.training, "peak"), (child.inference, "inference peak")):
        peaks: list[float | None] = []
        for provider in packages.PROVIDERS:
            if provider not in options.providers:
                peaks.append(None)
                continue
            answer = in_fresh_process(
                work, options.threads, provider=provider, case=case.columns(), steps=2
            )
            peak = answer.get("peak")
            detail = answer.get("error", "")
            status = "measured" if peak is not None else "failed"
            recorder.add(provider, case, metric, peak, "B", steps=2, status=status, detail=detail)
            peaks.append(peak)
        known = [peak for peak in peaks if peak]
        ratio = f"1/{known[0] / known[1]:.1f}" if len(known) == 2 else ""
        cells += [*map(mebibytes, peaks), ratio]
    if options.timed == "no":
        return [*cells, *[""] * 4]
    timing = {"case": case.columns(), "rounds": options.rounds}
    answer = in_fresh_process(child.package_times, options.threads, **timing)
    for phase in ("training", "inference"):
        for provider in packages.PROVIDERS:
            samples = answer.get(f"{phase} {provider}", [])
            for i, seconds in enumerate(samples):
                recorder.add(provider, case, f"{phase} seconds", seconds, "s", sample=i)
            cells.append(
                "{1:.2f} [{0:.2f}, {2:.2f}]".format(*quantiles(samples)) if samples else ""
            )
    return cells


if __name__ == "__main__":
    main()
