"""The compiled loops as other compilers and processors have them: `make compilers`.

Those of gcc and clang for x86-64 as it was at first, with AVX2 and with AVX-512, and of gcc for
aarch64, which qemu runs, are held against torch's operations. What is not installed is named.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from effdense.backends import cpu_library
from tests.helpers import aarch64
from tests.kernels import test_cpu_backend as loops
from tests.kernels.test_cpu_backend import unloaded  # noqa: F401, a fixture

# what each level has beyond the ones before, as /proc/cpuinfo calls it
LEVELS = {"x86-64": (), "x86-64-v3": ("avx2", "fma"), "x86-64-v4": ("avx512f", "avx512vl")}


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    """Two of them, which is what ``unloaded`` wants to know the parameter of."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    yield 1
    torch.set_num_threads(1)


def equal_torch() -> None:
    """Every operation, on sizes that fill no vector."""
    loops.test_matrix_operations_equal_torch(61)
    for small_betas in (False, True):
        loops.test_products_equal_torch(77, 75, 52, small_betas)
    for shape in ((3, 7, 5), (5, 13), (2, 2, 7, 10)):
        loops.test_the_convolution_and_its_backward_equal_torch(shape, 11, 4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_on_this_processor(
    unloaded: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    compiler: str,
    level: str,
) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("not an x86-64 processor")
    flags = Path("/proc/cpuinfo").read_text().split()
    if absent := [flag for flag in LEVELS[level] if flag not in flags]:
        pytest.skip(f"this processor has no {' '.join(absent)}")
    if shutil.which(compiler) is None:
        pytest.skip(f"not installed: {compiler}")
    own = unloaded / "compiler"
    # the last one counts
    own.write_text(f'#!/bin/sh\nexec {compiler} "$@" -march={level}\n')
    own.chmod(0o755)
    monkeypatch.setenv("CC", str(own))
    equal_torch()
    assert len(list((unloaded / "effdense" / "loops").iterdir())) == 1


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> aarch64.Emulated:
    if absent := aarch64.missing():
        pytest.skip(f"not installed: {absent}")
    return aarch64.Emulated(aarch64.program("double", tmp_path_factory.mktemp("aarch64")))


def test_on_aarch64(emulated: aarch64.Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effdense.backends.cpu_backend.load", lambda dtype: emulated)
    equal_torch()
    sources = "".join(path.read_text() for path in cpu_library._SOURCES.glob("*.c"))
    # all that there are, but for the stem's pooling and dropout
    assert len(emulated.called) >= sources.count("\nvoid ") - 3
