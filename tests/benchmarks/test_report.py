"""Tables of the documentation say what the kept results say; which results are kept, and where."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import report
from harness import counts, results
from harness.case import Case
from harness.grid import GRID
from harness.kept import Kept
from harness.results import Recorder, Row
from tables import memory, parts, runs, speed

from effdense.errors import UserError

CASE = Case("densenet_bc", 22, 6, 2, 8)


def rows(tmp_path: Path, *peaks: int, **columns: str) -> list[Row]:
    """Of a run that measured these peaks, in MiB."""
    path = tmp_path / "run.csv"
    with Recorder(path, "memory", "cpu", 1) as recorder:
        for peak in peaks:
            recorder.add("naive", CASE, "peak", peak << 20, "B")
    common = {"processor": "Some CPU (R)", "git_revision": "0123456789ab", "gpu": ""}
    return [row | common | columns for row in results.read(path)]


def test_pages_say_what_the_results_say() -> None:
    pages = report.written()
    assert sum("<!-- table: " in text for text in pages.values()) >= 4
    for page, text in pages.items():
        assert page.read_text() == text, f"{page.name}: run python benchmarks/report.py"


def test_every_command_begins_where_it_is_called() -> None:
    """A script without its last two lines does nothing, and says nothing."""
    scripts = sorted((report.ROOT / "benchmarks").glob("*.py"))
    assert len(scripts) > 10
    for script in scripts:
        text = script.read_text()
        assert '\nif __name__ == "__main__":\n' in text, script
        assert text.endswith("    main()\n"), script


def test_every_result_is_of_a_known_machine_and_revision() -> None:
    folders = sorted(path for path in report.KEPT.iterdir() if path.is_dir())
    assert folders
    for folder in folders:
        found = [row for path in folder.glob("*.csv") for row in results.read(path)]
        assert {row["kind"] for row in found} <= {"measured", "formula"}
        assert all(row["processor"] and row["command"] and row["torch"] for row in found)
        (revision,) = {row["git_revision"][:7] for row in found}
        # gone on with on later days, perhaps
        day = min(row["date"] for row in found)[:10]
        assert folder.name.endswith(f"-{day}-{revision}")
        assert {path.suffix for path in folder.iterdir()} <= {".csv", ".json"}


def test_results_are_kept_by_machine_day_and_revision(tmp_path: Path) -> None:
    first = rows(tmp_path, 10, date="2026-01-02T03:04:05+00:00")
    path = report.keep(first, "one", tmp_path)
    assert path == tmp_path / "some-cpu-2026-01-02-0123456" / "one.csv"
    # measured again, the same figure is replaced, and others stay
    other = [row | {"provider": "checkpoint"} for row in first]
    report.keep(other, "one", tmp_path)
    report.keep(rows(tmp_path, 20, date="2026-01-02T04:00:00+00:00"), "two", tmp_path)
    found = Kept.read(tmp_path).rows
    assert [(row["provider"], int(row["value"]) >> 20) for row in found] == [
        ("checkpoint", 10),
        ("naive", 20),
    ]
    about = json.loads((path.parent / "environment.json").read_text())
    assert about["processor"] == "Some CPU (R)"


def test_what_nobody_can_measure_again_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="commit"):
        report.keep(rows(tmp_path, 10, git_revision="0123456789ab+"), "one", tmp_path)
    with pytest.raises(UserError, match="no measurements"):
        report.keep(rows(tmp_path, 10, kind="projection"), "one", tmp_path)
    with pytest.raises(UserError, match="no rows"):
        report.keep([], "one", tmp_path)


def test_the_newest_run_is_shown(tmp_path: Path) -> None:
    old = rows(tmp_path, 10, date="2026-01-01", git_revision="a" * 12)
    new = rows(tmp_path, 20, 30, date="2026-01-02", git_revision="b" * 12)
    shown = memory.peaks(CASE)(Kept([*new, *old]))
    assert "25 |" in shown
    assert "10 |" not in shown
    assert "revision bbbbbbb" in shown
    assert "aaaaaaa" not in shown


def test_ratios_are_formed_within_each_round(tmp_path: Path) -> None:
    path = tmp_path / "race.csv"
    with Recorder(path, "throughput", "cpu", 1) as recorder:
        for i, (rival, own) in enumerate([(2.0, 1.0), (6.0, 2.0), (4.0, 1.0)]):
            recorder.add("naive-channels-last", CASE, "step time", rival, "s", sample=i)
            recorder.add("effdense-features", CASE, "step time", own, "s", sample=i)
    shown = speed.shares(Kept(results.read(path)))
    assert "3.00 [2.40, 3.60]" in shown.splitlines()[-1].split("|")[2]


def test_times_of_two_runs_are_not_compared(tmp_path: Path) -> None:
    names = ("naive", "checkpoint", "effdense-features")
    paths = [tmp_path / f"{name}.csv" for name in ("memory", "one", "two")]
    with Recorder(paths[0], "memory", "cpu", 1) as recorder:
        for name in names:
            recorder.add(name, CASE, "peak", 2**30, "B")
    for path, threads, raced in ((paths[1], 1, names), (paths[2], 2, names[::2])):
        with Recorder(path, "throughput", "cpu", threads) as recorder:
            for name in raced:
                recorder.add(name, CASE, "step time", 4.0 / threads, "s", sample=0)
    kept = Kept([row for path in paths for row in results.read(path)])
    shown = memory.peaks(CASE)(kept)
    assert [line.split("|")[-2].strip() for line in shown.splitlines()[3:6]] == ["4.00"] * 3
    _, _, *lines = speed.speed(kept).splitlines()
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:2]]
    assert [title.rpartition(", ")[2] for title, *_ in found] == ["1 thread", "2 threads"]
    columns = list(speed.RACED)
    times = [dict(zip(columns, row[1:], strict=True)) for row in found]
    assert [[row[name] for name in names] for row in times] == [["4.00"] * 3, ["2.00", "", "2.00"]]


def test_short_times_have_more_digits(tmp_path: Path) -> None:
    path = tmp_path / "race.csv"
    with Recorder(path, "throughput", "cpu", 1) as recorder:
        for i, own in enumerate([0.0264, 0.0271, 0.0268]):
            recorder.add("naive", CASE, "step time", own, "s", sample=i)
    assert "0.027 [0.027, 0.027]" not in (shown := speed.speed(Kept(results.read(path))))
    assert "| 0.027 |" in shown


def test_runs_of_one_machine_and_revision_stand_together(tmp_path: Path) -> None:
    one = rows(tmp_path, 10, date="2026-01-02")
    two = [row | {"provider": "checkpoint", "command": "benchmarks/other.py"} for row in one]
    three = [row | {"git_revision": "b" * 12} for row in two]
    shown = parts.sources_of([*one, *two, *three]).split("\n\n")
    assert ["revision 0123456" in shown[0], "revision bbbbbbb" in shown[2]] == [True, True]
    assert [part.count("\n- ") + 1 for part in shown[1::2]] == [2, 1]


def test_a_table_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("<!-- table: nobody -->\n<!-- end -->\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    with pytest.raises(UserError, match="no table nobody"):
        report.written()


def test_samples_make_the_tables_that_stated_figures_make(tmp_path: Path) -> None:
    def recorded(benchmark: str, figures: list[tuple[Any, ...]]) -> Kept:
        path = tmp_path / f"{benchmark}.csv"
        with Recorder(path, benchmark, "cpu", 1) as recorder:
            for provider, case, metric, value, sample, more in figures:
                recorder.add(provider, case, metric, value, "1", sample=sample, **more)
        return Kept(results.read(path))

    seeds = [("naive", 1.0, 0), ("naive", 3.0, 1), ("effdense-features", 2.0, 0)]
    seeds += [("effdense-features", 5.0, 1)]
    ends = [(name, CASE, "test error", value, i, {"steps": 2}) for name, value, i in seeds]
    early = [("naive", CASE, "test error", 90.0, i, {"steps": 1}) for i in range(2)]
    float64 = dataclasses.replace(CASE, dtype="float64")
    apart = [("effdense-features", float64, "weight difference", 3e-15, 0, {"steps": 2})]
    shown = runs.convergence(recorded("convergence", [*early, *ends, *apart]))
    assert "2.00 ± 1.41" in shown
    assert "1.50 ± 0.71" in shown
    assert "3.0e-15" in shown

    times: list[tuple[Any, ...]] = [
        ("features", CASE, "step time", 4.0, 0, {}),
        ("input", CASE, "step time", 6.0, 0, {}),
    ]
    guesses = [
        (name, CASE, "predicted slowdown", value, 0, {"kind": "formula"})
        for name, value in (("input", 1.25), ("features", 1.0))
    ]
    sizes: list[tuple[Any, ...]] = [
        (name, CASE, metric, float(value << 20), 0, {})
        for name, value in (("features", 3), ("input", 2))
        for metric in ("peak", "predicted peak")
    ]
    shown = speed.plans(recorded("pareto", [*times, *guesses, *sizes]))
    lines = [line.split("|")[2:-1] for line in shown.splitlines()[2:4]]
    found = [[float(cell) for cell in line] for line in lines]
    assert found == [[3, 3, 1.0, 1.0], [2, 2, 1.25, 1.5]]

    weak = [
        ("naive", CASE, "weak step time", seconds, 0, {"processes": n})
        for n, seconds in ((1, 1.0), (2, 1.25))
    ]
    assert "3.2 (80 %)" in speed.scaling(recorded("scaling", weak))

    flops = counts.training_flops(CASE)
    race: list[tuple[Any, ...]] = [("effdense-features", CASE, "step time", 2.0, 0, {})]
    race += [("machine", CASE, "matrix product", flops, 0, {})]
    assert "50 %" in speed.shares(recorded("throughput", race))

    configuration = GRID[0]
    grid: list[tuple[Any, ...]] = [
        ("features", configuration, metric, value, 0, {})
        for metric, value in (("live", 100), ("peak", 100))
    ]
    grid += [
        ("features", configuration, f"predicted {metric}", value, 0, {"kind": "formula"})
        for metric, value in (("live", 101), ("peak", 90))
    ]
    shown = memory.estimates(recorded("estimates", grid))
    assert "+1.000 %" in shown
    assert "-10.0 %" in shown
