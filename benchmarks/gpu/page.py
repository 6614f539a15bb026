"""The report as one page: no script, no file beside it; narrow enough for a phone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape

from .sheet import Row, show

# title, and what a reader of it must know
_SECTIONS = {
    "run": ("This run", ""),
    "targets": (
        "Targets",
        "Images a second of the fastest of ours over those of the fastest naive network, on the "
        "same GPU in the same run. The target is 2.",
    ),
    "speed": (
        "Speed",
        "Training steps: forward, loss, backward, optimiser. (100, k12) is DenseNet-BC of depth "
        "100 and growth rate 12. Naive is the network of the paper, in plain PyTorch; effdense "
        "keeps of each layer the features alone, or the bottleneck too, for backward. "
        "torchvision's memory-efficient network is measured where it has one: of images, not of "
        "volumes, and of ImageNet's kind. Graphs are CUDA graphs: kernels that are launched "
        "together. The host's share is how much of a step the processor needs to launch it: near "
        "100 %, the GPU waits.",
    ),
    "memory": (
        "Memory",
        "What effdense predicts of a training step's peak, without running it, beside what "
        "torch's allocator counts. Features, bottlenecks and input are what is kept for backward.",
    ),
    "checks": ("What must hold on a device", ""),
    "operations": (
        "Kernels against float64",
        "Each operation beside the same in plain PyTorch in float64: the largest difference, "
        "relative to the largest value.",
    ),
    "tests": (
        "Tests on the device",
        "By name those that need nothing but torch; of the others a row for each subject, and "
        "one for each that fails.",
    ),
    "sanitizer": (
        "compute-sanitizer",
        "NVIDIA's, over every kernel: accesses out of bounds, and races in shared memory.",
    ),
    "environment": ("Machine and versions", ""),
}
_LEGEND = (
    "pass and fail: what was asked holds, or not. measured: a figure of this machine. predicted: "
    "computed, not measured. skipped: not run, and why."
)
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em;
       color: #1c2126; background: #fff; overflow-wrap: break-word }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em } p { max-width: 50em }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .2em .6em;
       border-bottom: 1px solid #e3e6e8; vertical-align: top } td.n { text-align: right;
       white-space: nowrap; font-variant-numeric: tabular-nums }
.pass { color: #1a7f37 } .fail { color: #cf222e; font-weight: 600 } .skipped { color: #8a6d00 }
.predicted { color: #57606a; font-style: italic } .quiet { color: #57606a }
figure { margin: 1em 0; max-width: 40em } svg text { font: 14px system-ui }
@media (max-width: 45em) {
  body { overflow-wrap: anywhere } table, tbody, tr, td { display: block }
  th { display: none } td.n { text-align: left }
  tr { border-bottom: 1px solid #e3e6e8; padding: .4em 0 } td { border: 0; padding: 0 }
  td:empty { display: none }
}
"""
_COLOURS = {"naive": "#8c959f", "torchvision": "#b08800", "effdense": "#0a7f8c"}


def summary(rows: Mapping[str, Sequence[Row]]) -> str:
    """How many checks hold, in one line."""
    counts = Counter(row.verdict for row in _all(rows))
    return (
        f"{counts['pass']} checks hold, {counts['fail']} do not, {counts['skipped']} were not "
        f"run, {counts['measured']} figures were measured"
    )


def html(rows: Mapping[str, Sequence[Row]]) -> str:
    said = {row.what: row.note for row in rows.get("run", ())}
    without = said.get("device", "").startswith("cpu")
    names = [row.note for row in rows.get("environment", ()) if row.what == "measured on"]
    title = "effdense without a GPU" if without else f"effdense on {[*names, 'a GPU'][0]}"
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(summary(rows))}</p>"]
    if without or said.get("networks") == "tiny":
        how = "Run without a GPU, on tiny networks" if without else "Run on tiny networks"
        parts.append(f"<p class='fail'>{how}: figures mean nothing.</p>")
    parts.append(f"<p class='quiet'>{_LEGEND}</p>")
    failed = [row for row in _all(rows) if row.verdict == "fail"]
    if failed:
        parts.append("<h2>What does not hold</h2>" + _table(failed))
    parts += _left_out(rows)
    for name, (heading, words) in _SECTIONS.items():
        if name in rows:
            parts += _section(name, heading, words, rows[name])
    head = (
        "<meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title>"
    )
    body = "\n".join(parts)
    return f"<!doctype html><html lang='en'>{head}<style>{_STYLE}</style>{body}</html>\n"


def _all(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    return [row for found in rows.values() for row in found]


def _left_out(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Why what was not run was not, with how much of each section."""
    reasons: dict[str, Counter[str]] = {}
    for name, found in rows.items():
        for row in found:
            if row.verdict == "skipped":
                reasons.setdefault(row.note, Counter())[_SECTIONS[name][0]] += 1
    if not reasons:
        return []
    lines = [
        f"<li>{escape(why)}: "
        + escape(", ".join(f"{title} ({number})" for title, number in counts.items()))
        + "</li>"
        for why, counts in reasons.items()
    ]
    return ["<h2>What was not run, and why</h2><ul>", *lines, "</ul>"]


def _section(name: str, heading: str, words: str, rows: Sequence[Row]) -> list[str]:
    parts = [f"<h2>{escape(heading)}</h2>"]
    seconds = [row.value for row in rows if (row.group, row.what) == ("section", "time")]
    if seconds:
        words = f"{words} Took {show(round(seconds[0] or 0, 1))} s.".strip()
    if words:
        parts.append(f"<p class='quiet'>{escape(words)}</p>")
    found = [row for row in rows if (row.group, row.what) != ("section", "time")]
    if name == "speed":
        parts += _pictures(found, "images/s", "Images a second")
    if name == "memory":
        parts += _pictures(found, "MiB", "MiB")
    parts.append(_table(found) if found else "<p>Nothing was found in its time.</p>")
    return parts


def _table(rows: Sequence[Row]) -> str:
    if all(row.verdict == "said" for row in rows):
        pairs = [(row.what, f"{_value(row)} {row.note}".strip()) for row in rows]
        lines = [f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in pairs]
        return "\n".join(["<table>", *lines, "</table>"])
    columns: dict[str, Callable[[Row], str]] = {
        "": lambda row: row.verdict,
        "of": lambda row: row.group,
        "what": lambda row: row.what,
        "value": _value,
        "note": lambda row: row.note,
    }
    cells = {name: [read(row) for row in rows] for name, read in columns.items()}
    # what is everybody's, or nobody's, tells nothing
    if len(rows) > 1 and len(set(cells["of"])) == 1:
        del cells["of"]
    cells = {name: column for name, column in cells.items() if any(column)}
    lines = ["<table><tr>" + "".join(f"<th>{name}</th>" for name in cells) + "</tr>"]
    for i, row in enumerate(rows):
        kinds = {"": row.verdict, "value": "n"}
        line = [
            f"<td class='{kinds.get(name, '')}'>{escape(column[i])}</td>"
            for name, column in cells.items()
        ]
        lines.append(f"<tr>{''.join(line)}</tr>")
    return "\n".join([*lines, "</table>"])


def _value(row: Row) -> str:
    return "" if row.value is None else f"{show(row.value)} {row.unit}".strip()


def _pictures(rows: Sequence[Row], unit: str, title: str) -> list[str]:
    """Bars of what has ``unit``, a picture for each group."""
    found = []
    for group in dict.fromkeys(row.group for row in rows):
        bars = [row for row in rows if row.group == group and row.unit == unit]
        if len(bars) > 1:
            found.append(_bars(f"{title}: {group}", bars))
    return found


def _bars(title: str, rows: Sequence[Row]) -> str:
    """Each under its name, so that they are as wide as a narrow screen."""
    largest = max(row.value or 0 for row in rows) or 1
    height = 42 * len(rows) + 26
    lines = [f"<figure><svg viewBox='0 0 480 {height}' role='img' aria-label='{escape(title)}'>"]
    lines.append(f"<text x='0' y='14' font-weight='600'>{escape(title)}</text>")
    for i, row in enumerate(rows):
        y, width = 42 * i + 38, 400 * (row.value or 0) / largest
        family = next((f for f in _COLOURS if row.what.startswith(f)), "effdense")
        # a prediction is an outline
        fill = f"fill='{_COLOURS[family]}'"
        if row.verdict == "predicted":
            fill = f"fill='none' stroke='{_COLOURS[family]}' stroke-dasharray='4 3'"
        name = f"{row.what}, {row.verdict}" if row.unit == "MiB" else row.what
        lines.append(f"<text x='0' y='{y}'>{escape(name)}</text>")
        lines.append(f"<rect x='1' y='{y + 6}' width='{width:.1f}' height='14' {fill}/>")
        lines.append(f"<text x='{width + 7:.1f}' y='{y + 18}'>{show(row.value or 0)}</text>")
    return "\n".join([*lines, "</svg></figure>"])
