"""What a run shows while it trains, on a terminal and where there is none."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from effdense.engine import plots, progress, training
from effdense.engine.distributed import World
from effdense.engine.options import TrainConfig
from effdense.engine.progress import Progress
from effdense.engine.scores import Score

CONFIG = TrainConfig(epochs=2, batch_size=50).resolved()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass when they are told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def trained(shown: Progress, clock: Clock, done: int = 0) -> None:
    """An epoch of 100 steps, a second each, of which some were done before."""
    shown.epoch(1)
    for _ in shown.steps(iter([()] * (100 - done)), 100, done):  # type: ignore[arg-type]
        clock.now += 1
        if shown.is_due():
            shown.show(Score(1.25, 40.0, 50), waited=3.0)


def test_a_line_every_half_minute_where_there_is_no_terminal(
    alone: World, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(Progress(CONFIG, alone), clock)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split("  ")[1] for line in lines] == [f"step {n}/100" for n in (30, 60, 90)]
    for part in ("epoch 1/2", "loss 1.2500", "error 40.00 %", "images/s 50", "waiting 10 %"):
        assert part in lines[0], part
    # 70 steps of this epoch and 100 of the next
    assert "run 02:50 left" in lines[0]
    assert err == ""
    trained(Progress(CONFIG, dataclasses.replace(alone, rank=1)), clock)
    assert capsys.readouterr() == ("", "")


def test_an_epoch_that_is_gone_on_with_is_as_fast_as_its_own_steps(
    alone: World, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(Progress(CONFIG, alone), clock, done=60)
    (line,) = capsys.readouterr().out.splitlines()
    for part in ("step 90/100", "images/s 50", "run 01:50 left"):
        assert part in line, line


def test_bars_on_a_terminal_of_training_and_of_tests(
    alone: World,
    clock: Clock,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = Progress(CONFIG, alone)
    trained(shown, clock)
    assert "epoch 1/2" in terminal.getvalue()
    # from the first second
    assert clock.now > 1000
    assert "0/100" in terminal.getvalue().split("loss=1.2500")[0]
    assert "2/100" not in terminal.getvalue().split("loss=1.2500")[0]
    assert "images/s=50" in terminal.getvalue()
    assert list(shown.tests(iter([()] * 3), 3)) == [()] * 3  # type: ignore[arg-type]
    assert "testing" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_curves_are_drawn_when_some_time_has_passed_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(plots, "draw", lambda *given: drawn.append(len(drawn)))
    for seconds, times in ((3600.0, 0), (0.0, 2)):
        monkeypatch.setattr(training, "_SECONDS_BETWEEN_CURVES", seconds)
        small: dict[str, Any] = {"data": "fake", "depth": 10, "growth_rate": 4, "image_size": 8}
        training.train(TrainConfig(**small, threads=1, work_dir=tmp_path / str(times)))
        assert len(drawn) == times
        assert (tmp_path / str(times) / "loss.png").exists()
