"""What the wheel holds, and what importing the package imports."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import effdense
from tests.project import oldest, release

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> release.Archives:
    return release.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture
def wheel_names(archives: release.Archives) -> list[str]:
    with zipfile.ZipFile(archives.wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_one_package(archives: release.Archives) -> None:
    assert release.strangers(archives.wheel) == []


def test_the_wheel_holds_every_module_the_kernels_and_the_loops(wheel_names: list[str]) -> None:
    own = {p.relative_to(ROOT).as_posix() for p in (ROOT / "effdense").rglob("*.py")}
    kernels = {f"effdense/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert kernels
    assert own | kernels <= set(wheel_names)
    loops = {p.relative_to(ROOT).as_posix() for p in (ROOT / "effdense/backends/loops").iterdir()}
    assert {"effdense/py.typed", "effdense/backends/loops/loops.c"} | loops <= set(wheel_names)


def test_the_source_archive_holds_what_its_tests_and_documentation_need(
    archives: release.Archives,
) -> None:
    with tarfile.open(archives.source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("effdense", "kernels", "tests", "benchmarks", "docs"):
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".c", ".md")]
        assert {path.relative_to(ROOT).as_posix() for path in files} <= names
    assert {"train_ddp.py", "Makefile", "mkdocs.yml", "CHANGELOG.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith((".venv", "dist", "results"))]


def test_a_package_beside_ours_would_be_found(tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("effdense/__init__.py", "effdense-1.dist-info/RECORD", "kernels/launch.py"):
            archive.writestr(name, "")
    assert release.strangers(wheel) == ["kernels"]


def test_the_version_stands_in_one_place() -> None:
    number = rf"(?<![\d.]){re.escape(effdense.__version__)}(?![\d.])"
    files = [path for ending in ("md", "toml", "yml", "cff") for path in ROOT.glob(f"*.{ending}")]
    files += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "effdense").rglob("*.py")]
    holders = {path.name for path in files if re.search(number, path.read_text())}
    # the changelog names it as the head of what it brought
    assert holders - {"CHANGELOG.md"} == {"version.py"}


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    requirements = ["torch<3,>=2.7", "triton>=3.3; platform_system == 'Nowhere'"]
    requirements += ["pytest>=8.2; extra == 'test'", "mypy>=1; extra == 'dev'"]
    assert oldest.oldest(requirements, ["test"]) == ["torch==2.7", "pytest==8.2"]
    assert oldest.oldest_python(">=3.10") == "python3.10"
    with pytest.raises(ValueError, match="tqdm has no lower bound"):
        oldest.oldest(["tqdm"])


def test_every_requirement_of_this_project_has_an_oldest_version() -> None:
    pins = oldest.oldest(metadata.requires("effdense") or [], oldest.EXTRAS)
    # those of the extra onnx too, which packages asks for
    assert {"torch", "pytest", "timm", "nibabel", "onnx"} <= {pin.split("==")[0] for pin in pins}
    assert not any(pin.startswith("effdense") for pin in pins)


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
