"""Clocks that are wrong, and folders that can only be read."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from effdense.engine.checkpoint import CheckpointStore, Position
from effdense.engine.plots import read
from tests.helpers import meddlers
from tests.helpers.ranks import RUN, Ranks, final_state, wait_for


def _at_any_time(folder: Path) -> None:
    """As if all in it had been written by machines whose clocks differ."""
    source = random.Random(0)
    for path in folder.rglob("*"):
        when = time.time() + source.uniform(-86400, 86400)
        os.utime(path, (when, when), follow_symlinks=False)


def test_the_newest_checkpoint_is_the_one_that_got_furthest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    for step in (3, 6, 9):
        path = store.publish(Position(1, step), {"a": b"%d" % step})
        os.utime(path, (2e9 - step * 3600,) * 2)
    found = store.newest(print)
    assert found is not None
    assert found.files == {"a": b"9"}
    store.publish(Position(1, 12), {"a": b"12"})
    assert store.positions() == [Position(1, step) for step in (6, 9, 12)]


@pytest.mark.slow
def test_clocks_that_differ_and_jump(tmp_path: Path, uninterrupted: Path) -> None:
    # every 0.6 s besides, by what measures durations
    run = [*RUN, "--checkpoint-minutes", 0.01]
    with Ranks(tmp_path, run, 3, meddlers.wrong_clocks) as ranks:
        store = CheckpointStore(tmp_path / "run" / "checkpoints", 3)
        wait_for(lambda: len(store.positions()) >= 2)
        ranks.kill()
    _at_any_time(tmp_path / "run")
    newest = store.positions()[-1]
    with Ranks(tmp_path, run, 3, meddlers.wrong_clocks) as ranks:
        assert ranks.wait() == [0] * 3, ranks.said()
        assert f"going on from epoch {newest.epoch}" in ranks.said()
    assert final_state(tmp_path / "run") == final_state(uninterrupted)
    assert "-" not in (tmp_path / "run" / "speed.csv").read_text()
    # over the start of a process that did nothing before
    assert min(read(uninterrupted / "speed.csv", ["memory_mib"])["memory_mib"]) > 1


# ------------------------------------------------------- folders that can only be read


def _read_only(path: Path) -> None:
    """Mount a folder onto itself, for reading; for this process and its children alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, private_recursive = 0x00020000, (1 << 18) | (1 << 14)
    if libc.unshare(new_namespace) or libc.mount(b"none", b"/", None, private_recursive, None):
        raise PermissionError(ctypes.get_errno(), "mounting is not permitted here")
    for options in ("bind", "remount,bind,ro"):
        command = ["mount", "-o", options, str(path), str(path)]
        if subprocess.run(command, capture_output=True).returncode:
            raise PermissionError("mounting is not permitted here")


_MAY_NOT_MOUNT = 77


def _in_a_child_with_it_read_only(path: Path, *functions: object) -> None:
    process = os.fork()
    if process == 0:
        status = 1
        try:
            _read_only(path)
            for function in functions:
                assert callable(function)
                function()
            status = 0
        except PermissionError as error:
            status = _MAY_NOT_MOUNT if "not permitted here" in str(error) else 1
        finally:
            os._exit(status)
    _, code = os.waitpid(process, 0)
    if os.waitstatus_to_exitcode(code) == _MAY_NOT_MOUNT:
        pytest.skip("mounting is not permitted here")
    assert code == 0


def test_an_old_checkpoint_on_a_read_only_mount_is_in_nobodys_way(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    old = store.publish(Position(1, 3), {"a": b"3"})

    def goes_on() -> None:
        for step in (6, 9):
            store.publish(Position(1, step), {"a": b"%d" % step})
        found = store.newest(print)
        assert found is not None
        assert found.files == {"a": b"9"}
        # it can be neither renamed nor removed
        assert store.positions() == [Position(1, 3), Position(1, 9)]

    _in_a_child_with_it_read_only(old, goes_on)
    found = store.newest(print)
    assert found is not None
    assert found.files == {"a": b"9"}


def test_a_damaged_checkpoint_on_a_read_only_mount_is_passed_over(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    store.publish(Position(1, 3), {"a": b"3"})
    bad = store.publish(Position(1, 6), {"a": b"6"})
    (bad / "a").write_bytes(b"7")

    def passes_over() -> None:
        said: list[str] = []
        found = store.newest(said.append)
        assert found is not None
        assert found.files == {"a": b"3"}
        assert len(said) == 1

    _in_a_child_with_it_read_only(bad, passes_over)


def test_a_work_directory_that_can_only_be_read_is_one_line(tmp_path: Path) -> None:
    from effdense.engine.options import TrainConfig
    from effdense.engine.records import WorkDir
    from effdense.errors import UserError

    folder = tmp_path / "run"
    folder.mkdir()
    config = TrainConfig(data="fake", work_dir=folder, threads=1).resolved()

    def refused() -> None:
        with pytest.raises(UserError, match=r"cannot write .*: Read-only file system"):
            WorkDir.claim(config, {}, "")

    _in_a_child_with_it_read_only(folder, refused)
