"""Which backend is chosen, and that a broken one is noticed."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from effdense.backends import select
from effdense.backends.select import BACKENDS, get_backend
from effdense.backends.self_check import self_check
from effdense.backends.torch_backend import TorchBackend

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
OPERATIONS = [
    *("statistics", "bn_relu", "bn_relu_backward_reduce", "bn_relu_backward_apply"),
    *("finish_gradient", "bn_relu_conv1x1", "bn_relu_conv1x1_backward"),
    *("bn_relu_conv3", "bn_relu_conv3_backward"),
    *("bn_relu_avg_pool_conv1x1", "bn_relu_avg_pool_conv1x1_backward"),
    *("bn_relu_global_pool", "bn_relu_global_pool_backward"),
]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("EFFDENSE_BACKEND", raising=False)
    caches = select.fault, select.why_not_triton, select._say_that_there_are_none
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


class Broken(TorchBackend):
    """The torch backend with one wrong operation."""

    name = "broken"

    def __init__(self, operation: str, how: str) -> None:
        super().__init__()
        right = getattr(self, operation)

        def wrong(*args: Any) -> Any:
            if how == "raises":
                raise RuntimeError("no kernel image\nis available")
            result = right(*args)
            tensors = [t for t in (result or ()) if isinstance(t, torch.Tensor)]
            # what it returns, or else what it writes: its last matrix, or before a mask
            matrices = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 2]
            if operation == "statistics":
                matrices = [args[1].mean]
            target = (tensors or matrices)[-2 if operation == "bn_relu_conv3" else -1]
            target[..., -1] = float("nan") if how == "nan" else target[..., -1] * 1.5 + 0.5
            return result

        setattr(self, operation, wrong)


def test_auto_is_the_compiled_loops_on_a_cpu_where_they_have_the_type() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_backend("auto", CPU, torch.float32).name == "cpu"
        assert get_backend("auto", CPU, torch.float64).name == "cpu"
        assert get_backend("auto", CPU, torch.bfloat16).name == "torch"


def test_importing_effdense_does_not_import_the_kernels() -> None:
    code = (
        "import sys, torch, effdense; model = effdense.densenet_bc(10, 4); "
        "model(torch.zeros(2, 3, 8, 8)); "
        "assert not [m for m in sys.modules if m.startswith('effdense.kernels.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_import_failure_is_no_failure_of_effdense() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, warnings\n"
        "import effdense\n"
        "from effdense.backends import select\n"
        "model = effdense.densenet_bc(10, 4); model(torch.zeros(2, 3, 8, 8))\n"
        "try: select.get_backend('triton', torch.device('cpu'), torch.float32)\n"
        "except ValueError as e: assert 'importable Triton' in str(e), e\n"
        "else: raise AssertionError\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    gpu = torch.device('cuda', 0)\n"
        "    assert select.get_backend('auto', gpu, torch.float32).name == 'torch'\n"
        "assert 'importing Triton' in str(seen[-1].message), seen\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["", "cuda", "Triton"])
def test_unknown_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='backend must be one of "auto", "torch", "cpu", "triton"'):
        get_backend(name, CPU, torch.float32)
    monkeypatch.setenv("EFFDENSE_BACKEND", name)
    with pytest.raises(ValueError, match='EFFDENSE_BACKEND must be one of "auto", "torch"'):
        get_backend("auto", CPU, torch.float32)


def test_environment_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFDENSE_BACKEND", "torch")
    for name in BACKENDS:
        assert get_backend(name, GPU, torch.float64).name == "torch"
    monkeypatch.setenv("EFFDENSE_BACKEND", "triton")
    with pytest.raises(ValueError, match="float64"):
        get_backend("torch", CPU, torch.float64)


def test_triton_needs_a_device() -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"CUDA or ROCm device, got 'cpu'.*TRITON_INTERPRET=1"):
        get_backend("triton", CPU, torch.float32)
    assert get_backend("triton", GPU, torch.float32).name == "triton"


def test_float64_is_torchs() -> None:
    with pytest.raises(ValueError, match="float64"):
        get_backend("triton", GPU, torch.float64)
    assert get_backend("auto", GPU, torch.float64).name == "torch"


@pytest.mark.parametrize("dtype", select.TRITON_DTYPES)
def test_self_check_accepts_torch_itself(dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    assert self_check(TorchBackend(), CPU, dtype) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_self_check_is_no_autocasts() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert self_check(TorchBackend(), CPU, torch.float32) is None


@pytest.mark.parametrize("how", ["raises", "nan", "wrong"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_self_check_names_the_operation(operation: str, how: str) -> None:
    fault = self_check(Broken(operation, how), CPU, torch.float32)
    assert fault is not None
    named = fault.split(":")[0]
    assert operation == named or (operation.startswith("bn_relu_backward_") and "and" in named)
    expected = "RuntimeError: no kernel image" if how == "raises" else "differs from torch by"
    assert expected in fault
    assert "\n" not in fault


def test_loops_that_fail_are_left_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[torch.dtype] = []

    def check(backend: Any, device: torch.device, dtype: torch.dtype) -> str:
        checks.append(dtype)
        return "bn_relu: differs from torch"

    monkeypatch.setattr(select, "self_check", check)
    with pytest.warns(RuntimeWarning, match=r"self-check on cpu .*bn_relu: differs"):
        assert get_backend("auto", CPU, torch.float32).name == "torch"
    # warnings are errors in this suite: a second one would raise
    assert get_backend("auto", CPU, torch.float32).name == "torch"
    assert checks == [torch.float32]


class FakeGpus:
    """CUDA devices as torch would tell of them, by their compute capabilities."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device: capabilities[device.index]
        )


def test_auto_takes_triton_by_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    FakeGpus(monkeypatch, (8, 0), (7, 5), (12, 0))
    for index in (0, 2):
        device = torch.device("cuda", index)
        assert get_backend("auto", device, torch.float16).name == "triton"
    # without a number: the current one
    assert get_backend("auto", torch.device("cuda"), torch.float16).name == "triton"
    old = torch.device("cuda", 1)
    with pytest.warns(RuntimeWarning, match=r"on cuda:1: its compute capability is 7\.5, and be"):
        assert get_backend("auto", old, torch.float16).name == "torch"
    # said once, for every type
    assert get_backend("auto", old, torch.float32).name == "torch"
    # who asks for it gets it
    assert get_backend("triton", old, torch.float16).name == "triton"


def test_auto_needs_the_compiler_that_triton_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    FakeGpus(monkeypatch, (9, 0))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.warns(RuntimeWarning, match="needs a C compiler, and there is neither gcc nor"):
        assert get_backend("auto", GPU, torch.float16).name == "torch"


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_accelerators_are_told_that_they_run_torch(kind: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"none for '{kind}': torch operations are used"):
        assert get_backend("auto", torch.device(kind), torch.float32).name == "torch"
    assert get_backend("auto", torch.device(kind), torch.float16).name == "torch"


def test_products_follow_a_later_change_of_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    FakeGpus(monkeypatch, (9, 0))
    found = []
    for tf32 in (True, False, True):
        monkeypatch.setattr(select, "tf32_convolutions", lambda tf32=tf32: tf32)
        backend: Any = get_backend("auto", GPU, torch.float32)
        found.append(backend._precision)
    assert found == ["tf32", "ieee", "tf32"]


def test_the_check_does_not_care_on_what_device_new_tensors_are() -> None:
    """As around a model that is built on meta, and estimated there."""
    with torch.device("meta"):
        assert self_check(TorchBackend("cpu"), torch.device("cpu"), torch.float32) is None
