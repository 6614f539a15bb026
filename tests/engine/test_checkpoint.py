from __future__ import annotations

from pathlib import Path

import pytest

from effdense.engine.checkpoint import CheckpointStore, Position


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_and_the_best_stay(keep: int, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep)
    published = []
    # by number, not by name; steps inside an epoch have no test error
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
