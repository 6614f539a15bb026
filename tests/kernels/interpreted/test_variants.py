"""Kernels are checked when they are first met, and an operation that is wrong is left to torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from triton.runtime.errors import OutOfResources

import effdense
from effdense.backends import select, triton_backend, variants
from effdense.backends.base import Statistics
from effdense.backends.dry_run import DryRun
from effdense.backends.triton_backend import TritonBackend, checks_of
from effdense.commands import env
from effdense.kernels.launch import InterpretedStart
from effdense.kernels.launch_table import Architecture, Launch

Tensor = torch.Tensor
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    checks_of.cache_clear()
    yield
    checks_of.cache_clear()


def tile(operation: str, like: Tensor, channels: int, bottleneck: int = 0) -> Launch:
    # many rows a tile: the interpreter's time goes by programs, and a check has several in any case
    return Launch(64, 16, 16, programs=6)


def gradients(backend: str, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    # the second block has another prefix, and so another alignment
    model = effdense.DenseNet(5, (2, 1), 7, num_classes=3, small_inputs=True, **options)
    module: Any
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    model = model.to(dtype)
    spatial = [5, 4, 6][: options.get("spatial_dims", 2)]
    images = torch.randn(2, 3, *spatial, generator=torch.Generator().manual_seed(1)).to(dtype)
    model(images).float().square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def checked(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[Tensor], Any]:
    backend = TritonBackend(tile, checked=True)
    with mock.patch.object(select, "_triton_for", return_value=backend):
        return gradients("triton", dtype, **options), backend


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float16, {"drop_rate": 0.2, "save": "bottlenecks"}),
        (torch.bfloat16, {"spatial_dims": 1}),
        (torch.float32, {"bn_size": None, "spatial_dims": 3}),
    ],
)
def test_everything_that_runs_was_checked(dtype: torch.dtype, options: dict[str, Any]) -> None:
    checks = checks_of(CPU)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="effdense")
        _, backend = checked(dtype, **options)
    assert backend._refused == set()
    (launcher,) = backend._launchers.values()
    assert {key[0] for key in launcher.prepared} == {v.operation for v in checks.trusted}
    assert checks.cost.variants == len(checks.trusted) >= 8
    assert checks.cost.compiling > 0
    assert checks.cost.seconds > 0
    # once in a process
    again, _ = checked(dtype, **options)
    assert checks.cost.variants == len(checks.trusted)
    assert again


# of Triton 3.3's interpreter, which pytest.warns would raise as unexpected
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("how", ["wrong", "NaN", "raises"])
def test_an_operation_that_fails_is_left_to_torch(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gradients("torch")
    bind = InterpretedStart.bind

    def broken(self: Any, tensors: tuple[Tensor, ...], floats: tuple[float, ...]) -> Any:
        hit = self.kernel.fn.__name__ == "bn_relu_conv1x1_bwd_kernel"
        if hit and how == "raises":
            raise OutOfResources(300000, 232448, "shared memory")
        bind(self, tensors, floats)
        if hit:
            tensors[-2][-1] = float("nan") if how == "NaN" else 3.0

    monkeypatch.setattr(InterpretedStart, "bind", broken)
    said = {"wrong": "differs from torch by", "NaN": "by nan", "raises": "OutOfResources"}[how]
    with pytest.warns(RuntimeWarning, match=f"bn_relu_conv1x1_backward failed .*{said}") as seen:
        found, backend = checked()
    assert [warning.category for warning in seen].count(RuntimeWarning) == 1
    assert {function.__name__ for _, function in backend._refused} == {"bn_relu_conv1x1_backward"}
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_default_device_does_not_matter() -> None:
    backend = TritonBackend(tile, checked=True)
    x = torch.randn(70, 32)
    found = Statistics(torch.empty(32), torch.empty(32))
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.filterwarnings("error", message="effdense")
        backend.statistics(x, found)
    assert backend._refused == set()
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-5, atol=1e-6)


def test_a_capture_that_meets_a_new_kernel_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(triton_backend, "checks_of", lambda device: variants.Checks(gpu))
    with pytest.raises(RuntimeError, match="take a step on these shapes before"):
        checked()


@pytest.mark.slow
def test_what_env_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that densenet121 runs on an H100, in its tiles, in the interpreter."""
    monkeypatch.setattr(env, "NETWORKS", env.NETWORKS[-1:])
    dry = DryRun(Architecture("cuda", 90, 132), tf32=True)
    said = env.checked_variants(CPU, torch.bfloat16, dry)
    assert len(dry.met) >= 20
    assert said.startswith(f"{len(dry.met)} variants of kernels checked in ")
    assert said.endswith("all ok")
