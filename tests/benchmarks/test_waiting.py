from __future__ import annotations

import pytest
import waiting
from harness import results
from harness.kept import Kept
from tables import speed


@pytest.mark.slow
def test_each_setting_is_measured_alone_and_among_others(tmp_path, capsys, monkeypatch):
    settings = ("", "OMP_WAIT_POLICY=passive")
    for module in (waiting, speed):
        monkeypatch.setattr(module, "SETTINGS", settings)
    monkeypatch.setattr(waiting, "usable_cores", lambda: 1)
    path = tmp_path / "waiting.csv"
    brief = ["--seconds", "0.1", "--rounds", "1", "--threads", "1", "--output", str(path)]
    waiting.main(brief)
    assert "among others" in capsys.readouterr().out
    rows = results.read(path)
    assert {(row["detail"], row["provider"]) for row in rows} == {
        (place, setting or "default") for place in waiting.PLACES for setting in settings
    }
    assert all(float(row["value"]) > 0 for row in rows)
    first, second = speed.waiting(Kept(rows)).splitlines()[2:4]
    assert "alone" in first
    assert "among others" in second


def test_neighbours_are_gone_afterwards():
    with waiting.busy(2) as found:
        assert [process.poll() for process in found] == [None, None]
    assert all(process.returncode is not None for process in found)
