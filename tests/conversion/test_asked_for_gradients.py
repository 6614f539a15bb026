"""Layers that look whether gradients are asked for: run again in backward, they would be others."""

from __future__ import annotations

import copy
import linecache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import effdense
from tests.helpers.compare import assert_same_step, images, step

pytestmark = pytest.mark.filterwarnings("ignore:effdense")

LAYER = """
class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def asked(self, y):
        return self.training and y.requires_grad

    def frozen(self):
        return not self.training

    def forward(self, x):
        y = F.elu(self.norm(self.conv(x)))
        {}
        return y
"""

DIFFERENT = {
    "whether gradients are on": "y = y * 0.5 if torch.is_grad_enabled() else y",
    "by name": "if torch.is_grad_enabled() is True: y = torch.tanh(y)",
    "a number": "y = y * (0.5 + torch.is_grad_enabled())",
    "what a tensor wants": "if y.requires_grad: y = torch.tanh(y)",
    "a leaf": "if not y.is_leaf: y = torch.tanh(y)",
    "of its own method": "if self.asked(y): y = torch.tanh(y)",
    "one of two": "y = torch.tanh(y) if y.shape[0] > 1 and y.requires_grad else y",
    "dropout": "y = F.dropout(y, 0.5, torch.is_grad_enabled())",
    "a norm": "y = F.batch_norm(y, None, None, training=True) if y.requires_grad else y",
    "a mode": "y = F.batch_norm(y, *stats(y), training=torch.is_grad_enabled())",
    "an index": "y = y + torch.stack([y, -y])[torch.is_grad_enabled() + 0]",
    "a count": "if torch.is_grad_enabled(): self.calls.add_(1)",
    "a context": """with torch.autocast("cpu", torch.bfloat16, enabled=torch.is_grad_enabled()):
            y = y @ y.transpose(-1, -2)""",
}
ALIKE = {
    "nothing": "pass",
    "a checkpoint": """run = lambda y: checkpoint(torch.tanh, y, use_reentrant=False)
        y = run(y) if y.requires_grad else torch.tanh(y)""",
    "its own method": "y = torch.tanh(y) if self.asked(y) else torch.tanh(y)",
    "a mode": "y = torch.tanh(y) if self.frozen() else y",
    "dropout out of training": "y = F.dropout(y, 0.5, self.frozen())",
}


class _Block(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(3 + 4 * i) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def _stats(y: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_zeros(4), y.new_ones(4)


def _pair(line: str) -> tuple[nn.Module, nn.Module]:
    text, name = LAYER.format(line), f"<layer: {line}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    names: dict[str, Any] = {"__name__": "asking", "nn": nn, "F": F, "torch": torch}
    names |= {"checkpoint": checkpoint, "stats": _stats}
    exec(compile(text, name, "exec", dont_inherit=True), names)
    torch.manual_seed(0)
    naive = nn.Sequential(_Block(names["Layer"])).double()
    return effdense.convert(copy.deepcopy(naive)), naive


def _assert_same(ours: nn.Module, naive: nn.Module) -> None:
    for training in (True, False):
        found = []
        for model in (ours.train(training), naive.train(training)):
            torch.manual_seed(1)
            found.append(step(model, images(2, 3, 5, 5)))
        assert_same_step(found[0], found[1])


@pytest.mark.parametrize("what", DIFFERENT)
def test_layers_that_would_be_others_in_backward_are_not_run_there(what: str) -> None:
    ours, naive = _pair(DIFFERENT[what])
    _assert_same(ours, naive)


def test_the_reason_is_in_the_report() -> None:
    ours, _ = _pair(DIFFERENT["what a tensor wants"])
    assert "depends on whether gradients are asked for" in str(effdense.conversion_report(ours))


@pytest.mark.parametrize("what", ALIKE)
def test_layers_whose_branches_agree_are_recomputed(what: str) -> None:
    ours, naive = _pair(ALIKE[what])
    _assert_same(ours, naive)
    output = ours(images(2, 3, 5, 5))
    assert type(output.grad_fn).__name__ == "RecomputedBackward"
