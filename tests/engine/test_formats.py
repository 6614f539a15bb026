"""Runs and weights of every format that there has been: read for ever, or refused by name.

``formats/run-N`` is a run as it stood when it was killed before step 7 of its second epoch, of the
options ``RUN``, in format N; and the weights that it ended with. A change of format adds one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import effdense
from effdense.engine import checkpoint
from effdense.engine.checkpoint import MANIFEST, CheckpointStore, Position
from effdense.engine.records import read_config
from effdense.errors import UserError
from effdense.weights import read_safetensors, safetensors_bytes
from tests.helpers.ranks import RUN, Ranks

FORMATS = sorted((Path(__file__).parent / "formats").iterdir())


def _content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.slow
@pytest.mark.parametrize("held", FORMATS, ids=lambda path: path.name)
def test_a_run_of_every_format_is_gone_on_with(held: Path, tmp_path: Path) -> None:
    shutil.copytree(held, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    with Ranks(tmp_path, RUN, 1) as ranks:
        assert ranks.wait() == [0], ranks.said()
    assert "going on from epoch 2 of 2, step 7" in ranks.said()
    # on another machine and with another torch sums are rounded otherwise
    ended = read_safetensors(tmp_path / "run" / "model.safetensors")
    for name, expected in read_safetensors(held / "model.safetensors").items():
        if expected.is_floating_point():
            torch.testing.assert_close(ended[name], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("held", FORMATS, ids=lambda path: path.name)
def test_weights_of_every_format_are_read(held: Path) -> None:
    expected = read_safetensors(held / "model.safetensors")
    for weights in (held, held / "model.safetensors"):
        state = effdense.densenet_bc(10, 4, weights=weights).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert read_config(held)["options"]["arch"] == "densenet_bc"


def _manifest(run: Path, change: Callable[[Any], None]) -> None:
    for path in run.glob(f"checkpoints/*/{MANIFEST}"):
        content = json.loads(path.read_bytes())
        change(content)
        path.write_text(json.dumps(content))


def _newer_checkpoint(run: Path) -> None:
    _manifest(run, lambda content: content.update(format=2))


def _named_format(run: Path) -> None:
    _manifest(run, lambda content: content.update(format="zstd", files=None))


def _newer_names(run: Path) -> None:
    (run / "checkpoints" / "epoch-00002-step-0000006").rename(run / "checkpoints" / "at-16")


def _newer_config(run: Path) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(content | {"format": 7}))


NEWER: dict[str, tuple[Callable[[Path], None], str]] = {
    "checkpoint": (_newer_checkpoint, "a newer effdense (format 2, this one reads 1)"),
    "a format with a name": (_named_format, "a newer effdense (format zstd"),
    "other names": (_newer_names, "no checkpoint that this effdense knows"),
    "config.yaml": (_newer_config, "a newer effdense (format 7, this one reads 1)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", NEWER)
def test_a_newer_format_is_refused_by_name_and_not_touched(what: str, tmp_path: Path) -> None:
    change, message = NEWER[what]
    shutil.copytree(FORMATS[-1], tmp_path / "run")
    change(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / ".epoch-00002-step-0000009").mkdir()
    before = _content(tmp_path / "run"), sorted((tmp_path / "run" / "checkpoints").iterdir())
    with Ranks(tmp_path, RUN, 1) as ranks:
        assert ranks.wait() != [0]
    assert message in ranks.said()
    after = _content(tmp_path / "run"), sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert after == before


def test_weights_of_a_newer_run_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = read_safetensors(FORMATS[-1] / "model.safetensors")
    path.write_bytes(safetensors_bytes(state, {"run": json.dumps({"format": 9})}))
    with pytest.raises(UserError, match=r"a newer effdense \(format 9, this one reads 1\)"):
        effdense.load(path)
    path.write_bytes(safetensors_bytes(state, {"run": "[" * 100_000}))
    with pytest.raises(UserError, match="not what a run writes"):
        effdense.load(path)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.mkdir [made]", "[" * 1500, "a: [", "7"])
def test_a_hostile_config_is_refused_and_not_run(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="not what a run writes"):
        read_config(tmp_path)
    assert not (tmp_path / "made").exists()


# ------------------------------------------------- file systems that do not do everything


def test_a_file_system_without_fsync_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    store.publish(Position(1, 3), {"a": b"1"})
    found = store.newest(print)
    assert found is not None
    assert found.files == {"a": b"1"}


def test_an_old_checkpoint_that_cannot_be_deleted_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *args, **options: None)
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    for step in (3, 6, 9):
        store.publish(Position(1, step), {"a": b"%d" % step})
    assert store.positions() == [Position(1, 9)]
    # those that are left would have these names
    shutil.copytree(store.folder / str(Position(1, 9)), store.folder / f".{Position(1, 12)}")
    store.publish(Position(1, 12), {"a": b"12"})
    found = store.newest(print)
    assert found is not None
    assert found.files == {"a": b"12"}
