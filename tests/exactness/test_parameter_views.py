"""Parameters and buffers that are views of something else: other orders, slices, strides."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effdense import SAVE_MODES
from tests.helpers.compare import Step, assert_identical, assert_same_step, images, step, twins

pytestmark = pytest.mark.usefixtures("device")


def _permuted(t: Tensor) -> Tensor:
    """As files of other frameworks have it, the last dimension first."""
    order = list(range(t.dim()))[::-1]
    return _strided(t) if t.dim() == 1 else t.permute(order).contiguous().permute(order)


def _sliced(t: Tensor) -> Tensor:
    """Columns of something wider."""
    dim = min(1, t.dim() - 1)
    other = torch.full_like(t.narrow(dim, 0, 1), 7)
    return torch.cat([other, t, other], dim).narrow(dim, 1, t.shape[dim])


def _strided(t: Tensor) -> Tensor:
    """Every other number."""
    return torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]


def _expanded(t: Tensor) -> Tensor:
    """One row for all; vectors, of which all would be dead or alive, stay different."""
    return _strided(t) if t.dim() == 1 else t[:1].expand(t.shape)


VIEWS = {"permuted": _permuted, "sliced": _sliced, "strided": _strided, "expanded": _expanded}


def _by_views(view: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def prepare(model: nn.Module) -> None:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    setattr(module, name, nn.Parameter(view(parameter.detach())))
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.dim():
                    module._buffers[name] = view(buffer)

    return prepare


def _steps(model: nn.Module, x: Tensor) -> list[Step]:
    found = [step(model.train(), x)]
    return [*found, step(model.eval(), x)]


def _layouts(model: nn.Module) -> dict[str, list[int]]:
    return {
        name: [stride for stride, size in zip(p.grad.stride(), p.shape, strict=True) if size > 1]
        for name, p in model.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("save", SAVE_MODES)
@pytest.mark.usefixtures("each_backend")
def test_views_of_other_orders_are_read_as_they_are(save: str, view: str) -> None:
    configs: dict[tuple[int, ...], dict[str, Any]] = {
        (37, 30): {"small_inputs": False},
        (5, 6, 7): {"bn_size": None, "spatial_dims": 3},
        (9,): {"spatial_dims": 1},
    }
    for size, config in configs.items():
        ours, naive = twins(save, prepare=_by_views(VIEWS[view]), **config)
        x = images(2, 3, *size)
        for own, expected in zip(_steps(ours, x), _steps(naive, x), strict=True):
            assert_same_step(own, expected)
        assert _layouts(ours) == _layouts(naive)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.usefixtures("each_backend")
def test_views_are_read_as_they_are_in_float32(view: str) -> None:
    ours, _ = twins(prepare=_by_views(VIEWS[view]), dtype=torch.float32)
    plain = copy.deepcopy(ours)
    for tensor in plain.parameters():
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    for module in plain.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)
    x = images(2, 3, 9, 9, dtype=torch.float32)
    for own, expected in zip(_steps(ours, x), _steps(plain, x), strict=True):
        assert_identical(own, expected)
