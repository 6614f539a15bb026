"""What ``import effdense`` gives, and what it does not wait for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import effdense

PACKAGE = Path(effdense.__file__).parent


def torch_after(code: str) -> bool:
    """Whether a fresh interpreter has imported torch after ``code``."""
    asked = f"{code}\nimport sys; print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert not done.returncode, done.stderr
    return done.stderr.splitlines()[-1] == "True"


@pytest.mark.parametrize(
    "module", ["effdense", "effdense.choices", "effdense.errors", "effdense.commands.train"]
)
def test_nothing_here_imports_torch(module: str) -> None:
    assert not torch_after(f"import {module}")


@pytest.mark.parametrize(
    "run", ["run_path('train_ddp.py', ", "run_module('effdense', "], ids=["train_ddp", "effdense"]
)
def test_help_does_not_wait_for_torch(run: str) -> None:
    code = f"""
import runpy, sys
sys.argv = ["program", "--help"]
try:
    runpy.{run}run_name="__main__")
except SystemExit:
    pass"""
    assert not torch_after(code)


def test_a_name_imports_what_it_needs() -> None:
    assert torch_after("from effdense import densenet_bc")


def test_dir_shows_the_public_names() -> None:
    assert dir(effdense) == sorted(effdense.__all__)
    assert all(hasattr(effdense, name) for name in effdense.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'densenet'"):
        effdense.densenet  # noqa: B018


def test_no_part_of_the_package_hides_a_public_name() -> None:
    # an imported submodule becomes an attribute of the package
    parts = {path.stem for path in PACKAGE.iterdir()} | {"kernels"}
    assert parts & set(effdense.__all__) == {"reference"}
