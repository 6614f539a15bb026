"""A run on one page: report.html, which needs no other file."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import plots
from .records import read_config
from .standings import Standings

_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
figure { display: inline-block; margin: 0 } svg { width: 28em; height: auto }
table { border-collapse: collapse } td { padding: .1em 1.2em .1em 0; vertical-align: top }
pre { overflow-x: auto; background: #f4f4f4; padding: .8em }
"""


def html_report(work_dir: Path, best: int) -> str:
    """Result, curves, options, memory plan and versions of the run in ``work_dir``.

    Args:
        work_dir: where its files are.
        best: the epoch whose weights are exported.

    Raises:
        UserError: where there is no run.
    """
    recorded = read_config(work_dir)
    options = recorded["options"]
    texts = {"test.csv": (work_dir / "test.csv").read_text(encoding="utf-8")}
    tests = Standings("error", texts).tests
    test = tests[best]
    parts = [
        f"<p>Test error <b>{test.error:.2f} %</b>, loss {test.loss:.4f}, on {test.samples:,} "
        f"images, in epoch {best}, the best of {max(tests)}.</p>",
        *(f"<figure>{svg}</figure>" for svg in _curves(work_dir)),
        _section("Memory plan", f"<pre>{_text(recorded.get('memory_plan', ''))}</pre>")
        if recorded.get("memory_plan")
        else "",
        _section("Processes", _table(recorded["processes"])),
        _section("Options", _table(options)),
        _section("Command", f"<pre>{_text(recorded['command'])}</pre>"),
        _section("Versions", _table({"source": recorded["source"], **recorded["versions"]})),
    ]
    title = f"{options['arch']} on {options['data']}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}'
        f"</title><style>{_STYLE}</style></head>\n<body><h1>{_text(title)}</h1>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _curves(work_dir: Path) -> list[str]:
    svgs = []
    for figure in plots.figures([work_dir], plots.ALL).values():
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
        text = drawn.getvalue()
        svgs.append(text[text.index("<svg") :])
    return svgs


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{content}"


def _table(facts: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in facts.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _text(value: object) -> str:
    return html.escape(str(value))
