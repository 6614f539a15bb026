"""The report as one page: no script, no file beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from .sheet import Row

_TITLES = {
    "environment": "Machine and versions",
    "targets": "Targets",
    "speed": "Speed",
    "memory": "Memory",
    "checks": "What must hold on a device",
    "operations": "Kernels against float64",
    "tests": "Tests on the device",
    "sanitizer": "compute-sanitizer",
}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em;
       color: #1c2126; background: #fff }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .2em .6em;
       border-bottom: 1px solid #e3e6e8; vertical-align: top } td.n { text-align: right;
       white-space: nowrap; font-variant-numeric: tabular-nums }
.pass { color: #1a7f37 } .fail { color: #cf222e; font-weight: 600 } .skipped { color: #8a6d00 }
.predicted { color: #57606a; font-style: italic } figure { margin: 1em 0 }
svg text { font: 12px system-ui }
"""
_COLOURS = {"naive": "#8c959f", "torchvision": "#b08800", "effdense": "#0a7f8c"}


def summary(rows: Mapping[str, Sequence[Row]]) -> str:
    """How many checks hold, in one line."""
    counts = Counter(row.verdict for found in rows.values() for row in found)
    return (
        f"{counts['pass']} checks hold, {counts['fail']} do not, {counts['skipped']} were not "
        f"run, {counts['measured']} figures were measured"
    )


def html(rows: Mapping[str, Sequence[Row]]) -> str:
    parts = [f"<h1>effdense on a GPU</h1><p>{escape(summary(rows))}</p>"]
    if any(row.what == "measured on" and row.note.startswith("cpu") for row in _all(rows)):
        parts.append(
            "<p class='fail'>Run without a GPU, on tiny networks: figures mean nothing.</p>"
        )
    failed = [row for row in _all(rows) if row.verdict == "fail"]
    if failed:
        parts.append("<h2>What does not hold</h2>" + _table(failed))
    for name, title in _TITLES.items():
        if name not in rows:
            continue
        parts.append(f"<h2>{escape(title)}</h2>")
        if name == "speed":
            parts += _pictures(rows[name], "images/s", "Images a second")
        if name == "memory":
            parts += _pictures(rows[name], "MiB", "Peak memory, MiB")
        parts.append(_table(rows[name]))
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    title = "<title>effdense on a GPU</title>"
    body = "\n".join(parts)
    return f"<!doctype html><html lang='en'>{head}{title}<style>{_STYLE}</style>{body}</html>\n"


def _all(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    return [row for found in rows.values() for row in found]


def _table(rows: Sequence[Row]) -> str:
    lines = ["<table><tr><th></th><th>of</th><th>what</th><th>value</th><th></th></tr>"]
    for row in rows:
        value = "" if row.value is None else f"{row.value:.4g} {row.unit}".strip()
        cells = [row.group, row.what]
        lines.append(
            f"<tr><td class='{row.verdict}'>{row.verdict}</td>"
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + f"<td class='n'>{escape(value)}</td><td>{escape(row.note)}</td></tr>"
        )
    return "\n".join([*lines, "</table>"])


def _pictures(rows: Sequence[Row], unit: str, title: str) -> list[str]:
    """Bars of what has ``unit``, a picture for each group."""
    found = []
    for group in dict.fromkeys(row.group for row in rows):
        bars = [row for row in rows if row.group == group and row.unit == unit]
        if len(bars) > 1:
            found.append(_bars(f"{title}: {group}", bars))
    return found


def _bars(title: str, rows: Sequence[Row]) -> str:
    largest = max(row.value or 0 for row in rows) or 1
    height = 24 * len(rows) + 30
    lines = [f"<figure><svg viewBox='0 0 860 {height}' role='img' aria-label='{escape(title)}'>"]
    lines.append(f"<text x='0' y='14' font-weight='600'>{escape(title)}</text>")
    for i, row in enumerate(rows):
        y, width = 24 * i + 26, 420 * (row.value or 0) / largest
        family = next((f for f in _COLOURS if row.what.startswith(f)), "effdense")
        # a prediction is an outline
        fill = f"fill='{_COLOURS[family]}'"
        if row.verdict == "predicted":
            fill = f"fill='none' stroke='{_COLOURS[family]}' stroke-dasharray='4 3'"
        name = f"{row.what}, {row.verdict}" if row.unit == "MiB" else row.what
        lines.append(f"<text x='320' y='{y + 13}' text-anchor='end'>{escape(name)}</text>")
        lines.append(f"<rect x='328' y='{y}' width='{width:.1f}' height='17' {fill}/>")
        lines.append(f"<text x='{334 + width:.1f}' y='{y + 13}'>{row.value:.4g}</text>")
    return "\n".join([*lines, "</svg></figure>"])
