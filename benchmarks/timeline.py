"""Live memory through one training step, by what it is for: naive and effdense.

    python benchmarks/timeline.py --depth 100 --growth-rate 12 --batch-size 16
    python benchmarks/draw.py results/timeline-*.csv --output timeline.png

Every tensor's storage of one step is recorded, when it was made and when it died, in this
process, with optimizer state in place. Recording slows a step down, so times are shares of
the step. Rows are ``--points`` moments of each step, the highest of each stretch of time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from harness import providers
from harness.case import CaseOptions
from harness.pictures import describe, picture
from harness.results import Recorder, Row, mebibytes

from effdense.commands import front_end
from effdense.errors import UserError
from effdense.machine.environment import headline
from effdense.machine.tables import table
from effdense.memory.timeline import ROLES, Moment, live_memory

DEFAULT = ("naive", "effdense-features")


@dataclass(frozen=True, kw_only=True)
class Options(CaseOptions):
    CIFAR_BATCH: ClassVar[int] = 16

    providers: Annotated[tuple[str, ...], providers.argument(DEFAULT)] = ()
    """Whose steps are recorded."""
    points: int = 400
    """Moments of each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.names:
            if providers.find(name)[0].compiled:
                raise UserError(f"a compiled network can't be recorded, got {name}")

    @property
    def names(self) -> list[str]:
        return providers.selected(self.providers, DEFAULT, self.case)


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/timeline.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> None:
    case, names = options.case, options.names
    torch.set_num_threads(options.threads)
    path = options.output or Path("results") / f"timeline-{case.label()}.csv"
    rows = []
    with Recorder(path, "timeline", case.device, options.threads) as recorder:
        print(headline(recorder.environment))
        for name in names:
            small = dataclasses.replace(case, batch_size=2)
            providers.setup(name, small).step()
            moments = live_memory(lambda name=name: providers.setup(name, case))  # type: ignore[misc]
            end = moments[-1].seconds
            for sample, moment in enumerate(thinned(moments, options.points)):
                share = 100 * moment.seconds / end
                common: dict[str, Any] = {"sample": sample, "detail": moment.phase}
                recorder.add(name, case, "moment", share, "%", **common)
                for role, nbytes in moment.parts.items():
                    recorder.add(name, case, f"live {role}", nbytes, "B", **common)
            highest = max(moments, key=lambda moment: moment.total)
            rows.append(
                [name, mebibytes(highest.total), *(mebibytes(highest.parts[r]) for r in ROLES)]
            )
    print(f"\n{case.describe()}: live MiB at the step's highest moment\n")
    print(table(["provider", "total", *ROLES], rows))
    picture(draw, [path], path.with_suffix(".png"))
    print(f"\n{path}\n{path.with_suffix('.png')}")


def thinned(moments: Sequence[Moment], points: int) -> list[Moment]:
    """The highest moment of each phase in each of so many equal stretches of time that has any."""
    end = moments[-1].seconds
    highest: dict[tuple[int, str], Moment] = {}
    for moment in moments:
        stretch = min(points - 1, int(points * moment.seconds / end)) if end > 0 else 0
        place = stretch, moment.phase
        if place not in highest or moment.total > highest[place].total:
            highest[place] = moment
    return sorted(highest.values(), key=lambda moment: moment.seconds)


_ROLE_COLOURS = {
    "parameters": "#999999",
    "gradients": "#CC79A7",
    "optimizer": "#666666",
    "input": "#000000",
    "features": "#0072B2",
    "bottlenecks": "#009E73",
    "gradient buffer": "#E69F00",
    "temporaries": "#F0E442",
}


def draw(figure: Any, rows: list[Row]) -> None:
    """Every provider on one scale, and the leanest once more on its own."""
    names = dict.fromkeys(row["provider"] for row in rows)
    steps = {name: [r for r in rows if r["provider"] == name] for name in names}
    totals = {name: _highest(own) for name, own in steps.items()}
    leanest = min(totals, key=lambda name: totals[name])
    panels = [(name, max(totals.values())) for name in steps]
    if len(steps) > 1:
        panels.append((leanest, totals[leanest]))
    figure.set_size_inches(4 * len(panels), 4.5)
    for i, (name, top) in enumerate(panels):
        panel = figure.add_subplot(1, len(panels), i + 1)
        _step_panel(panel, steps[name])
        own_scale = len(steps) > 1 and i == len(panels) - 1
        panel.set_title(f"{name}{', enlarged' if own_scale else ''}", fontsize=10)
        panel.set_ylim(0, 1.05 * top / 2**20)
        panel.set_xlim(0, 100)
        panel.set_xlabel("share of the training step, %")
        if i == 0:
            panel.set_ylabel("live tensors, MiB")
        if name == leanest and not own_scale:
            # where there is room
            panel.legend(fontsize=8, loc="upper right", reverse=True)
    figure.suptitle(describe(rows[0]))


def _highest(rows: list[Row]) -> float:
    totals: dict[str, float] = {}
    for row in rows:
        if row["metric"].startswith("live "):
            totals[row["sample"]] = totals.get(row["sample"], 0.0) + float(row["value"])
    if not totals:
        raise ValueError("no live memory to draw")
    return max(totals.values())


def _step_panel(panel: Any, rows: list[Row]) -> None:
    def values(metric: str) -> list[float]:
        own = {int(r["sample"]): float(r["value"]) for r in rows if r["metric"] == metric}
        return [own[sample] for sample in sorted(own)]

    layers = {role: values(f"live {role}") for role in _ROLE_COLOURS}
    layers = {role: sizes for role, sizes in layers.items() if any(sizes)}
    panel.stackplot(
        values("moment"),
        [[size / 2**20 for size in sizes] for sizes in layers.values()],
        labels=list(layers),
        colors=[_ROLE_COLOURS[role] for role in layers],
        step="post",
        linewidth=0,
    )
    moments = zip(values("moment"), [r for r in rows if r["metric"] == "moment"], strict=True)
    last = ""
    for share, row in moments:
        if row["detail"] != last and last:
            panel.axvline(share, color="#000000", linewidth=0.5, linestyle=":")
        last = row["detail"]


if __name__ == "__main__":
    main()
