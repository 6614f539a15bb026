"""Steps on meta of what is no DenseNet: their bytes are those of real steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from effdense.memory.estimation import places
from effdense.memory.optimizers import make_optimizer
from effdense.memory.timeline import Peak, Training, record_step


class _Widened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float() + 1


def _peak(device: str, dtype: torch.dtype | None) -> Peak:
    def build() -> Training:
        wide = [nn.Sequential(nn.Conv2d(8, 8, 1), _Widened()) for _ in range(3)]
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        model = nn.Sequential(nn.Conv2d(3, 8, 1), *wide, *head).to(device)
        optimizer = make_optimizer("sgd", model.parameters(), momentum=0.9)
        x = torch.empty((4, 3, 20, 20), device=device).normal_()
        target = torch.zeros(4, dtype=torch.int64, device=device)
        return Training(model, optimizer, x, target, dtype)

    return record_step(build, places=places)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_autocast_casts_twice_is_not_kept(dtype: torch.dtype | None) -> None:
    """Of activations; parameters' copies are kept, as torch does."""
    real, found = _peak("cpu", dtype), _peak("meta", dtype)
    assert found.total == pytest.approx(real.total, rel=0.01)
