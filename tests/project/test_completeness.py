"""What is added in one place is known in the others: kernels, operations, save modes, names.

CONTRIBUTING.md says where each goes; these tests say what was forgotten.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import effdense
from effdense.backends.base import Backend
from effdense.backends.self_check import self_check
from effdense.backends.torch_backend import TorchBackend
from effdense.choices import NetworkName
from effdense.commands.recipes import DATA_SETS
from effdense.engine.options import DataName
from effdense.engine.recipes import RECIPES
from effdense.models import TORCHVISION_VARIANTS

ROOT = Path(__file__).resolve().parents[2]


def test_the_ways_of_adding_something_name_what_there_is() -> None:
    """Files, and names that stand somewhere in the code, from CONTRIBUTING's "A kernel" on."""
    ways = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## A kernel")[2]
    folders = ("effdense", "kernels", "benchmarks", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join(path.read_text() for path in paths if path != Path(__file__))
    names = set(re.findall(r"`(?:_?[A-Za-z]+\.)?(_*[A-Za-z]\w+)`", ways)) - {"Unreleased"}
    assert len(names) > 20
    assert {name for name in names if not re.search(rf"\b{name}\b", code)} == set()
    files = set(re.findall(r"`([\w/]+\.(?:py|md))`", ways))
    known = {"/" + path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.*")}
    assert len(files) > 20
    assert {file for file in files if not any(p.endswith(f"/{file}") for p in known)} == {
        "kernels/NAME.py"
    }


def test_every_network_by_name_is_public() -> None:
    networks = {name for name in effdense.__all__ if name.startswith("densenet")}
    assert set(get_args(NetworkName)) == networks == {"densenet_bc", *TORCHVISION_VARIANTS}


def test_every_data_set_has_a_recipe_and_is_described() -> None:
    assert set(get_args(DataName)) == set(RECIPES)
    page = (ROOT / "docs" / "training.md").read_text()
    for name in RECIPES:
        assert re.search(rf"\b{name}\b", DATA_SETS), name
        assert re.search(rf"\b{name}\b", page), name


def test_every_save_mode_is_explained() -> None:
    for page in ("README.md", "docs/memory.md", "docs/derivation.md"):
        text = (ROOT / page).read_text()
        assert all(f'| `"{mode}"`' in text for mode in effdense.SAVE_MODES), page


def test_the_self_check_runs_every_operation() -> None:
    called: set[str] = set()

    class Watched(TorchBackend):
        def __getattribute__(self, name: str) -> Any:
            called.add(name)
            return super().__getattribute__(name)

    assert self_check(Watched("cpu"), torch.device("cpu"), torch.float32) is None
    operations = {name for name in vars(Backend) if callable(getattr(Backend, name))}
    operations = {name for name in operations if not name.startswith("_")}
    # these say how to compute, not what
    assert operations - called <= {"images_per_step", "pieces", "layers"}
    assert len(operations) > 10


@pytest.mark.slow
def test_the_audit_compiles_every_kernel() -> None:
    pytest.importorskip("triton")
    declared = set()
    for path in (ROOT / "kernels").glob("*.py"):
        declared |= set(
            re.findall(r"^@jit(?:\((?:.|\n)*?\))?\ndef (\w+)\(", path.read_text(), re.MULTILINE)
        )
    code = (
        "from effdense.kernels import audit\n"
        "jobs = audit.jobs(['sm_80'], ['fp16'], ['k24', 'k48'])\n"
        "print(*{job.call.kernel for job in jobs})"
    )
    # a process of its own: here Triton may have been imported as an interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert declared
    assert declared == set(done.stdout.split())
