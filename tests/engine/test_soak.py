"""What ``make soak`` sees and says; some seconds of it."""

from __future__ import annotations

import gc
import mmap
import os
import random
import sys
from pathlib import Path

import pytest

from tests.helpers.soak import HELD, LEFT, RECORDS, WORLD_SIZE, Soak, judged, usage

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are counted in /proc")


def series(slope: float, noise: float, lives: int = 3) -> list[list[tuple[float, float]]]:
    """Ten minutes a life, from a level of 100, by so much more an hour."""
    source = random.Random(0)
    return [
        [
            (1000 * life + t, 100 + 10 * life + slope * t / 3600 + source.gauss(0, noise))
            for t in range(0, 600, 5)
        ]
        for life in range(lives)
    ]


def test_a_leak_is_told_from_noise() -> None:
    flat, growing = judged(series(0, 5)), judged(series(120, 5))
    assert not flat.grows
    assert growing.grows
    assert growing.slope == pytest.approx(120, abs=5 * growing.error)
    # a later life's higher level is none of a slope; nor is what takes a month to matter
    assert not judged(series(0, 0)).grows
    assert not judged(series(0.5, 0)).grows
    assert not judged(series(-120, 5)).grows
    with pytest.raises(ValueError, match="too few"):
        judged([[(0, 1), (5, 1)]])


def test_a_leak_of_one_descriptor_a_minute_is_seen() -> None:
    life = [[(float(t), 140.0 + t // 60 + t % 3) for t in range(0, 600, 5)]]
    assert judged(life).grows


def test_what_a_process_takes_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here, temporary = tmp_path.resolve(), tmp_path / "temporary"
    known: set[int] = set()
    gc.collect()
    before = usage(here, temporary, known)
    assert known == {os.getpid()}
    assert before["processes"] == 1
    # a map of its own: what is allocated may lie in pages that this process held already
    ballast = mmap.mmap(-1, 2**26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ballast.write(b"x" * len(ballast))
    (tmp_path / "run").mkdir()
    temporary.mkdir()
    (temporary / "left").touch()
    (tmp_path / "run" / "train.csv").write_bytes(bytes(5000))
    with (tmp_path / "run" / "weights").open("wb") as file:
        file.write(bytes(10_000))
        file.flush()
        os.fsync(file.fileno())
        after = usage(here, temporary, known)
    assert after["descriptors"] == before["descriptors"] + 1
    assert after["memory"] - before["memory"] > 0.9 * len(ballast)
    assert after["files"] == 1
    assert after["disk"] >= 10_000
    assert after["temporary files"] == 1


@pytest.mark.slow
def test_a_run_goes_on_and_is_counted(tmp_path: Path) -> None:
    soak = Soak(tmp_path, seconds=4, kills=1, interval=0.2, images=200)
    soak.run()
    assert not soak.endings
    assert not soak.orphans
    assert {sample.life for sample in soak.samples} == {0, 1}
    most = {name: max(sample.values[name] for sample in soak.samples) for name in HELD | LEFT}
    assert WORLD_SIZE < most["processes"] <= 2 * WORLD_SIZE
    assert most["threads"] > most["processes"]
    assert most["descriptors"] > 20
    assert most["disk"] > 0
    assert max(sample.values[RECORDS[0]] for sample in soak.samples) > 0
    assert set(soak.judgements(settling=0, block=0.5)) == {*HELD, *LEFT, RECORDS[0]}
