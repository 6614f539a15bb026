"""Training speed: effdense against the naive net and every alternative.

    python benchmarks/throughput.py --depth 100 --growth-rate 12 --batch-size 64
    python benchmarks/throughput.py --arch densenet121 --batch-size 8
    python benchmarks/throughput.py --depth 40 --spatial-dims 3 --batch-size 2
    python benchmarks/throughput.py --depth 250 --growth-rate 24 --on h100

Before anything is timed, loss and gradients of every provider are compared with the naive
net's; one that disagrees gets no figure of speed. Then each provider takes one sample per
round, in a process of its own; an untimed step goes before each sample, since the first
one after the other processes' turns finds none of its data in the caches. A ratio is formed
within each round, so that a slow moment of the machine touches both sides.

--on prints what published peak rates would allow on a device that isn't here. Its
figures are no measurements and are kept in a file of their own.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from harness import counts, providers, roofline
from harness.case import Case, CaseOptions
from harness.devices import DEVICES, Device, DeviceName
from harness.measure import predicted_peak
from harness.pictures import colour, describe
from harness.results import Recorder, Row, quantiles, spread
from harness.speed import Race, WorkerError, machine_peaks, peaks_seconds
from tqdm import tqdm
from tyro.conf import arg

from effdense.commands import front_end
from effdense.errors import UserError
from effdense.machine.environment import headline
from effdense.machine.memory import available_bytes
from effdense.machine.tables import table

DEFAULT = (
    "naive",
    "naive-channels-last",
    "torchvision-memory-efficient",
    "checkpoint",
    "effdense-bottlenecks",
    "effdense-features",
)
PROJECTED = ("naive", "checkpoint", "effdense-bottlenecks", "effdense-features", "effdense-input")
# seconds between lines of progress, where there is no terminal
QUIET = 30
BASELINES = ("naive", "naive-channels-last", "compile", "compile-channels-last")


@dataclass(frozen=True, kw_only=True)
class Options(CaseOptions):
    providers: Annotated[tuple[str, ...], providers.argument(DEFAULT)] = ()
    """What is compared."""
    baselines: Annotated[
        tuple[str, ...],
        arg(metavar="NAME", help_behavior_hint=f"(default: {' '.join(BASELINES)}, where they run)"),
    ] = ()
    """What ratios are formed to."""
    rounds: int = 7
    """Samples of each provider."""
    steps: Annotated[int | None, arg(help_behavior_hint="(default: enough for --seconds)")] = None
    """Of a sample."""
    seconds: float = 0.5
    """Shortest sample; clocks of virtual machines tick in 20 ms."""
    no_strict: bool = False
    """Leave out the comparison of gradients in float64, of at most four images."""
    force: bool = False
    """Attempt what should not fit."""
    on: Annotated[DeviceName | None, arg(help_behavior_hint="(default: here)")] = None
    """A roofline projection onto a device that isn't here; nothing is run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.baselines:
            providers.find(name)
        for name in self.providers:
            # anybody's is looked for when it is run
            known = providers.PROVIDERS.get(name.partition(":")[0])
            if known is not None and known.step_in_backward:
                raise UserError(f"{name} leaves no gradients to compare; use benchmarks/memory.py")
        if self.on is not None:
            DEVICES[self.on].rate(self.dtype)

    @property
    def names(self) -> list[str]:
        default = PROJECTED if self.on else DEFAULT
        names = dict.fromkeys(providers.selected(self.providers, default, self.case))
        # the gate's yardstick comes first, where it isn't named
        return list(names if "naive" in names else {"naive": None, **names})


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/throughput.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> int:
    case, names = options.case, options.names
    if options.on is not None:
        case = dataclasses.replace(case, device=options.on)
    path = options.output or Path("results") / (
        f"throughput{'-projection' if options.on else ''}-{case.label()}.csv"
    )
    with Recorder(path, "throughput", options.device, options.threads) as recorder:
        if options.on is not None:
            project(DEVICES[options.on], case, names, recorder)
            red = False
        else:
            print(headline(recorder.environment))
            try:
                red = race(options, case, names, recorder)
            except WorkerError as error:
                print(f"the naive net failed, so nothing can be compared: {error}", file=sys.stderr)
                return 1
    print(f"\n{path}")
    return 1 if red else 0


def race(options: Options, case: Case, names: Sequence[str], recorder: Recorder) -> bool:
    """Compare, then time, then print; whether the gate was red for anyone."""
    out: dict[str, str] = {}
    if not options.force:
        free = available_bytes(case.device)
        for name in names:
            needed = predicted_peak(name, case)
            if needed > free:
                out[name] = (
                    f"needs {needed / 2**30:.1f} GiB by prediction, machine has "
                    f"{free / 2**30:.1f} GiB free; not run"
                )
    red = False
    times: dict[str, list[float]] = {}
    entered = [name for name in names if name not in out]
    with Status() as status:
        with Race(entered, case, options.threads, status.say) as racers:
            gates = [("same dtype", racers.disagreements())]
            if not options.no_strict:
                gates.append(("float64", racers.disagreements(strict=True)))
            for gate, found in gates:
                for name, each in found.items():
                    recorder.add(
                        name,
                        case,
                        f"gradient error, {gate}",
                        each.gradient,
                        "1",
                        status="red" if each.red else "agrees",
                        detail=each.describe(),
                    )
                    if each.red:
                        red = True
                        racers.failures[name] = f"DISAGREES with the naive net: {each.describe()}"
            verdict = "NOT all" if red else "all"
            status.print(
                f"{verdict} compute what the naive net computes: loss and gradients compared in "
                f"{case.dtype}{'' if options.no_strict else ' and in float64'}"
            )
            a_round = racers.warm_up(options.seconds, options.steps)
            foretold = options.rounds * a_round
            foretold += peaks_seconds(options.seconds, racers.start_seconds)
            status.print(f"about {foretold / 60:.1f} minutes for {options.rounds} rounds")
            status.count(foretold)
            start = time.perf_counter()
            rounds = racers.rounds(options.rounds, lambda name: status.done(racers.expected[name]))
            for i, taken in enumerate(rounds):
                for name, seconds in taken.items():
                    times.setdefault(name, []).append(seconds)
                    recorder.add(
                        name, case, "step time", seconds, "s", sample=i, steps=racers.steps[name]
                    )
            out |= racers.failures
        status.say("timing a matrix product and a copy")
        peaks = machine_peaks(case, options.threads, options.seconds)
        took = time.perf_counter() - start
        recorder.add("machine", case, "foretold time", foretold, "s", kind="formula")
        recorder.add("machine", case, "time", took, "s")
        status.print(f"took {took / 60:.1f}")
    recorder.add("machine", case, "matrix product", peaks["flops"], "FLOP/s")
    recorder.add("machine", case, "copy", peaks["bytes"], "B/s")
    for name, why in out.items():
        recorder.add(name, case, "step time", None, "s", status="failed", detail=why)
    times = {name: found for name, found in times.items() if name not in out}
    print_race(case, times, options.baselines, red, peaks)
    for name, why in out.items():
        print(f"{name}: {why}")
    return red


class Status:
    """What is being done, on one line of a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        shape = "{percentage:3.0f}% |{bar}| {elapsed}, about {remaining} left: {desc}"
        self._bar = tqdm(total=1, bar_format="{elapsed}: {desc}", file=sys.stderr, disable=None)
        self._shape, self._said = shape, time.monotonic()

    def __enter__(self) -> Status:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, doing: str) -> None:
        self._bar.set_description_str(doing)
        if self._bar.disable and time.monotonic() - self._said > QUIET:
            self._said = time.monotonic()
            print(doing, file=sys.stderr)

    def print(self, line: str) -> None:
        """On standard output, above the bar."""
        self._bar.write(line, file=sys.stdout)

    def count(self, seconds: float) -> None:
        """From now on the bar is of so many seconds."""
        self._bar.bar_format = self._shape
        self._bar.reset(total=seconds)

    def done(self, seconds: float) -> None:
        """Of those that were counted on, whatever they took."""
        self._bar.update(seconds)


def print_race(
    case: Case,
    times: dict[str, list[float]],
    baselines: Sequence[str],
    red: bool,
    peaks: dict[str, float],
) -> None:
    print(f"\n{case.describe()}: training steps, median [20 %, 80 %]")
    print(
        f"a {case.dtype} matrix product reaches {peaks['flops'] / 1e9:,.0f} GFLOP/s here, "
        f"a copy {peaks['bytes'] / 1e9:,.1f} GB/s"
    )
    print(
        "GFLOP/s: the naive net's arithmetic per time, recomputation not counted; GB/s: bytes "
        "of each operation, counted\n"
    )
    against = [name for name in baselines or BASELINES if name in times]
    # A wrong provider's rivals are not compared with it, nor anybody before it is mended.
    against = [] if red else against
    header = ["provider", "s/step", "images/s", "GFLOP/s", "% product", "GB/s", "% copy"]
    rows = []
    for name, found in times.items():
        _, middle, _ = quantiles(found)
        flops = counts.training_flops(case) / middle
        cells = [
            name,
            spread(found, 3),
            f"{case.batch_size / middle:.1f}",
            f"{flops / 1e9:,.0f}",
            f"{100 * flops / peaks['flops']:.0f}",
        ]
        try:
            moved = sum(op.nbytes for op in roofline.operations(name, case)) / middle
            cells += [f"{moved / 1e9:.1f}", f"{100 * moved / peaks['bytes']:.0f}"]
        except ValueError:
            cells += ["", ""]
        for baseline in against:
            pairs = zip(times[baseline], found, strict=False)
            cells.append(spread([theirs / ours for theirs, ours in pairs], 2))
        rows.append(cells)
    print(table([*header, *(f"x {name}" for name in against)], rows))
    if red:
        print("\nNo speed-up is stated where one of them computes something else.")


def project(device: Device, case: Case, names: Sequence[str], recorder: Recorder) -> None:
    """Roofline times on a device that isn't here."""
    rate = device.flops[case.dtype]
    print(f"PROJECTION, not a measurement: {case.describe()} on {device.name}")
    print(
        f"{rate / 1e12:g} TFLOP/s {case.dtype}, {device.memory / 1e12:g} TB/s ({device.source}); "
        "every operation at the\nfull published rate, no launch overheads: lower bounds of time\n"
    )
    times, rows = {}, []
    for name in names:
        try:
            operations = roofline.operations(name, case)
        except ValueError as error:
            print(error)
            continue
        flops = sum(op.flops for op in operations)
        moved = sum(op.nbytes for op in operations)
        times[name] = roofline.seconds(operations, rate, device.memory)
        values = {"step time": (times[name], "s"), "arithmetic": (flops, "FLOP")}
        values["memory traffic"] = (moved, "B")
        for metric, (value, unit) in values.items():
            recorder.add(name, case, metric, value, unit, kind="projection", detail=device.name)
        rows.append(
            [
                name,
                f"{flops / 1e9:,.0f}",
                f"{moved / 1e9:.1f}",
                f"{1e3 * times[name]:.2f}",
                f"{case.batch_size / times[name]:,.0f}",
                f"{times['naive'] / times[name]:.2f}",
            ]
        )
    print(table(["provider", "GFLOP", "GB", "ms/step >=", "images/s <=", "x naive"], rows))


def draw(figure: Any, rows: list[Row]) -> None:
    """Images per second, a panel for each case."""
    rows = [row for row in rows if row["metric"] == "step time" and row["value"]]
    if not rows:
        raise ValueError("no measured step time to draw")
    cases = list(dict.fromkeys(describe(row) for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    # each case has a scale of its own: between them speeds differ tenfold
    figure.set_figheight(max(4.5, 0.4 + len(cases) * (0.6 + 0.24 * len(names))))
    panels = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for panel, case in zip(panels, cases, strict=True):
        _speed_bars(panel, names, [row for row in rows if describe(row) == case])
        panel.set_title(case, fontsize=9, loc="left")
    panel.set_xlabel("images per second: median, 20 to 80 % quantiles")


def _speed_bars(axes: Any, names: list[str], rows: list[Row]) -> None:
    places = []
    for name in names:
        own = [float(row["value"]) for row in rows if row["provider"] == name]
        if not own:
            continue
        images = int(rows[0]["batch_size"])
        low, middle, high = quantiles([images / seconds for seconds in own])
        places.append(name)
        axes.barh(name, middle, 0.8, color=colour(name))
        axes.errorbar(middle, name, xerr=[[middle - low], [high - middle]], color="#AA3377")
        axes.annotate(
            f"{middle:.1f}",
            (high, name),
            xytext=(4, -3),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.1)


if __name__ == "__main__":
    main()
