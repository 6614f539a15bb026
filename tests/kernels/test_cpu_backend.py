"""The compiled loops: every operation against torch's, for any number of threads; compiling."""

from __future__ import annotations

import itertools
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effdense.backends import cpu_backend, cpu_library, select
from effdense.backends.base import Deferred, Normalization, PendingNorm, Rebuild, Statistics
from effdense.backends.cpu_backend import CpuBackend
from effdense.backends.torch_backend import TorchBackend
from effdense.machine import environment as machine
from tests.helpers.compare import assert_close

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

THREADS = [1, 2, 3, 7]
SHAPES = [
    *[(3, 7, 5), (2, 1, 1), (1, 9, 130), (1, 1, 3), (5, 8, 8)],
    *[(5, 13), (1, 700), (4, 3, 5, 4), (1, 6, 3, 2), (2, 2, 7, 40)],
]


@pytest.fixture(params=THREADS, autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def normal(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


def norm_of(c: int) -> Normalization:
    return Normalization(normal(c), torch.rand(c).double() + 0.5, normal(c), normal(c), 1e-5)


def no_statistics(c: int) -> Statistics:
    return Statistics(*torch.full((2, c), math.nan, dtype=torch.float64))


def both(operation: str, *args: object) -> tuple[list[Tensor], list[Tensor]]:
    """What the loops and torch return, and what they leave in the tensors they were given."""
    results = []
    for backend in (CpuBackend(torch.float64), TorchBackend()):
        given = [a.clone() if isinstance(a, Tensor) else a for a in args]
        # a column of a wider buffer stays one
        given = [strided(a) if isinstance(a, Tensor) and a.dim() == 2 else a for a in given]
        given = [
            Statistics(*map(Tensor.clone, a)) if isinstance(a, Statistics) else a for a in given
        ]
        returned = getattr(backend, operation)(*given)
        flat = [returned] if isinstance(returned, Tensor) else list(returned or ())
        left = [t for a in given for t in (a if isinstance(a, Statistics) else [a])]
        results.append([t for t in [*flat, *left] if isinstance(t, Tensor)])
    ours, theirs = results
    return ours, theirs


def strided(matrix: Tensor) -> Tensor:
    wide = torch.full((matrix.shape[0], matrix.shape[1] + 3), 7.0, dtype=matrix.dtype)
    wide[:, 1:-2] = matrix
    return wide[:, 1:-2]


def compare(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if b.numel():
            assert_close(a, b, 1e-12, f"result {i}")


@pytest.mark.parametrize("rows", [1, 2, 5, 300, 1031])
def test_matrix_operations_equal_torch(rows: int) -> None:
    c = 13
    x, norm = normal(rows, c) + 50, norm_of(c)
    compare(*both("statistics", x, no_statistics(c)))
    compare(*both("bn_relu", x, norm, normal(rows, c)))
    correction = (normal(c), normal(c), float(rows))
    for given in (correction, None):
        compare(*both("bn_relu_backward_apply", x, norm, normal(rows, c), given))
    s, t = normal(c), normal(c)
    unfinished = (normal(rows, c), x, norm.mean, s, t, float(rows), normal(rows, c))
    compare(*both("finish_gradient", *unfinished))
    for channels in (slice(None), None, torch.tensor([0, 4, 12])):
        ours, theirs = both(
            "bn_relu_backward_reduce", x, norm, normal(rows, c), None, None, channels
        )
        if isinstance(channels, slice):
            compare(ours, theirs)
        else:
            compare(ours[:2], theirs[:2])
    compare(*both("bn_relu_backward_accumulate", x, norm, normal(rows, c), normal(rows, c)))


@pytest.mark.parametrize("small_betas", [False, True])
@pytest.mark.parametrize(
    ("rows", "c", "b"), [(1, 3, 11), (50, 37, 11), (1031, 200, 11), (77, 75, 52)]
)
def test_products_equal_torch(rows: int, c: int, b: int, small_betas: bool) -> None:
    narrower = max(1, c - 5)
    x, norm, weight = normal(rows, c), norm_of(c), normal(b, c)
    if small_betas:
        # so that T comes from the weight's gradient, in all channels or in all but one
        norm.beta = norm.gamma * 0.1 * norm.rstd
        norm.beta[c // 2] += rows % 2
        norm = Normalization(norm.mean, norm.var, norm.gamma, norm.beta, norm.eps)
    results = []
    for backend in (CpuBackend(torch.float64), TorchBackend()):
        out = torch.empty(rows, b, dtype=torch.float64)
        found = no_statistics(b)
        backend.bn_relu_conv1x1(x, norm, weight, out, found)
        results.append([out, *found])
    compare(*results)
    dy, y, d = normal(rows, b), normal(rows, b), normal(rows, c + 2)
    pending_norm, correction = norm_of(b), (normal(b), normal(b), float(rows))
    again = norm_of(narrower), normal(b, narrower)
    for corrected, with_rebuild in itertools.product((False, True), repeat=2):
        results = []
        for backend in (CpuBackend(torch.float64), TorchBackend()):
            own_d, own_y = d.clone(), y.clone()
            pending = PendingNorm(own_y, pending_norm, correction if corrected else None)
            deferred = Deferred(*torch.ones(2, c, dtype=torch.float64))
            rebuild = Rebuild(*again, own_y) if with_rebuild else None
            dw, *sums = backend.bn_relu_conv1x1_backward(
                x, norm, weight, dy.clone(), own_d[:, :c], True, pending, rebuild, deferred
            )
            assert dw is not None
            results.append([dw, *sums, own_d, own_y, *deferred])
        compare(*results)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("b", "k"), [(11, 4), (3, 1)])
def test_the_convolution_and_its_backward_equal_torch(
    shape: tuple[int, ...], b: int, k: int
) -> None:
    rows = math.prod(shape)
    norm, weight = norm_of(b), normal(k, b, *[3] * (len(shape) - 1))
    source, dout = normal(rows, b), normal(rows, k)
    given = source, norm, weight, shape, normal(rows, k), normal(rows, k), no_statistics(k)
    compare(*both("bn_relu_conv3", *given))
    for need_weight, into_d in itertools.product((True, False), repeat=2):
        results = []
        for backend in (CpuBackend(torch.float64), TorchBackend()):
            dz, d = torch.zeros(rows, b).double(), torch.ones(rows, b + 2).double()
            targets = (None, d[:, :b]) if into_d else (dz, None)
            found = backend.convolve_backward(
                strided(source), norm, weight, dout.clone(), shape, need_weight, *targets
            )
            backend.bn_relu_backward_apply(source, norm, dz, None)
            results.append([t for t in [*found, dz, d] if t is not None])
        masked = source * norm.scale + norm.shift > 0
        for result in results:
            result[-2] *= masked
        compare(*results)


def test_the_same_bits_every_time() -> None:
    backend = CpuBackend(torch.float32)
    rows, c, b = 3000, 100, 24
    x, weight = torch.randn(rows, c), torch.randn(b, c)
    norm, norm2 = (
        Normalization(torch.randn(n), torch.rand(n), torch.randn(n), torch.randn(n), 1e-5)
        for n in (c, b)
    )
    dy = torch.randn(rows, b)
    pending = PendingNorm(torch.randn(rows, b), norm2, None)

    def once() -> list[Tensor]:
        d = torch.zeros(rows, c)
        dw, s, t = backend.bn_relu_conv1x1_backward(
            x, norm, weight, dy.clone(), d, True, pending, None, None
        )
        assert dw is not None
        return [dw, s, t, d]

    first = once()
    for _ in range(3):
        for a, b_ in zip(once(), first, strict=True):
            assert torch.equal(a, b_)


def test_nan_is_passed_on_as_by_torch() -> None:
    x = normal(40, 6)
    x[3, 2] = math.nan
    ours, theirs = both("bn_relu", x, norm_of(6), normal(40, 6))
    assert ours[-1][3, 2].isnan()
    assert torch.equal(ours[-1].isnan(), theirs[-1].isnan())


def test_variance_of_a_large_mean_keeps_its_accuracy() -> None:
    x = torch.randn(5000, 7) + 3000
    mean, var = found = Statistics(*torch.zeros(2, 7))
    CpuBackend(torch.float32).statistics(x, found)
    assert_close(mean.double(), x.double().mean(0), 1e-6)
    assert_close(var.double(), x.double().var(0, unbiased=False), 1e-4)


# ------------------------------------------------------------------------------ compiling


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, threads: int) -> Iterator[Path]:
    """A process that has loaded nothing yet, with an empty cache directory."""
    if threads > 1:
        pytest.skip("threads make no difference")
    monkeypatch.delenv("EFFDENSE_BACKEND", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_library.load.cache_clear()
    select.fault.cache_clear()
    yield tmp_path
    cpu_library.load.cache_clear()
    select.fault.cache_clear()


CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_loops_are_compiled_once_and_without_warnings(unloaded: Path) -> None:
    CpuBackend(torch.float32)
    [made] = (unloaded / "effdense" / "loops").iterdir()
    cpu_library.load.cache_clear()
    before = made.stat().st_mtime_ns
    CpuBackend(torch.float32)
    assert made.stat().st_mtime_ns == before
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None
    strict = ["-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-fopenmp"]
    subprocess.run([compiler, *strict, cpu_library._SOURCES / "loops.c"], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("march", ["haswell", "ivybridge", "x86-64"])
def test_the_loops_for_lesser_processors(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch, march: str
) -> None:
    flags = Path("/proc/cpuinfo").read_text() if platform.machine() == "x86_64" else ""
    if " avx2 " not in flags or " fma " not in flags:
        pytest.skip("this processor is not a greater one")
    compiler = unloaded / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec cc "$@" -march={march}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    torch.set_num_threads(2)
    test_matrix_operations_equal_torch(300)
    for small_betas in (False, True):
        test_products_equal_torch(77, 75, 52, small_betas)
    for shape in ((3, 7, 5), (2, 2, 7, 40)):
        test_the_convolution_and_its_backward_equal_torch(shape, 11, 4)
    assert len(list((unloaded / "effdense" / "loops").iterdir())) == 1


def test_a_compiler_may_be_called_through_another_program(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = unloaded / "a cache"
    own.write_text('#!/bin/sh\necho "$1" > "$0".called\nexec "$@"\n')
    own.chmod(0o755)
    monkeypatch.setenv("CC", str(own))
    assert cpu_library.find_compiler() == [str(own)]
    monkeypatch.setenv("PATH", str(unloaded), prepend=os.pathsep)
    own.rename(unloaded / "cache")
    monkeypatch.setenv("CC", "cache cc -O1")
    assert cpu_library.find_compiler() == [str(unloaded / "cache"), "cc", "-O1"]
    assert select.get_backend("cpu", CPU, torch.float32).name == "cpu"
    assert (unloaded / "cache.called").read_text() == "cc\n"


def test_the_loops_have_room_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    header = (cpu_library._SOURCES / "sums.h").read_text()
    assert f"MOST_THREADS = {cpu_backend._MOST_THREADS}" in header
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5000)
    assert cpu_backend._threads() == cpu_backend._MOST_THREADS


# as Apple's clang says it
NO_OPENMP = """#!/bin/sh
case "$*" in *-fopenmp*) echo "clang: error: unsupported option '-fopenmp'" >&2; exit 1;; esac
exec cc "$@"
"""


@pytest.mark.parametrize("fault", ["absent", "broken", "without OpenMP"])
def test_without_a_compiler_auto_is_torch_and_says_so_once(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    own = unloaded / "compiler"
    own.write_text(NO_OPENMP)
    own.chmod(0o755)
    compilers = {"absent": "no-such-compiler", "broken": "false", "without OpenMP": str(own)}
    monkeypatch.setenv("CC", compilers[fault])
    says = "unsupported option '-fopenmp'" if fault == "without OpenMP" else ""
    with pytest.warns(
        RuntimeWarning, match=f"compiled loops.*torch operations are used instead.*{says}"
    ):
        assert select.get_backend("auto", CPU, torch.float32).name == "torch"
    assert select.get_backend("auto", CPU, torch.float32).name == "torch"
    with pytest.raises(ValueError, match='backend="cpu" needs a C compiler'):
        select.get_backend("cpu", CPU, torch.float32)
    assert not list(unloaded.rglob("*.so"))


def test_types_and_devices_without_loops(unloaded: Path) -> None:
    with pytest.raises(ValueError, match=r"float32 or float64 on a CPU, got torch.bfloat16"):
        select.get_backend("cpu", CPU, torch.bfloat16)
    assert select.get_backend("auto", CPU, torch.bfloat16).name == "torch"


def test_a_user_without_a_home_has_a_cache_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    machine._own_folder.cache_clear()
    try:
        folder = machine.cache_folder("loops")
        assert folder == machine.cache_folder("loops")
        assert folder.is_relative_to(tmp_path)
        assert [made.stat().st_mode & 0o777 for made in tmp_path.iterdir()] == [0o700]
    finally:
        machine._own_folder.cache_clear()


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unloaded / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(unloaded / "file"))
    assert select.get_backend("auto", CPU, torch.float32).name == "cpu"


@pytest.mark.slow
def test_many_processes_may_compile_at_once(unloaded: Path) -> None:
    code = (
        "import torch; from effdense.backends.cpu_backend import CpuBackend; "
        "CpuBackend(torch.float32)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(unloaded), "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(list((unloaded / "effdense" / "loops").iterdir())) == 1
