"""A run on one page: report.html, which needs no other file."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .options import TrainConfig
from .progress import duration
from .records import number, read_config
from .standings import Standings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
figure { display: inline-block; margin: 0; max-width: 100% }
figure > svg { width: 28em; max-width: 100%; height: auto }
.wide { overflow-x: auto } table { border-collapse: collapse }
td, th { padding: .1em 1.2em .1em 0; vertical-align: top; text-align: left; font-weight: normal }
th { border-bottom: 1px solid #999 } td.number { text-align: right; white-space: nowrap }
.confusion td { padding: .1em .6em } pre { overflow-x: auto; background: #f4f4f4; padding: .8em }
.samples figure { width: 8.5em; margin: 0 .6em .8em 0; vertical-align: top; font-size: .85em }
.samples img { width: 100%; image-rendering: pixelated } summary { cursor: pointer; margin: .8em 0 }
"""


def html_report(
    work_dir: Path,
    best: int,
    curves: Iterable[Figure],
    show: Callable[[list[int]], Sequence[str]],
) -> str:
    """Result, curves, classes, mistakes, options and versions of the run in ``work_dir``.

    Args:
        work_dir: where its files are.
        best: the epoch whose weights are exported.
        curves: to be shown.
        show: gives test images by their index as PNG in base64; empty: there is no picture.

    Raises:
        UserError: where there is no run.
    """
    recorded = read_config(work_dir)
    options = recorded["options"]
    parts = [
        _result(work_dir, best),
        _section("What differs from the defaults", _table(_differences(options))),
        *(f"<figure>{svg}</figure>" for svg in map(_svg, curves)),
        _csv_table(work_dir / "classes.csv", "Each class"),
        _confusion(work_dir / "confusion.csv"),
        _mistakes(work_dir / "mistakes.csv", show),
        _section("Command", f"<pre>{_text(recorded['command'])}</pre>"),
        _folded("Memory plan", f"<pre>{_text(recorded.get('memory_plan', ''))}</pre>")
        if recorded.get("memory_plan")
        else "",
        _folded("All options", _table(options)),
        _folded("Processes", _table(recorded["processes"])),
        _folded("Versions", _table({"source": recorded["source"], **recorded["versions"]})),
    ]
    title = f"{recorded['model']['name']} on {options['data']}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{_text(title)}</h1>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _result(work_dir: Path, best: int) -> str:
    """The best epoch's test, and how long it all took."""
    texts = {"test.csv": (work_dir / "test.csv").read_text(encoding="utf-8")}
    tests = Standings("error", texts).tests
    test, scores = tests[best], ""
    if (work_dir / "scores.csv").exists():
        others = _rows(work_dir / "scores.csv")
        (row,) = (row for row in others if row["epoch"] == str(best))
        named = {name: value for name, value in row.items() if name not in ("epoch", "step")}
        scores = "".join(
            f", {_text(name.replace('_', ' '))} {value:.4g}"
            for name, value in zip(named, map(number, named.values()), strict=True)
            if not math.isnan(value)
        )
    seconds = sum(float(row["seconds"]) for row in _rows(work_dir / "speed.csv"))
    return (
        f"<p>Test error <b>{test.error:.2f} %</b>, loss {test.loss:.4f}{scores}, on "
        f"{test.samples:,} images, in epoch {best}, the best of {max(tests)}, which took "
        f"{duration(seconds)} of training.</p>"
    )


def _differences(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are other than the data set's recipe has them."""
    named = {name: options[name] for name in ("data", "arch") if options.get(name) is not None}
    found = {"data": options["data"]}
    aside = {"work_dir", "threads", "num_workers"}
    with suppress(UserError, KeyError, TypeError):
        usual = TrainConfig(**named).resolved().options()
        found |= {
            name: value
            for name, value in options.items()
            if name not in aside and name in usual and value != usual[name]
        }
        recipe = TrainConfig(data=options["data"]).resolved().options()
        if options["arch"] != recipe["arch"]:
            found["arch"] = options["arch"]
    return found


def _svg(figure: Figure) -> str:
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    return text[text.index("<svg") :]


def _csv_table(path: Path, title: str) -> str:
    rows = _rows(path) if path.exists() else []
    if not rows:
        return ""
    header = "".join(f"<th>{_text(name)}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(_cell(value, name != "class") for name, value in row.items()) + "</tr>"
        for row in rows
    )
    return _section(title, f'<div class="wide"><table><tr>{header}</tr>{body}</table></div>')


def _confusion(path: Path) -> str:
    """Counts on a ground that is the darker the larger the share of their row."""
    rows = _rows(path) if path.exists() else []
    if not rows:
        return ""
    body = ""
    for row in rows:
        name, *counts = row.values()
        total = max(sum(map(int, counts)), 1)
        body += f"<tr><td>{_text(name)}</td>" + "".join(
            f'<td class="number" style="background: rgba(0,110,130,{0.6 * int(n) / total:.2f})">'
            f"{n}</td>"
            for n in counts
        )
        body += "</tr>"
    header = "".join(f"<th>{_text(name)}</th>" for name in ["", *list(rows[0])[1:]])
    return _section(
        "Confusion: what is (rows) and what was answered",
        f'<div class="wide"><table class="confusion"><tr>{header}</tr>{body}</table></div>',
    )


def _mistakes(path: Path, show: Callable[[list[int]], Sequence[str]]) -> str:
    rows = _rows(path) if path.exists() else []
    if not rows:
        return ""
    figures = ""
    for row, png in zip(rows, show([int(row["number"]) for row in rows]), strict=True):
        image = f'<img src="data:image/png;base64,{png}" alt="">' if png else ""
        figures += (
            f'<figure title="{_text(row["image"])}">{image}<figcaption>{_text(row["truth"])}, '
            f"taken for {_text(row['answer'])} with {100 * float(row['probability']):.0f} %"
            f"</figcaption></figure>"
        )
    return _section("Most wrongly sure of", f'<div class="samples">{figures}</div>')


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _cell(value: str, is_number: bool) -> str:
    if not is_number:
        return f"<td>{_text(value)}</td>"
    shown = value
    with suppress(ValueError):
        shown = f"{float(value):.4g}"
    return f'<td class="number">{_text(shown)}</td>'


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{content}"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{_text(title)}</summary>\n{content}</details>"


def _table(facts: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in facts.items()
    )
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _text(value: object) -> str:
    return html.escape(str(value))
