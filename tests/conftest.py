from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.helpers.places import at, place

# The tests' tensors are tiny: threads only wait for each other.
torch.set_num_threads(1)

# without it, deterministic products are refused on a GPU; read when it is first used
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--another-device",
        action="store_true",
        help="what runs on every device runs on tests/helpers/another_device.py too",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--another-device"):
        from tests.helpers import another_device

        # before the first backward, which starts a thread for each device that there is
        another_device.register()


def _names(mark: pytest.Mark) -> list[str]:
    """The arguments that a ``parametrize`` is of."""
    names: str | list[str] = mark.args[0]
    return [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of ``device`` or ``each_place``, on every device; skipped by name without one."""
    absent = pytest.mark.skipif(
        not torch.cuda.is_available(), reason="torch sees no CUDA device here"
    )
    others: list[Any] = [pytest.param("cuda", marks=[pytest.mark.gpu, absent])]
    marked = metafunc.definition.get_closest_marker
    if metafunc.config.getoption("--another-device") and not marked("real_device"):
        others.append("another")
    if marked("only_cpu"):
        others = []
    # a test may have devices of its own, such as the names of a compiler's targets
    own = {n for mark in metafunc.definition.iter_markers("parametrize") for n in _names(mark)}
    # and a module another fixture of the name
    own |= vars(metafunc.module).keys()
    for name, here in (("device", ["cpu"]), ("each_place", ["cpu", "torch"])):
        if name in metafunc.fixturenames and name not in own:
            metafunc.parametrize(name, [*here, *others], indirect=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whichever ran before it in the process."""
    torch.manual_seed(0)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every kind of device, where the test's networks and images are."""
    with at(request.param) as found:
        yield found


@pytest.fixture
def each_place(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """Every backend that computes in float64, on every kind of device, in place of "auto"."""
    on_cpu = request.param in ("cpu", "torch")
    monkeypatch.setenv("EFFDENSE_BACKEND", request.param if on_cpu else "torch")
    with at("cpu" if on_cpu else request.param) as found:
        yield found


@pytest.fixture(params=["cpu", "torch"])
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend that computes in float64 here, in place of "auto"."""
    monkeypatch.setenv("EFFDENSE_BACKEND", request.param)
    return str(request.param)


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """Every ``torch.empty`` holds NaN, so an element that is read unwritten can't hide."""
    # a GPU has no deterministic way of some poolings, which is only said there
    torch.use_deterministic_algorithms(True, warn_only=place().type != "cpu")
    yield
    torch.use_deterministic_algorithms(False)
