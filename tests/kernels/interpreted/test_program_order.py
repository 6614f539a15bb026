"""Every kernel makes the same bits, whatever the order of its programs: a device has none."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from effdense import kernels
from effdense.backends.self_check import _cases
from effdense.backends.triton_backend import TritonBackend
from effdense.kernels import bn_relu_conv3
from effdense.kernels.launch import Launcher
from effdense.kernels.launch_table import Launch
from tests.helpers.kernel_arena import Arena
from tests.helpers.program_order import in_every_order

Tensor = torch.Tensor
CPU = torch.device("cpu")
# of a bottleneck of 19: two tiles, and all of it in one
TILES = {"two tiles": Launch(16, 16, 16, programs=6), "one tile": Launch(16, 16, 32, programs=6)}
OPERATIONS = [operation for operation, _ in _cases(torch.float16)]


def all_kernels() -> set[str]:
    """Whatever is declared by ``jit`` of launch.py, in any module of the kernels."""
    found = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.name != "audit":
            names = vars(importlib.import_module(f"effdense.kernels.{module.name}"))
            found |= {name for name, value in names.items() if hasattr(value, "groups")}
    return found


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kernels that were prepared; all weights are packed, however few the rows."""
    names: set[str] = set()
    prepare = Launcher.prepare

    def noted(self: Launcher, kernel: Any, *a: Any, **k: Any) -> Any:
        names.add(kernel.fn.__name__)
        return prepare(self, kernel, *a, **k)

    monkeypatch.setattr(Launcher, "prepare", noted)
    monkeypatch.setattr(bn_relu_conv3, "PACKED_ROWS", 0)
    return names


def run_operation(operation: str, launch: Launch, dtype: torch.dtype) -> list[Tensor]:
    run = dict(_cases(dtype))[operation]
    return run(TritonBackend(lambda *_: launch), CPU, dtype)


@pytest.mark.parametrize(
    ("operation", "tile"),
    [*((operation, "two tiles") for operation in OPERATIONS)]
    + [(operation, "one tile") for operation in ("bn_relu_conv1x1", "bn_relu_conv1x1_backward")],
)
def test_an_operation_in_every_order(operation: str, tile: str, started: set[str]) -> None:
    in_every_order(lambda: run_operation(operation, TILES[tile], torch.float16))
    assert started


def accumulate() -> list[Tensor]:
    """The one operation that no other is made of without a bottleneck."""
    arena = Arena(0)
    x, dz, d = (arena.put(arena.normal(70, 37), torch.float16, output=True) for _ in range(3))
    backend = TritonBackend(lambda *_: TILES["two tiles"])
    return [d, *backend.bn_relu_backward_accumulate(x, arena.norm(x), dz, d)]


def test_sums_onto_a_gradient_in_every_order() -> None:
    in_every_order(accumulate)


def test_no_kernel_is_left_out(started: set[str]) -> None:
    for operation in OPERATIONS:
        run_operation(operation, TILES["two tiles"], torch.float16)
    assert started == all_kernels()


def test_an_order_that_matters_is_noticed() -> None:
    written: list[int] = []

    @triton.jit
    def last_one_wins(p_out):
        tl.store(p_out, tl.program_id(0) + 5 * tl.program_id(1))

    def run() -> Tensor:
        out = torch.zeros(1)
        last_one_wins[(5, 3)](out)
        written.append(int(out))
        return out

    with pytest.raises(AssertionError, match="tensor 0 differs, programs reversed"):
        in_every_order(run)
    assert written == [14, 0]
