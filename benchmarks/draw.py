"""Pictures of benchmark results.

    python benchmarks/draw.py results/memory-*.csv --output memory.png

Results of one benchmark go into one picture; what it shows follows from the rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from harness import report
from harness.case import Parser

# One colour per provider in every picture; Okabe and Ito's set, safe for the colour-blind.
_COLOURS = {
    "naive": "#000000",
    "naive-channels-last": "#666666",
    "torchvision": "#999999",
    "torchvision-memory-efficient": "#CC79A7",
    "checkpoint": "#D55E00",
    "compile": "#E69F00",
    "compile-channels-last": "#8C6D1F",
    "compile-budget": "#F0E442",
    "effdense-all": "#56B4E9",
    "effdense-bottlenecks": "#009E73",
    "effdense-features": "#0072B2",
    "effdense-input": "#56B4E9",
}

# None of the providers': the floor belongs to nobody.
_FLOOR = "#AA3377"

Row = dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="CSV")
    parser.add_argument(
        "--output", type=Path, help="PNG, SVG or PDF (default: the first CSV's name with .png)"
    )
    args = parser.parse_args(argv)
    output = args.output or args.results[0].with_suffix(".png")
    try:
        draw(args.results, output)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(output)
    return 0


def draw(results: Sequence[Path], output: Path) -> None:
    """Draw the rows of some results files of one benchmark.

    Raises:
        ValueError: where there is nothing to draw, or the files are of several benchmarks.
    """
    rows = [row for path in results for row in report.read(path)]
    benchmarks = {row["benchmark"] for row in rows}
    if len(benchmarks) > 1:
        raise ValueError(f"one picture, several benchmarks: {', '.join(sorted(benchmarks))}")
    if not rows:
        raise ValueError(f"no rows in {', '.join(map(str, results))}")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    try:
        kinds = {"memory": _memory, "throughput": _throughput, "scaling": _scaling}
        kinds |= {"estimates": _estimates, "pareto": _pareto}
        kinds |= {"timeline": _timeline, "convergence": _convergence}
        kinds[benchmarks.pop()](axes, rows)
        # Where the figures come from, in the picture itself.
        figure.supxlabel(_origin(rows[0]), fontsize=7, color="#666666")
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
    finally:
        plt.close(figure)


def _origin(row: Row) -> str:
    machine = row["gpu"] or f"{row['processor']}, {row['threads']} threads"
    return (
        f"{machine}; torch {row['torch']}; effdense {row['effdense']} ({row['git_revision']}); "
        f"{row['date'][:10]}"
    )


def _memory(axes: Any, rows: list[Row]) -> None:
    dimension = _swept(rows)
    if dimension is None:
        _memory_bars(axes, rows)
    else:
        _memory_growth(axes, rows, dimension)


def _swept(rows: list[Row]) -> str | None:
    for dimension in ("depth", "batch_size", "growth_rate"):
        if len({row[dimension] for row in rows}) > 1:
            return dimension
    return None


def _memory_bars(axes: Any, rows: list[Row]) -> None:
    peaks = {
        row["provider"]: float(row["value"]) / 2**20
        for row in rows
        if row["metric"] == "peak" and row["value"]
    }
    if not peaks:
        raise ValueError("no measured peak to draw")
    names = list(peaks)[::-1]
    bars = axes.barh(names, [peaks[name] for name in names], color=[_colour(n) for n in names])
    axes.bar_label(bars, labels=[f"{peaks[name]:,.0f}" for name in names], padding=3)
    floors = [float(row["value"]) for row in rows if row["metric"] == "floor total"]
    if floors:
        axes.axvline(floors[0] / 2**20, color=_FLOOR, linestyle="--", label="floor (formula)")
        axes.legend(loc="lower right")
    axes.set_xlabel("peak memory of a training step, MiB")
    axes.set_title(_describe(rows[0]))
    axes.margins(x=0.12)


def _memory_growth(axes: Any, rows: list[Row], dimension: str) -> None:
    for provider in dict.fromkeys(row["provider"] for row in rows):
        metric = "floor total" if provider == "floor" else "peak"
        points = sorted(
            (int(row[dimension]), float(row["value"]) / 2**20)
            for row in rows
            if row["provider"] == provider and row["metric"] == metric and row["value"]
        )
        if not points:
            continue
        style: dict[str, Any] = {"marker": "o", "color": _colour(provider)}
        if provider == "floor":
            style = {"linestyle": "--", "color": _FLOOR}
        label = "floor (formula)" if provider == "floor" else provider
        axes.loglog(*zip(*points, strict=True), label=label, **style)
        axes.annotate(
            f"{points[-1][1]:,.0f}",
            points[-1],
            xytext=(7, -3),
            textcoords="offset points",
            fontsize=8,
            color=style["color"],
        )
    ticks = sorted({int(row[dimension]) for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    _plain(axes.yaxis)
    axes.margins(x=0.07)
    axes.set_xlabel(dimension.replace("_", " "))
    axes.set_ylabel("peak memory of a training step, MiB")
    axes.set_title(_describe(rows[0], but=dimension))
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize=8)


def _throughput(axes: Any, rows: list[Row]) -> None:
    if any(row["kind"] == "projection" for row in rows):
        raise ValueError("a projection is not drawn among measurements")
    rows = [row for row in rows if row["metric"] == "step time" and row["value"]]
    if not rows:
        raise ValueError("no measured step time to draw")
    cases = list(dict.fromkeys(_describe(row) for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    # each case has a scale of its own: between them speeds differ tenfold
    panels = axes.figure.add_gridspec(len(cases), 1)
    axes.set_subplotspec(panels[0])
    axes.figure.set_figheight(max(4.5, 0.4 + len(cases) * (0.6 + 0.24 * len(names))))
    for i, case in enumerate(cases):
        panel = axes if i == 0 else axes.figure.add_subplot(panels[i])
        _speed_bars(panel, names, [row for row in rows if _describe(row) == case])
        panel.set_title(case, fontsize=9, loc="left")
    panel.set_xlabel("images per second: median, 20 to 80 % quantiles")


def _speed_bars(axes: Any, names: list[str], rows: list[Row]) -> None:
    places = []
    for name in names:
        own = [float(row["value"]) for row in rows if row["provider"] == name]
        if not own:
            continue
        images = int(rows[0]["batch_size"])
        low, middle, high = report.quantiles([images / seconds for seconds in own])
        places.append(name)
        axes.barh(name, middle, 0.8, color=_colour(name))
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


def _scaling(axes: Any, rows: list[Row]) -> None:
    if any(row["kind"] == "projection" for row in rows):
        raise ValueError("a projection is not drawn among measurements")
    rows = [row for row in rows if row["metric"].endswith("step time") and row["value"]]
    if not rows:
        raise ValueError("no measured step time to draw")
    counts = sorted({int(row["processes"]) for row in rows})
    for provider in dict.fromkeys(row["provider"] for row in rows):
        for metric, marker in (("weak step time", "o"), ("strong step time", "s")):
            own = [r for r in rows if r["provider"] == provider and r["metric"] == metric]
            times = {
                n: median([float(r["value"]) for r in own if int(r["processes"]) == n])
                for n in counts
                if any(int(r["processes"]) == n for r in own)
            }
            if not times:
                continue
            first = min(times)
            ideal = {n: first / n if metric.startswith("strong") else 1.0 for n in times}
            axes.plot(
                list(times),
                [100 * ideal[n] * times[first] / times[n] for n in times],
                marker=marker,
                color=_colour(provider),
                linestyle="-" if marker == "o" else "--",
                label=f"{provider}, {metric.split()[0]}",
            )
    axes.set_xticks(counts)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("processes")
    axes.set_ylabel("scaling efficiency, %")
    axes.set_title(_describe(rows[0]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _convergence(axes: Any, rows: list[Row]) -> None:
    halves = axes.figure.add_gridspec(1, 2)
    axes.set_subplotspec(halves[0])
    beside = axes.figure.add_subplot(halves[1])
    styles = {"float32": "-", "float64": "--"}
    for provider in dict.fromkeys(row["provider"] for row in rows):
        colour = _colour(provider)
        own = [row for row in rows if row["provider"] == provider]
        for dtype, style in styles.items():
            mine = [row for row in own if row["dtype"] == dtype]
            if dtype == "float32":
                _band(axes, mine, "test error", mean, color=colour, label=provider)
            if provider != "naive":
                label = f"{provider}, {dtype}"
                _band(
                    beside,
                    mine,
                    "weight difference",
                    median,
                    color=colour,
                    label=label,
                    linestyle=style,
                )
    seeds = len({row["sample"] for row in rows})
    axes.set_title(f"float32: mean and range of {seeds} seeds", fontsize=10)
    axes.set_ylabel("test error, %")
    beside.set_title("distance to the naive net's weights", fontsize=10)
    beside.set_ylabel("|w - w naive| / |w naive|")
    for each in (axes, beside):
        each.set_yscale("log")
        each.set_xlabel("training step")
        each.grid(alpha=0.3)
        each.legend(fontsize=8)
    _plain(axes.yaxis)


def _band(axes: Any, rows: list[Row], metric: str, middle: Any, **style: Any) -> None:
    """The middle of all samples over the steps, and their range as a band."""
    samples: dict[int, list[float]] = {}
    for row in rows:
        if row["metric"] == metric:
            samples.setdefault(int(row["steps"]), []).append(float(row["value"]))
    steps = sorted(samples)
    axes.plot(steps, [middle(samples[step]) for step in steps], **style)
    low, high = ([of(samples[step]) for step in steps] for of in (min, max))
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _estimates(axes: Any, rows: list[Row]) -> None:
    sizes: list[float] = []
    furthest = 10.0
    for metric, marker, colour in (("peak", "s", "#E69F00"), ("live", "o", "#0072B2")):
        predicted = {
            r["arch"]: float(r["value"]) for r in rows if r["metric"] == f"predicted {metric}"
        }
        own = {r["arch"]: float(r["value"]) for r in rows if r["metric"] == metric and r["value"]}
        errors = [100 * (predicted[arch] / value - 1) for arch, value in own.items()]
        sizes += [value / 2**20 for value in own.values()]
        furthest = max([furthest, *map(abs, errors)])
        label = {"peak": "peak resident size", "live": "peak live tensor bytes"}[metric]
        places = [value / 2**20 for value in own.values()]
        axes.plot(places, errors, marker, color=colour, label=f"against {label}", markersize=5)
    if not sizes:
        raise ValueError("no measurement to draw")
    low, high = min(sizes) / 1.2, max(sizes) * 1.2
    line = [low * (high / low) ** (i / 200) for i in range(201)]
    # what is asked for: within 3 % of live bytes, within 5 % or 30 MiB of resident size
    for sign in (-1, 1):
        axes.plot([low, high], [3 * sign] * 2, "--", color="#0072B2", linewidth=0.8)
        allowed = [sign * max(5, 100 * 30 / size) for size in line]
        axes.plot(line, allowed, "--", color="#E69F00", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    # every point, the misses above all
    axes.set_ylim(-1.1 * furthest, 1.1 * furthest)
    _plain(axes.xaxis)
    axes.set_xlabel("measured peak of a training step, MiB")
    axes.set_ylabel("prediction's error, %")
    axes.set_title(f"effdense.estimate over {len(predicted)} configurations")
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize=8)


def _pareto(axes: Any, rows: list[Row]) -> None:
    times: dict[str, list[float]] = {}
    for row in rows:
        if row["metric"] == "step time" and row["value"]:
            times.setdefault(row["provider"], []).append(float(row["value"]))
    if not times:
        raise ValueError("no measured step time to draw")

    def values(metric: str) -> dict[str, float]:
        return {r["provider"]: float(r["value"]) for r in rows if r["metric"] == metric}

    sizes, slowdowns, peaks = values("predicted peak"), values("predicted slowdown"), values("peak")
    # the arithmetic knows ratios; the scale is the fastest plan's, measured
    fastest = next(save for save, slowdown in slowdowns.items() if slowdown == 1)
    second = median(times[fastest])
    axes.plot(
        [sizes[save] / 2**20 for save in slowdowns],
        [second * slowdown for slowdown in slowdowns.values()],
        "o",
        color="#56B4E9",
        markersize=4,
        label="every plan, predicted",
    )
    for i, (save, samples) in enumerate(times.items()):
        place = peaks[save] / 2**20, median(samples)
        colour = "#000000" if save == "naive" else "#D55E00"
        axes.plot(*place, "s", color=colour, markersize=6)
        if save in slowdowns:
            predicted = sizes[save] / 2**20, second * slowdowns[save]
            axes.plot(*zip(predicted, place, strict=True), "-", color="#999999", linewidth=0.8)
        modes = save.split("+")
        # a mixture by its initials, block after block; neighbours on either side
        name = modes[0] if len(set(modes)) == 1 else " ".join(mode[0] for mode in modes)
        side = 1 if i % 2 == 0 else -1
        axes.annotate(
            name,
            place,
            xytext=(6 * side, -3),
            textcoords="offset points",
            ha="left" if side == 1 else "right",
            fontsize=8,
            color=colour,
        )
    axes.plot([], [], "s", color="#D55E00", label="measured: resident size, median step")
    axes.set_xscale("log")
    _plain(axes.xaxis)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.25)
    axes.set_xlabel("peak memory of a training step, MiB")
    axes.set_ylabel("seconds per step")
    axes.set_title(rows[0]["arch"].replace(f", {rows[0]['provider']}", ""))
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize=8)


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


def _timeline(axes: Any, rows: list[Row]) -> None:
    """Every provider on one scale, and the leanest once more on its own."""
    steps = {name: [r for r in rows if r["provider"] == name] for name in _providers(rows)}
    totals = {name: _highest(own) for name, own in steps.items()}
    leanest = min(totals, key=lambda name: totals[name])
    panels = [(name, max(totals.values())) for name in steps]
    if len(steps) > 1:
        panels.append((leanest, totals[leanest]))
    figure = axes.figure
    axes.remove()
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
    figure.suptitle(_describe(rows[0]))


def _providers(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["provider"] for row in rows))


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


def _plain(axis: Any) -> None:
    """Numbers as people write them on a logarithmic axis, at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _describe(row: Row, but: str = "") -> str:
    """The case in words, without the dimension that is on an axis."""
    parts = [row["arch"]]
    if row["arch"] == "densenet-bc":
        parts = ["DenseNet-BC"]
        parts += [] if but == "depth" else [f"depth {row['depth']}"]
        parts += [] if but == "growth_rate" else [f"k={row['growth_rate']}"]
    parts += [] if but == "batch_size" else [f"batch {row['batch_size']}"]
    size = "x".join([row["image_size"]] * int(row["spatial_dims"]))
    return ", ".join([*parts, size, row["dtype"]])


def _colour(provider: str) -> str:
    return _COLOURS.get(provider.partition(":")[0], "#F0E442")


if __name__ == "__main__":
    sys.exit(main())
