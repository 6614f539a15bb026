"""Where our targets stand: twice the images a second of the best naive network."""

from __future__ import annotations

from collections.abc import Sequence

from .sheet import Row

FACTOR = 2.0


def rows(speed: Sequence[Row], device: str) -> list[Row]:
    """One row for each network and type of which both sides were measured."""
    what = "speed beside the best naive network"
    groups = dict.fromkeys(row.group for row in speed if row.unit == "images/s")
    found = []
    for group in groups:
        measured = [row for row in speed if row.group == group and row.verdict == "measured"]
        naive = [row for row in measured if row.what.startswith("naive")]
        ours = [row for row in measured if row.what.startswith("effdense")]
        if not naive or not ours:
            found.append(Row(group, what, "skipped", note="not both were measured"))
            continue
        if not device.startswith("cuda"):
            found.append(Row(group, what, "skipped", note="no GPU"))
            continue
        best, rival = max(ours, key=_value), max(naive, key=_value)
        ratio = _value(best) / _value(rival)
        note = f"{best.what} against {rival.what}; the target is {FACTOR:g}"
        found.append(Row(group, what, "pass" if ratio >= FACTOR else "fail", ratio, "x", note))
    return found


def _value(row: Row) -> float:
    assert row.value is not None
    return row.value
