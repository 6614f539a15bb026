"""Layers that are no functions are refused by the end of backward, which waits for it once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import effdense
from tests.helpers.compare import images
from tests.helpers.places import placed

pytestmark = pytest.mark.usefixtures("device")

REFUSED = "layer 1 of a dense block computed something else in backward"


class _Layer(nn.Module):
    """Computes something else each time that it is told to."""

    def __init__(self, width: int, changes: bool) -> None:
        super().__init__()
        self.conv, self.changes, self.calls = nn.Conv2d(width, 3, 1), changes, [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += self.changes
        return torch.tanh(self.conv(x)) * (1 + 1e-3 * self.calls[0])


def _model(*changes: bool) -> nn.Module:
    """Two blocks of layers that nobody can follow."""
    torch.manual_seed(0)
    widths = range(3, 3 + 3 * len(changes), 3)
    layers = [_Layer(width, change) for width, change in zip(widths, changes, strict=True)]
    half = len(layers) // 2
    blocks = [effdense.DenseBlock(part) for part in (layers[:half], layers[half:])]
    return placed(nn.Sequential(*blocks).double())


class _Reads(TorchDispatchMode):
    """Counts what waits for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [(False, True, False, False), (False, False, False, True)])
@pytest.mark.parametrize("way", ["backward", "grad", "checkpointed", "second backward"])
def test_what_is_no_function_is_refused_before_anybody_could_step(
    way: str, changes: tuple[bool, ...]
) -> None:
    model = _model(*changes)
    x = images(2, 3, 4, 5).requires_grad_()
    if way == "checkpointed":
        loss = checkpoint(model, x, use_reentrant=False).square().sum()
    else:
        loss = model(x).square().sum()
    calls: dict[str, Callable[[], object]] = {
        "grad": lambda: torch.autograd.grad(loss, x),
        "second backward": lambda: loss.backward(retain_graph=True),
    }
    call = calls.get(way, loss.backward)
    for _ in range(2 if way == "second backward" else 1):
        with pytest.raises(RuntimeError, match=REFUSED):
            call()
    # what was noted for that pass is nobody else's
    model = _model(*[False] * 4)
    model(x).square().sum().backward()


def test_parameters_stepped_in_backward_are_not_stepped_by_what_is_refused() -> None:
    model = _model(False, False, False, True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    stepped: list[Tensor] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(stepped.append)
    with pytest.raises(RuntimeError, match=REFUSED):
        model(images(2, 3, 4, 5)).square().sum().backward()
    assert stepped == []
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.only_cpu
def test_a_backward_is_waited_for_once_however_many_layers_there_are() -> None:
    for layers in (4, 8):
        model = _model(*[False] * layers)
        loss = model(images(2, 3, 4, 5)).square().sum()
        # the mode of this thread, which a CPU's backward runs in
        with _Reads() as reads:
            loss.backward()
        assert reads.count == 1
