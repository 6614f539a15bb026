from __future__ import annotations

import json
from pathlib import Path

import pytest

from effdense.engine.checkpoint import MANIFEST, CheckpointStore, Position
from effdense.errors import UserError


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_and_the_best_stay(keep: int, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep)
    published = []
    # by number, not by name; steps inside an epoch have no test
    for epoch, error in ((9, 5.0), (10, 3.0), (11, 4.0), (12, 3.0), (100000, 6.0)):
        for position, test_error in ((Position(epoch, 0), error), (Position(epoch, 7), None)):
            store.publish(position, {"state.pt": b"x"}, test_error)
            published.append(position)
            best = Position(9 if epoch == 9 else 10, 0)
            expected = {*published[-keep:], best}
            assert store.positions() == sorted(expected)
    newest = store.newest(pytest.fail)
    assert newest is not None
    assert newest.path.name == str(Position(100000, 7))


def test_names_count_epochs_as_people_do_and_sort_as_they_came(tmp_path: Path) -> None:
    came = [Position(1, 6), Position(2, 0), Position(2, 6), Position(3, 0)]
    assert [str(position) for position in came[:2]] == [
        "epoch-00001-step-0000006",
        "epoch-00001-tested",
    ]
    assert sorted(map(str, came)) == [str(position) for position in came]
    assert [Position.of(str(position)) for position in came] == came
    # as they were called before
    store = CheckpointStore(tmp_path, keep=2)
    store.publish(Position(2, 0), {"state.pt": b"older"}, 0.5).rename(
        tmp_path / "epoch-00002-step-0000000"
    )
    assert store.positions() == [Position(2, 0)]
    assert store.publish(Position(2, 0), {}).name == "epoch-00002-step-0000000"
    store.publish(Position(3, 0), {"state.pt": b"newer"}, 0.75)
    newest, best = store.newest(pytest.fail), store.best()
    assert newest is not None
    assert best is not None
    assert [each.path.name for each in (newest, best)] == [
        "epoch-00002-tested",
        "epoch-00002-step-0000000",
    ]
    (best.path / "state.pt").write_bytes(b"other")
    second = store.best()
    assert second is not None
    assert second.path == newest.path


def test_what_a_newer_version_wrote_is_refused_and_no_damage(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    store.publish(Position(1, 0), {"state.pt": b"older"})
    path = store.publish(Position(2, 0), {"state.pt": b"newer"})
    manifest = json.loads((path / MANIFEST).read_bytes())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format": 2, "files": ["otherwise"]}))
    with pytest.raises(UserError, match=r"newer effdense \(format 2, this one reads 1\)"):
        store.newest(pytest.fail)
    assert store.positions() == [Position(1, 0), Position(2, 0)]
