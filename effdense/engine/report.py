"""A run on one page: report.html, which needs no other file."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .options import TrainConfig
from .progress import duration
from .recipes import RECIPES
from .records import number, read_config, rows
from .standings import Standings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAGE = """
{%- macro facts(rows) %}<div class="wide"><table>
{%- for key, value in rows.items() %}<tr><td>{{ key }}</td><td>
{{- value if value is string or value is not iterable else value | join(", ") }}</td></tr>
{% endfor %}</table></div>{% endmacro -%}
{%- macro header(names) %}<tr>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
figure { display: inline-block; margin: .8em 0 0; max-width: 100% }
figure > svg { width: 28em; max-width: 100%; height: auto }
.wide { overflow-x: auto } table { border-collapse: collapse }
td, th { padding: .1em 1.2em .1em 0; vertical-align: top; text-align: left; font-weight: normal }
th { border-bottom: 1px solid #999 } td.number { text-align: right; white-space: nowrap }
.scores th:not(:first-child) { text-align: right }
.confusion td, .confusion th { padding: .1em .45em }
pre { overflow-x: auto; background: #f4f4f4; padding: .8em }
.command { white-space: pre-wrap; overflow-wrap: anywhere }
.samples figure { width: 8.5em; margin: 0 .6em .8em 0; vertical-align: top; font-size: .85em }
.samples img { width: 100%; image-rendering: pixelated } summary { cursor: pointer; margin: .8em 0 }
</style></head>
<body><h1>{{ title }}</h1>
<p>Test error <b>{{ "%.2f" % test.error }} %</b>, loss {{ "%.4f" % test.loss }}
{%- for name, value in scores %}, {{ word(name) }} {{ show(name, value) }}{% endfor %}, on
{{ "{:,}".format(test.samples) }} images, in epoch {{ best }}, the best of {{ last }}, which took
{{ time }} of training.</p>
<h2>What differs from the defaults</h2>{{ facts(differences) }}
{% for curve in curves %}<figure>{{ curve | safe }}</figure>
{% endfor %}
{%- if classes %}<h2>Each class</h2>
<div class="wide"><table class="scores">{{ header(classes[0] | map("word")) }}
{% for row in classes %}<tr>{% for name, value in row.items() -%}
{% if name == "class" %}<td>{{ value }}</td>
{%- else %}<td class="number">{{ show(name, number(value)) }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}</table></div>{% endif %}
{% if confusion %}<h2>Confusion: what is (rows) and what was answered</h2>
<div class="wide"><table class="scores confusion">{{ header([""] + (confusion[0] | list)[1:]) }}
{% for row in confusion %}{% set cells = row.values() | list %}<tr><td>{{ cells[0] }}</td>
{%- set counts = cells[1:] | map("int") | list %}{% set total = [counts | sum, 1] | max %}
{%- for n in counts %}<td class="number"
 style="background: rgba(0,110,130,{{ "%.2f" % (0.6 * n / total) }})">{{ n }}</td>
{%- endfor %}</tr>
{% endfor %}</table></div>{% endif %}
{% if mistakes %}<h2>Most wrongly sure of</h2>
<div class="samples">{% for row, png in mistakes %}<figure title="{{ row.image }}">
{%- if png %}<img src="data:image/png;base64,{{ png }}" alt="">{% endif %}<figcaption>
{{- row.truth }}, taken for {{ row.answer }} with {{ "%.0f" % (100 * number(row.probability)) -}}
&nbsp;%</figcaption></figure>
{% endfor %}</div>{% endif %}
<h2>Command</h2><pre class="command">{{ recorded.command }}</pre>
{% if recorded.memory_plan %}<details><summary>Memory plan</summary>
<pre>{{ recorded.memory_plan }}</pre></details>{% endif %}
{% for title, rows in folded %}<details><summary>{{ title }}</summary>{{ facts(rows) }}</details>
{% endfor %}</body></html>
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
        show: gives test images by their number as PNG in base64; empty: there is no picture.

    Raises:
        UserError: where there is no run.
    """
    # torch requires it
    from jinja2 import Environment, StrictUndefined

    recorded = read_config(work_dir)
    options = recorded["options"]
    tests = Standings("error", {"test.csv": (work_dir / "test.csv").read_text("utf-8")}).tests
    scores = [row for row in _rows(work_dir / "scores.csv") if row["epoch"] == str(best)]
    named = [
        (name, number(cell))
        for row in scores
        for name, cell in row.items()
        if name not in ("epoch", "step")
    ]
    mistakes = _rows(work_dir / "mistakes.csv")
    pictures = show([int(row["number"]) for row in mistakes]) if mistakes else []
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["word"] = _word
    return environment.from_string(_PAGE).render(
        title=f"{recorded['model']['name']} on {options['data']}",
        test=tests[best],
        scores=[(name, value) for name, value in named if not math.isnan(value)],
        best=best,
        last=max(tests),
        time=duration(sum(float(row["seconds"]) for row in _rows(work_dir / "speed.csv"))),
        differences=_differences(options),
        curves=map(_svg, curves),
        classes=_rows(work_dir / "classes.csv"),
        confusion=_rows(work_dir / "confusion.csv"),
        mistakes=zip(mistakes, pictures, strict=True) if mistakes else (),
        recorded={"memory_plan": "", **recorded},
        folded=[
            ("All options", options),
            ("Processes", recorded["processes"]),
            ("Versions", {"source": recorded["source"], **recorded["versions"]}),
        ],
        number=number,
        show=_show,
        word=_word,
    )


_WORDS = {"auroc": "AUROC", "auprc": "AUPRC", "top5_error": "top-5 error"}


def _word(name: str) -> str:
    """What a column of scores is called."""
    return _WORDS.get(name, name.replace("_", " "))


def _show(name: str, value: float) -> str:
    """A score in its unit."""
    if math.isnan(value) or name == "samples":
        return "-" if math.isnan(value) else f"{value:,.0f}"
    return f"{value:.2f}\N{NO-BREAK SPACE}%" if name.endswith("error") else f"{value:.4f}"


# The options that others' defaults follow from.
_LEADING = ("data", "arch", "model", "table", "spatial_dims", "channels")
# Of the machine and the place, rather than of the run.
_ASIDE = {"work_dir", "threads", "num_workers"}


def _differences(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are other than the data set's recipe has them."""
    leading = {name: options[name] for name in _LEADING if options.get(name) is not None}
    if leading.get("model"):
        leading.pop("arch", None)
    channels = 1 if options.get("spatial_dims") == 3 else 3
    recipe: dict[str, Any] = {"spatial_dims": 2, "channels": channels}
    found = {"data": options["data"]}
    with suppress(UserError, KeyError, TypeError):
        usual = TrainConfig(**leading).resolved().options()
        recipe["arch"] = RECIPES.get(options["data"], RECIPES["imagefolder"]).arch
        found |= {n: v for n, v in leading.items() if v != recipe.get(n)}
        found |= {n: v for n, v in options.items() if n in usual and v != usual[n]}
    return {name: value for name, value in found.items() if name not in _ASIDE}


def _svg(figure: Figure) -> str:
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    return text[text.index("<svg") :]


def _rows(path: Path) -> list[dict[str, str]]:
    """Those of a CSV file; none where there is no file."""
    return rows(path.read_text("utf-8")) if path.exists() else []
