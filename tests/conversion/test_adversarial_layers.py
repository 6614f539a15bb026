"""Layers that are almost dense layers: converted, a block computes what it computed before.

Operations are inserted at every place of a dense layer's forward, in a class made from that
text. Original and converted block then see the same inputs, of two sizes, in training and in
eval mode, from the same state of all random generators: outputs, gradients and what the layers
stored must agree. Whether a block was fused, recomputed or left is for recognition to say;
that it fuses the plain one keeps this from passing by converting nothing.
"""

from __future__ import annotations

import copy
import linecache
import random
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from effdense.verification.comparison import randomize_norms
from tests.helpers.compare import assert_close, images, loss_of, stages_in

pytestmark = pytest.mark.filterwarnings("ignore:effdense")

LAYER = """
class Layer(nn.Module):
    rate = 0.5

    def __init__(self, width, growth):
        super().__init__()
        self.n1 = nn.BatchNorm2d(width)
        self.c1 = nn.Conv2d(width, 2 * growth, 1, bias=False)
        self.n2 = nn.BatchNorm2d(2 * growth)
        self.c2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.scale = 1.5
        self.options = {{"scale": 0.5}}
        self.history = []

    @property
    def half(self):
        return 0.5

    def resting(self):
        return not self.training

    def training_on(self, v):
        return self.training and v.shape[0] > 2

    def twice(self, v):
        return v + v

    def forward(self, x):
        {0}
        a = self.n1(x)
        {1}
        b = self.act(a)
        {2}
        c = self.c1(b)
        {3}
        d = self.n2(c)
        {4}
        e = F.relu(d)
        {5}
        f = self.c2(e)
        {6}
        g = torch.cat([x, f], 1)
        {7}
        return g
"""
PLACES = "xabcdefg"

# what is inserted; v stands for the variable that was made last
OPERATIONS = {
    "nothing": "v = v",
    "a clone": "v = v.clone()",
    "tanh": "v = torch.tanh(v)",
    "a method": "v = v.tanh()",
    "detach": "v = v.detach()",
    "data": "v = v.data",
    "a scale": "v = 0.5 * v",
    "a shift": "v = v + 0.1",
    "a power": "v = v ** 2",
    "an attribute's scale": "v = v * self.scale",
    "a dictionary's scale": "v = v * self.options['scale']",
    "a class's scale": "v = v * self.rate",
    "a property's scale": "v = v * self.half",
    "a method of its own": "v = self.twice(v)",
    "a lambda": "v = (lambda w: w * 0.5)(v)",
    "a function that keeps it": "v = same(v)",
    "an object's scale": "v = v * CONFIG.scale",
    "a global list's length": "COUNTS.append(1); v = v * len(COUNTS)",
    "a global number": "v = v * SCALE",
    "chance": "v = v * random.random()",
    "noise": "v = v + torch.randn_like(v)",
    "dropout": "v = F.dropout(v, 0.5, self.training)",
    "dropout out of training": "v = F.dropout(v, 0.5, self.resting())",
    "dropout in some training": "v = F.dropout(v, 0.5, self.training_on(v))",
    "dropout in any mode": "v = F.dropout(v, 0.5)",
    "a counter": "self.scale += 1; v = v * self.scale",
    "a history": "self.history.append(v.detach().sum().item())",
    "a stored tensor": "self.seen = v.detach().clone()",
    "a stored attribute": "setattr(self, 'seen', v.detach().clone())",
    "a branch on values": "v = v if v.sum() > 0 else -v",
    "a branch on a size": "v = v.tanh() if v.shape[0] > 2 else v",
    "a branch on an odd size": "v = v * (1 + v.size(-1) % 2)",
    "a branch on the mode": "v = v.tanh() if self.training else v",
    "a branch on gradients": "v = v.tanh() if v.requires_grad else v",
    "a branch without a difference": "v = v if v.shape[0] > 2 else v",
    "a loop": "\n".join(["for i in range(2):", "            v = v * 0.9"]),
    "a hook on the gradient": "v.requires_grad and v.register_hook(lambda g: 2 * g)",
    "a function with its own gradient": "v = Doubled.apply(v)",
    "an operation in place": "v = v.mul_(1.5) if not v.is_leaf else v",
    "a value set in place": "v = v.clone(); v[:, 0] = 0",
    "a view changed in place": "v = v.clone(); v.view(-1)[0] = 3",
    "no gradient": "\n".join(["with torch.no_grad():", "            v = v * 1.0"]),
    "an exception that is caught": "\n".join(
        ["try:", "            v = v * 2", "        except Exception:", "            pass"]
    ),
    "a norm's buffer": "self.n1.running_mean.mul_(0.5)",
    "a norm twice": "self.n2(torch.ones(2, self.n2.num_features, 2, 2, dtype=x.dtype))",
    "another attribute of a norm": "self.n1.eps = 0.1",
    "a checkpoint": "v = checkpoint(lambda w: w * 2, v, use_reentrant=False)",
    "a hasattr": "v = v * 2 if hasattr(self, 'seen') else v",
    "a walrus": "v = (w := v * 2) + w",
    "a comprehension": "v = sum([v * i for i in (1, 2)], 0)",
    "an assertion": "assert v.shape[0] > 0",
    "a print": "print(end='')",
    "the world's state": "torch.manual_seed(v.shape[0]); v = v * torch.rand(())",
}


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return 2 * gradient


def _layer_class(operation: str, place: int) -> Any:
    """The layer's class from its text, with names of its own around it."""
    inserted = ["pass"] * len(PLACES)
    variable = PLACES[place]
    lines = (f"v = {variable}", OPERATIONS[operation], f"{variable} = v")
    inserted[place] = "\n        ".join(lines)
    text = LAYER.format(*inserted)
    name = f"<{operation} at {place}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    from torch.utils.checkpoint import checkpoint

    names: dict[str, Any] = {
        "__name__": "adversary",
        "nn": nn,
        "F": F,
        "torch": torch,
        "random": random,
        "checkpoint": checkpoint,
        "Doubled": _Doubled,
        "CONFIG": types.SimpleNamespace(scale=0.7),
        "COUNTS": [],
        "SCALE": 0.8,
        "same": lambda v: v,
    }
    exec(compile(text, name, "exec", dont_inherit=True), names)
    return names["Layer"]


def _pair(make: Callable[[], Any], layers: int = 2) -> tuple[nn.Module, nn.Module]:
    """A block and its twin, of two classes, so that what they store can't meet."""
    blocks = []
    for _ in range(2):
        kind = make()
        torch.manual_seed(0)
        block = nn.Sequential(*(kind(3 + 2 * i, 2) for i in range(layers))).double()
        randomize_norms(block)
        blocks.append(nn.Sequential(block))
    return blocks[0], blocks[1]


def _step(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """All that a forward and a backward leave behind, by name; the error where they fail."""
    torch.manual_seed(1)
    random.seed(1)
    model.zero_grad()
    x = x.clone().requires_grad_()
    found: dict[str, Any] = {}
    try:
        # a leaf may not be changed in place
        output = model(x * 1)
        found["output"] = output.detach().clone()
        loss_of(output).backward()
    except (RuntimeError, AttributeError, TypeError) as error:
        return {"error": type(error)}
    found["x"] = x.grad
    found |= {name: p.grad for name, p in model.named_parameters()}
    found |= dict(model.named_buffers())
    for name, module in model.named_modules():
        for attribute in ("seen", "scale", "history", "eps"):
            if attribute in vars(module):
                found[f"{name}.{attribute}"] = copy.deepcopy(vars(module)[attribute])
    return found


def _assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            assert actual[name] is not None, name
            assert_close(actual[name], value, name=name)
        elif isinstance(value, Tensor):
            assert torch.equal(actual[name], value), name
        elif isinstance(value, list):
            assert actual[name] == pytest.approx(value, rel=1e-10), name
        else:
            assert actual[name] == value, name


def _convert(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return effdense.convert(model)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_at_any_place_of_a_layer(operation: str) -> None:
    for place in range(len(PLACES)):
        ours, naive = _pair(lambda place=place: _layer_class(operation, place))  # type: ignore[misc]
        _convert(ours)
        for training in (True, False, True):
            ours.train(training), naive.train(training)
            for shape in ((2, 3, 5, 4), (4, 3, 4, 6)):
                x = images(*shape)
                _assert_same(_step(ours, x), _step(naive, x))


@pytest.mark.parametrize(
    "operation", ["nothing", "a branch without a difference", "a function that keeps it"]
)
def test_what_changes_nothing_is_fused(operation: str) -> None:
    for place in range(len(PLACES)):
        ours, _ = _pair(lambda place=place: _layer_class(operation, place))  # type: ignore[misc]
        _convert(ours)
        assert stages_in(ours(images(2, 3, 5, 4))) == 1


# --------------------------------------------------------------- changed after conversion


def _patch_forward(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x).tanh())


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "Layer"]


def _set_on_each(name: str, value: Any) -> Callable[[Any, pytest.MonkeyPatch], object]:
    def change(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        for layer in _layers(model):
            setattr(layer, name, value)

    return change


def _new_code(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(_layers(model)[0])
    kind.forward.__code__ = _layer_class("tanh", 6).forward.__code__


def _names_of(model: Any) -> dict[str, Any]:
    names: dict[str, Any] = type(_layers(model)[0]).forward.__globals__
    return names


AFTERWARDS: dict[str, Callable[[Any, pytest.MonkeyPatch], object]] = {
    "an activation": _set_on_each("act", nn.Tanh()),
    "an activation that is a function": lambda model, monkeypatch: [
        (layer._modules.pop("act"), vars(layer).update(act=torch.tanh)) for layer in _layers(model)
    ],
    "a forward on the instance": lambda model, monkeypatch: [
        vars(layer).update(forward=lambda x, f=layer.forward: f(x).tanh())
        for layer in _layers(model)
    ],
    "a call on the class": lambda model, monkeypatch: setattr(
        type(_layers(model)[0]), "__call__", lambda self, x: nn.Module.__call__(self, x).tanh()
    ),
    "a forward of the class": lambda model, monkeypatch: _patch_forward(
        type(_layers(model)[0]), monkeypatch
    ),
    "the code of a forward": _new_code,
    "a global name": lambda model, monkeypatch: _names_of(model).update(
        F=types.SimpleNamespace(relu=torch.tanh)
    ),
    "a hook": lambda model, monkeypatch: [
        layer.n1.register_forward_hook(lambda m, i, o: o.tanh()) for layer in _layers(model)
    ],
    "a bias": lambda model, monkeypatch: [
        layer.c2.register_parameter("bias", nn.Parameter(torch.ones(2).double()))
        for layer in _layers(model)
    ],
    "an eps": lambda model, monkeypatch: [
        vars(layer.n1).update(eps=0.3) for layer in _layers(model)
    ],
    "a padding": lambda model, monkeypatch: [
        vars(layer.c2).update(
            padding_mode="circular", _reversed_padding_repeated_twice=[1, 1, 1, 1]
        )
        for layer in _layers(model)
    ],
    "the order of layers": lambda model, monkeypatch: setattr(
        model[0], "_modules", dict(reversed(model[0]._modules.items()))
    ),
}


@pytest.mark.parametrize("change", AFTERWARDS)
def test_a_change_after_conversion_is_honoured(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, naive = _pair(lambda: _layer_class("nothing", 0))
    _convert(ours)
    x = images(2, 3, 5, 4)
    _assert_same(_step(ours, x), _step(naive, x))
    for model in (ours, naive):
        AFTERWARDS[change](model, monkeypatch)
    for _ in range(2):
        actual, expected = _step(ours, x), _step(naive, x)
        assert actual.keys() == expected.keys()
        _assert_same(actual, expected)


class _Block(nn.Module):
    """What is computed hangs on an attribute that stands on the class."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_layer_class("nothing", 0)(3 + 2 * i, 2) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x if self.scale == 1.0 else x * self.scale


class _Transition(nn.Module):
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(7)
        self.conv = nn.Conv2d(7, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)
        return x if self.scale == 1.0 else x * self.scale


def _rename_note(module: Any) -> None:
    del module.note
    module.scale = 0.5


@pytest.mark.parametrize("which", [0, 1])
def test_an_attribute_that_comes_or_goes_after_conversion_is_honoured(which: int) -> None:
    torch.manual_seed(0)
    naive = nn.Sequential(_Block(), _Transition()).double()
    randomize_norms(naive)
    ours = _convert(copy.deepcopy(naive))
    x = images(2, 3, 6, 4)
    naive(x)
    assert stages_in(ours(x)) == 1
    for change in (
        lambda module: setattr(module, "scale", 0.5),
        lambda module: setattr(module, "scale", 0.25),
        lambda module: delattr(module, "scale"),
        # put there from the beginning, and gone later
        lambda module: setattr(module, "note", 1),
        _rename_note,
    ):
        for model in (ours, naive):
            change(model.get_submodule(str(which)))
        for _ in range(2):
            _assert_same(_step(ours, x), _step(naive, x))


def test_a_forward_of_torchs_that_is_replaced_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, naive = _pair(lambda: _layer_class("nothing", 0))
    _convert(ours)
    x = images(2, 3, 5, 4)
    assert stages_in(ours(x)) == 1
    naive(x)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x.tanh())
    _assert_same(_step(ours, x), _step(naive, x))
    monkeypatch.undo()
    assert stages_in(ours(x)) == 1
