"""This revision's steps beside an older one's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import report
import revisions
from harness import results
from harness.case import Case
from harness.kept import Kept
from harness.results import Recorder
from tables import speed

CASE = Case("densenet_bc", 22, 6, 2, 8)


def test_a_revision_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        revisions.main(["--against", "nobody"])
    assert exit.value.code == 2
    assert "a commit of this repository, got 'nobody'" in capsys.readouterr().err


@pytest.mark.slow
def test_this_revision_beside_itself(tmp_path: Path) -> None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=report.ROOT, capture_output=True)
    if found.returncode != 0:
        pytest.skip("no git repository here")
    path = tmp_path / "revisions.csv"
    arguments = ["--against", "HEAD", "--depth", "22", "--growth-rate", "6", "--batch-size", "2"]
    arguments += ["--image-size", "8", "--rounds", "2", "--seconds", "0.01", "--threads", "1"]
    revisions.main([*arguments, "--output", str(path)])
    rows = results.read(path)
    here, there = sorted({row["provider"] for row in rows})
    assert there.startswith(f"{here}@{found.stdout.decode()[:7]}")
    assert all(float(row["value"]) > 0 for row in rows)
    assert len(rows) == 4


def test_ratios_are_formed_by_round(tmp_path: Path) -> None:
    path = tmp_path / "revisions.csv"
    with Recorder(path, "revisions", "cpu", 1) as recorder:
        for i, (old, new) in enumerate([(2.0, 1.0), (4.0, 4.0), (5.0, 15.0)]):
            recorder.add("effdense-features", CASE, "step time", new, "s", sample=i)
            recorder.add("effdense-features@0123456", CASE, "step time", old, "s", sample=i)
    shown = speed.revisions(Kept(results.read(path)))
    assert "0123456" in shown
    assert "1.00 [0.70, 2.20]" in shown
