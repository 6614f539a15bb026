"""What the wheel holds, and what importing the package imports."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("effdense", "kernels", "benchmarks", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_one_package(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"effdense"}


def test_the_wheel_holds_every_module_and_the_kernels(wheel_names: list[str]) -> None:
    own = {p.relative_to(ROOT).as_posix() for p in (ROOT / "effdense").rglob("*.py")}
    kernels = {f"effdense/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert kernels
    assert own | kernels <= set(wheel_names)
    assert "effdense/py.typed" in wheel_names


def test_the_wheel_holds_the_license(wheel_names: list[str]) -> None:
    assert any(name.endswith("LICENSE") for name in wheel_names)


def _imported(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_importing_effdense_imports_nothing_heavy_beyond_torch() -> None:
    heavy = {"triton", "torchvision", "matplotlib", "sklearn", "pandas", "yaml", "tyro", "pynvml"}
    added = _imported("import effdense") - _imported("import torch")
    assert "effdense" in added
    assert not added & heavy


def test_the_plain_name_kernels_is_imported_nowhere() -> None:
    assert "kernels" not in _imported("import effdense, effdense.kernels")
    for path in [*(ROOT / "effdense").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for line in path.read_text().splitlines():
            assert not line.strip().startswith(("import kernels", "from kernels")), path
