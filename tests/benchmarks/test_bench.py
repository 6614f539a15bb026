"""One command measures everything: resumable, by revision, with the remaining time."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import bench
import precision
import pytest
import report
from harness import results
from harness.case import Case
from harness.kept import Kept
from tables import runs, speed

from effdense.errors import UserError

REVISION = "0123456789ab"
HERE = {
    **dict.fromkeys(results.ENVIRONMENT_COLUMNS, ""),
    **{"processor": "Some CPU(R) 9", "git_revision": REVISION, "date": "2026-01-02T03:04:05"},
    **{"threads": 1, "cores": 2, "memory_bytes": 8 << 30},
}
COLUMNS = json.dumps([*results.RESULT_COLUMNS, *results.ENVIRONMENT_COLUMNS])
WRITES = """
import csv, json, sys
row = dict.fromkeys(json.loads(sys.argv[4]), "")
row |= {"git_revision": sys.argv[1], "date": "2026-01-03", "benchmark": "memory"}
with open(sys.argv[-1], "w") as file:
    writer = csv.DictWriter(file, list(row)); writer.writeheader(); writer.writerow(row)
with open(sys.argv[2], "a") as file:
    file.write("measured ")
sys.exit(int(sys.argv[3]))
"""


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two measurements, each of a row, of which the second fails at first; what they took."""

    def each(revision: str = REVISION, second: int = 1) -> tuple[bench.Measurement, ...]:
        words = ("-c", WRITES, revision)
        return tuple(
            bench.Measurement(
                name, shlex.join([*words, str(tmp_path / name), str(status), COLUMNS]), 7
            )
            for name, status in (("first", 0), ("second", second))
        )

    monkeypatch.setattr(bench, "MEASUREMENTS", each())
    monkeypatch.setattr(bench, "environment", lambda *_: dict(HERE))
    return each  # type: ignore[return-value]


def measured(tmp_path: Path, name: str) -> int:
    path = tmp_path / name
    return len(path.read_text().split()) if path.exists() else 0


def test_what_is_there_is_not_measured_again(
    tmp_path: Path,
    two: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = bench.Options(results=tmp_path / "results")
    assert bench.run(options) == 1
    said = capsys.readouterr()
    assert "first, about 7 minutes; with all that follow 14" in said.out
    assert "second" in said.err
    (folder,) = (tmp_path / "results").iterdir()
    assert folder.name == "some-cpu-9-2026-01-02-0123456"
    assert sorted(path.name for path in folder.iterdir()) == ["environment.json", "first.csv"]
    about = json.loads((folder / "environment.json").read_text())
    assert about["processor"] == "Some CPU(R) 9"
    assert list(about["seconds"]) == ["first"]
    # the next day, mended
    monkeypatch.setattr(bench, "MEASUREMENTS", two(second=0))
    monkeypatch.setattr(bench, "environment", lambda *_: HERE | {"date": "2026-01-03T03:04:05"})
    assert bench.run(options) == 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == [folder.name]
    assert (folder / "second.csv").exists()
    assert (measured(tmp_path, "first"), measured(tmp_path, "second")) == (1, 2)
    # of another revision nothing is there; what it took is known
    other = "ba9876543210"
    monkeypatch.setattr(bench, "MEASUREMENTS", two(other, second=0))
    monkeypatch.setattr(bench, "environment", lambda *_: HERE | {"git_revision": other})
    capsys.readouterr()
    assert bench.run(bench.Options(only=("f*",), results=tmp_path / "results")) == 0
    took = f"{about['seconds']['first'] / 60:.0f}"
    assert f"first, about {took} minutes; with all that follow {took}" in capsys.readouterr().out
    assert measured(tmp_path, "first") == 2


def test_a_revision_that_changes_meanwhile_is_refused(
    tmp_path: Path, two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "MEASUREMENTS", two("ba9876543210"))
    with pytest.raises(UserError, match=f"first is not of revision {REVISION}"):
        bench.run(bench.Options(results=tmp_path / "results"))
    assert list((tmp_path / "results").glob("*/*.csv")) == []
    monkeypatch.setattr(bench, "environment", lambda *_: HERE | {"git_revision": REVISION + "+"})
    with pytest.raises(UserError, match="commit"):
        bench.run(bench.Options(results=tmp_path / "results"))


def test_a_name_that_is_none_is_refused(two: Any) -> None:
    with pytest.raises(UserError, match="nothing is called 'third'"):
        bench.Options(only=("third",))


def test_what_is_slower_than_promised_is_said_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    (tmp_path / "results" / "bench").mkdir(parents=True)
    case = Case("densenet_bc", 100, 12, 64, 32)
    for ours, is_kept in ((1.0, True), (2.0, False)):
        path = tmp_path / "throughput-100.csv"
        with results.Recorder(path, "throughput", "cpu", 1) as recorder:
            for i, noise in enumerate((1.0, 3.0, 1.1)):
                for name, seconds in (("naive-channels-last", 2.5), ("effdense-features", ours)):
                    recorder.add(name, case, "step time", seconds * noise, "s", sample=i)
        assert bench.reaches_its_floor("throughput-100", tmp_path) == is_kept
        assert path.exists() == is_kept
    assert "1.25 times as fast as naive channels-last, less than 1.5" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "floor"), bench.FLOORS.items())
def test_the_newest_results_reach_the_floors(name: str, floor: float) -> None:
    case = {"throughput-100": ("densenet_bc", 100, 12, 64, 32)}.get(
        name, ("densenet121", 0, 0, 8, 224)
    )
    times = Kept.read().of("throughput", "step time", Case(*case)).rows
    samples = [row for row in times if not row["statistic"]]
    if not samples:
        (stated,) = [
            row
            for row in Kept.read().of("throughput", speed.SHARE, Case(*case)).rows
            if row["provider"] == "effdense-features" and row["statistic"] == "0.5"
        ]
        assert float(stated["value"]) >= floor
        return
    newest = [row for row in samples if row["git_revision"] == samples[-1]["git_revision"]]
    assert bench.times_as_fast(newest) >= floor


def test_commands_that_are_kept_name_no_folder_of_a_machine() -> None:
    paths = list(report.KEPT.glob("*/*.csv"))
    commands = {(path, row["command"]) for path in paths for row in results.read(path)}
    assert len(commands) >= len(paths) > 10
    assert [(path.name, said) for path, said in commands if " /" in said] == []


def test_what_is_measured_makes_every_picture() -> None:
    names = [each.name for each in bench.MEASUREMENTS]
    assert len(set(names)) == len(names)
    assert {each for shown in report.PICTURES.values() for each in shown} <= set(names)
    pictures = {path.stem for path in report.FIGURES.glob("*.png")}
    assert pictures == set(report.PICTURES)
    for page in (report.ROOT / "README.md", *(report.ROOT / "docs").glob("*.md")):
        assert page.read_text().count("benchmarks/figures/") == sum(
            page.read_text().count(f"figures/{name}.") for name in {*pictures, "graph"}
        )


@pytest.mark.parametrize("each", bench.MEASUREMENTS, ids=lambda each: each.name)
def test_a_measurement_s_options_exist(
    each: bench.Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.project.test_documented_commands import reads

    assert reads(shlex.split(each.command), monkeypatch)


@pytest.mark.slow
def test_precision_records_both_runs(tmp_path: Path) -> None:
    path = tmp_path / "precision.csv"
    precision.main(["--epochs", "1", "--threads", "1", "--output", str(path)])
    rows = results.read(path)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    shown = runs.precision(Kept(rows))
    ends = [row["value"] for row in rows if row["metric"] == "test error"]
    assert len(ends) == 2
    assert all(f"{float(end):.2f}" in shown for end in ends)
    assert path.with_suffix(".png").stat().st_size > 10_000
