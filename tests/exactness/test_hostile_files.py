"""Files of weights that somebody made to do harm: nothing in them runs, nothing unpacks."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import effdense
from effdense.errors import UserError
from effdense.weights import read_metadata, read_safetensors, read_weights, safetensors_bytes


class Trap:
    """What unpickled would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


class SetState:
    """What would call a method of what it has just made."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path, (str(self.path),), None, None, iter([("key", Trap(self.path))])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("trap", [Trap, SetState])
def test_no_pickle_is_executed(trap: Any, legacy: bool, tmp_path: Path) -> None:
    state = effdense.densenet_bc(10, 4).state_dict()
    for content in (trap(tmp_path / "made"), {"model": state, "extra": trap(tmp_path / "made")}):
        torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
        with suppress(UserError):
            effdense.densenet_bc(10, 4, weights=tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes(pickle.dumps(trap(tmp_path / "made")))
    with pytest.raises(UserError):
        read_weights(tmp_path / "w.pt")
    assert not (tmp_path / "made").exists()


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    assert (tmp_path / "bomb.pt").stat().st_size < 1 << 16
    with pytest.raises(UserError, match="unpacks to 16,777,216 bytes"):
        read_weights(tmp_path / "bomb.pt")


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_torchscript_archive_is_refused_by_name(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    with pytest.raises(UserError, match="a TorchScript archive, whose code is not run"):
        read_weights(tmp_path / "w.pt")


def test_a_text_is_no_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_text("hello")
    with pytest.raises(UserError, match="it is not what torch"):
        read_weights(tmp_path / "w.pt")


def _safetensors(header: Any, content: bytes = b"") -> bytes:
    described = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(described)) + described + content


def _one(**about: Any) -> Any:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | about}


HEADERS: dict[str, Any] = {
    "an offset before the tensors": _one(data_offsets=[-8, 0]),
    "an end beyond the file": _one(shape=[1 << 40], data_offsets=[0, 1 << 42]),
    "negative sizes": _one(shape=[-1, -2]),
    "sizes that no tensor has": _one(shape=[0, 1 << 80], data_offsets=[0, 0]),
    "a fraction": _one(shape=[2.0]),
    "text": _one(shape="2"),
    "three offsets": _one(data_offsets=[0, 4, 8]),
    "another type": _one(dtype="F8"),
    "a list": [1],
    "a deep one": b"[" * 100_000,
    "none": b"\xff\xfe",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_lies_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(_safetensors(HEADERS[kind], bytes(8)))
    with pytest.raises(UserError, match="cannot read") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)
    assert read_metadata(path) == {}


@pytest.mark.parametrize("kind", ["safetensors", "pt", "legacy pt"])
def test_files_changed_at_random_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    """Any change of bytes gives tensors or a UserError: no other exception, no huge allocation."""
    state = effdense.densenet_bc(10, 2).state_dict()
    path = tmp_path / f"w.{kind.split()[-1]}"
    if kind == "safetensors":
        path.write_bytes(safetensors_bytes(state, {"a": "b"}))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "pt")
    whole = path.read_bytes()
    rng = random.Random(0)
    said: list[str] = []
    for _ in range(int(os.environ.get("EFFDENSE_FUZZ", "150"))):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            # headers and pickles are where the meaning is
            place = rng.randrange(rng.choice([64, 2000, len(content)]))
            place = rng.choice([place, len(content) - 1 - place])
            content[place] = rng.choice([0, 255, rng.randrange(256), content[place] ^ 1])
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_weights(path)
        except UserError as error:
            said.append(str(error))
    assert said
    assert not any("\n" in line for line in said)
