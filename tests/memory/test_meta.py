"""Steps on meta of what is no DenseNet: their bytes are those of real steps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effdense.memory.estimation import places
from effdense.memory.meta import meta_result
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


_ROWS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _simulated(operation: Any, *args: Any) -> Any:
    on_meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
    found = meta_result(operation, on_meta, {})
    return operation(*on_meta) if found is NotImplemented else found


def _layout(x: Tensor) -> list[tuple[int, int]]:
    return [own for own in zip(x.shape, x.stride(), strict=True) if own[0] > 1]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("images", "channels", "kernel"), [(2, 3, 3), (1, 3, 5), (2, 1, 3), (2, 5, 1)]
)
def test_a_simulated_operation_has_the_layout_of_a_real_one(
    dims: int, dtype: torch.dtype, images: int, channels: int, kernel: int
) -> None:
    """What was taken for row-major would be copied where no device copies."""
    layouts = (
        [torch.contiguous_format] * 2 if dims == 1 else [torch.contiguous_format, _ROWS[dims + 2]]
    )
    for of_x, of_weight in itertools.product(layouts, repeat=2):
        x = torch.randn(images, channels, *[9] * dims).to(dtype, memory_format=of_x)
        weight = torch.randn(6, channels, *[kernel] * dims).to(dtype, memory_format=of_weight)
        geometry = [2] * dims, [1] * dims, [1] * dims, False, [0] * dims, 1
        convolution = torch.ops.aten.convolution.default, x, weight, None, *geometry
        y = convolution[0](*convolution[1:])
        assert _layout(_simulated(*convolution)) == _layout(y), (of_x, of_weight)
        if dims < 2 or dtype == torch.bfloat16:
            continue
        aten = torch.ops.aten
        forward = aten.max_pool2d_with_indices if dims == 2 else aten.max_pool3d_with_indices
        backward = getattr(aten, f"{forward.__name__}_backward").default
        windows = [3] * dims, [2] * dims, [1] * dims, [1] * dims, False
        pooled, where = forward(x, *windows)
        assert _layout(_simulated(forward.default, x, *windows)[0]) == _layout(pooled)
        spread = backward, torch.ones_like(pooled), x, *windows, where
        assert _layout(_simulated(*spread)) == _layout(backward(*spread[1:]))
