from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# The tests' tensors are tiny: threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """Every ``torch.empty`` holds NaN, so an element that is read unwritten can't hide."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


DEVICES = (
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason="torch sees no CUDA device here"
        ),
    ),
)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every kind of device; one that is not there is skipped by name."""
    return torch.device(request.param)


@pytest.fixture(params=["cpu", "torch"])
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend that computes in float64 here, in place of "auto"."""
    monkeypatch.setenv("EFFDENSE_BACKEND", request.param)
    return str(request.param)
