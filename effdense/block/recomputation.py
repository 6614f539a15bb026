"""Dense blocks of layers of any kind: one feature buffer, each layer run again in backward.

What the fused stage (dense_block.py) does for BN-ReLU-Conv layers by their mathematics, this
does for any layer through autograd: forward keeps the features once, backward goes through
the layers from the last to the first, computes each again from the features before it, and
adds its input's gradient to one gradient buffer.

NOTE [ the second run ]
must compute what the first did, and leave no trace. So each layer's first run is preceded by
notes: the state of the random generators, of autocast, which of its modules train, and copies
of the layer's buffers. The second runs under these, on the copies (a batch norm's running
statistics move once) and on the parameters as autograd saved them (one changed in between
raises).

Known limitations: a layer must be a function of its input, parameters, buffers and torch's
random generators, which backward sees where nobody has followed its code: in a block of one's
own, unless save is "input". It runs twice, so what it prints or counts happens twice. No
second derivatives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..autocast import autocast, autocast_dtype
from ..backends.layout import channels
from ..backends.sharing import copy_on_write
from ..choices import Save
from ..differentiation import Anchor, first_order
from ..recognition.parts import Chain, layers_of
from ..tracing import recorded_constants


def run_chain(block: nn.Module, chain: Chain, x: Tensor, save: Save) -> Tensor:
    """All features of a block: (N, C0, *spatial) to (N, C, *spatial).

    Raises:
        TypeError, ValueError: where a layer returns something else than new features.
    """
    layers = layers_of(block)
    names = [[name for name, _ in layer.named_parameters()] for layer in layers]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    run = _Run(layers, names, chain, save, torch.is_grad_enabled(), Anchor(x))
    return Recomputed.apply(run, x, *parameters)


class _Run(NamedTuple):
    """One forward's constants; ``names`` are the parameters' of each layer."""

    layers: list[nn.Module]
    names: list[list[str]]
    chain: Chain
    save: Save
    keep: bool
    anchor: Anchor


class _RandomState(NamedTuple):
    """Of torch's own generator, and of the device's, where that is another one."""

    host: Tensor
    device: Tensor | None

    @staticmethod
    def of(device: torch.device) -> _RandomState:
        own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return _RandomState(torch.get_rng_state(), own)

    def equals(self, other: _RandomState) -> bool:
        """Whether nothing was drawn in between."""
        pairs = zip(self, other, strict=True)
        return all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None)


class _Notes(NamedTuple):
    """What one layer's first run depended on; see NOTE [ the second run ]."""

    random: _RandomState | None
    """None while operations are recorded, which are those of layers that draw nothing."""
    buffers: dict[str, Tensor]
    training: list[bool]
    """Of each of the layer's modules."""


class Recomputed(torch.autograd.Function):
    """``apply(run, x, *parameters)``: the features (N, C, *spatial)."""

    @staticmethod
    def forward(ctx: Any, run: _Run, x: Tensor, *parameters: Tensor) -> Tensor:
        features = _Features(x, run.chain.newest_first, len(run.layers))
        notes = []
        for layer in run.layers:
            if run.keep:
                notes.append(_take_notes(layer, x.device))
            out = _run_layer(layer, _argument(run.chain, features.read()))
            features.add(_new_features(out, run, features))
        output = features.finish()
        ctx.run, ctx.notes, ctx.widths = run, notes, features.widths
        ctx.anchor = run.anchor
        ctx.autocast = (x.device.type, autocast_dtype(x.device))
        if run.keep:
            after = None if recorded_constants.get() is not None else _RandomState.of(x.device)
            ctx.objection = partial(_objection, run.chain, notes[0].random, after)
            ctx.input_dtype = x.dtype
            ctx.save_for_backward(x if run.save == "input" else output, *parameters)
        ctx.set_materialize_grads(False)
        # users may write what they are given
        return copy_on_write(output)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor | None) -> Any:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        kept, *parameters = ctx.saved_tensors
        with autocast(*ctx.autocast):
            second = _SecondRun(ctx.run, ctx.notes, ctx.widths, ctx.input_dtype, parameters)
            grad_x, grads = second.backward(kept, grad_output, ctx.needs_input_grad[1:])
        return (None, grad_x, *grads)


def _objection(chain: Chain, before: _RandomState | None, after: _RandomState | None) -> str | None:
    """Why both runs can't be recorded, and done again without Python; None where they can."""
    if not chain.followed:
        return "what Python does in its layers, which are recomputed, is not known"
    if before is not None and after is not None and not before.equals(after):
        return "its layers, which are recomputed, draw random numbers"
    return None


class _Features:
    """The buffer that grows by each layer's features; at one end, so reading is a view of it."""

    def __init__(self, x: Tensor, newest_first: bool, layers: int) -> None:
        self.x, self.newest_first, self.layers = x, newest_first, layers
        # of the input, and of each layer's new features
        self.widths = [x.shape[1]]
        self.buffer: Tensor | None = None

    def read(self) -> Tensor:
        """A dense copy of all features so far: layers may take views of it, or change it."""
        if self.buffer is None:
            return dense_copy(self.x, self.x)
        return dense_copy(self.buffer[:, self._channels(0, sum(self.widths))], self.x)

    def add(self, new: Tensor) -> None:
        width = sum(self.widths)
        self._fit(new, width + new.shape[1])
        self.widths.append(new.shape[1])
        assert self.buffer is not None
        self.buffer[:, self._channels(width, width + new.shape[1])] = new

    def finish(self) -> Tensor:
        width = sum(self.widths)
        assert self.buffer is not None
        if self.buffer.shape[1] == width:
            return self.buffer
        return dense_copy(self.buffer[:, self._channels(0, width)], self.x)

    def _fit(self, new: Tensor, width: int) -> None:
        """A buffer for ``width`` channels and, if the layers to come add as many, for theirs."""
        old, before = self.buffer, sum(self.widths)
        dtype = torch.promote_types(self.x.dtype if old is None else old.dtype, new.dtype)
        if old is not None and old.shape[1] >= width and old.dtype == dtype:
            return
        left = self.layers - len(self.widths)
        shape = (self.x.shape[0], width + left * new.shape[1], *self.x.shape[2:])
        earlier = self.x if old is None else old[:, self._channels(0, before)]
        self.buffer = torch.empty(
            shape, dtype=dtype, device=self.x.device, memory_format=_layout(self.x)
        )
        self.buffer[:, self._channels(0, before)] = earlier

    def _channels(self, start: int, stop: int) -> slice:
        assert self.buffer is not None
        return channels(start, stop, self.buffer.shape[1], self.newest_first)


class _SecondRun:
    def __init__(
        self,
        run: _Run,
        notes: list[_Notes],
        widths: list[int],
        input_dtype: torch.dtype,
        parameters: Sequence[Tensor],
    ) -> None:
        self.run, self.notes, self.input_dtype = run, notes, input_dtype
        self.stops = [sum(widths[: i + 1]) for i in range(len(widths))]
        self.comparisons: list[tuple[int, Tensor]] = []
        self.parameters: list[Sequence[Tensor]] = []
        first = 0
        for names in run.names:
            self.parameters.append(parameters[first : first + len(names)])
            first += len(names)

    def backward(
        self, kept: Tensor, grad_output: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        needs_x, needs = needs[0], needs[1:]
        grads: list[Tensor | None] = []
        buffer = self._rebuilt(kept) if self.run.save == "input" else kept
        d = grad_output.to(buffer.dtype, copy=True, memory_format=_layout(buffer))
        last = len(needs)
        for index in reversed(range(len(self.run.layers))):
            parameters = self.parameters[index]
            wanted = needs[last - len(parameters) : last]
            last -= len(parameters)
            deeper = needs_x or any(needs[:last])
            own: list[Tensor | None] = [None] * len(parameters)
            if deeper or any(wanted):
                own = self._layer_backward(index, buffer, d, wanted, deeper)
            grads[:0] = own
        _judge(self.comparisons, self.run.layers)
        if not needs_x:
            return None, grads
        grad_x = dense_copy(d[:, self._channels(0, self.stops[0])], d)
        return grad_x.to(self.input_dtype), grads

    def _layer_backward(
        self, index: int, buffer: Tensor, d: Tensor, wanted: Sequence[bool], deeper: bool
    ) -> list[Tensor | None]:
        """Adds the gradient of what layer ``index`` read to d; returns its parameters'."""
        read = self._channels(0, self.stops[index])
        written = self._channels(self.stops[index], self.stops[index + 1])
        x = self._input(index, buffer).requires_grad_(deeper)
        parameters = [
            parameter.detach().requires_grad_(need)
            for parameter, need in zip(self.parameters[index], wanted, strict=True)
        ]
        with torch.enable_grad():
            new = self._call(index, dense_copy(x, buffer), parameters)
        asked = [t for t in (x, *parameters) if t.requires_grad]
        if not self.run.chain.followed:
            self._see_equal(index, new.detach(), buffer[:, written])
        if not new.requires_grad:
            return [None] * len(parameters)
        found = torch.autograd.grad(new, asked, d[:, written].to(new.dtype), allow_unused=True)
        by_id = {id(t): g for t, g in zip(asked, found, strict=True)}
        grad_x = by_id.get(id(x))
        if grad_x is not None:
            d[:, read] += grad_x
        return [by_id.get(id(parameter)) for parameter in parameters]

    def _see_equal(self, index: int, again: Tensor, before: Tensor) -> None:
        """Note whether a layer, whose code nobody has followed, is a function."""
        # a simulation has no values, and in a graph nobody may wait for them
        if again.is_meta or (again.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        # sums may round in another order, no more
        tolerance = torch.finfo(again.dtype).eps ** 0.5
        close = torch.isclose(again, before.to(again.dtype), tolerance, tolerance, equal_nan=True)
        self.comparisons.append((index, close.all()))

    def _call(self, index: int, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """New features of layer ``index`` as in the first run."""
        run, notes = self.run, self.notes[index]
        state = dict(zip(run.names[index], parameters, strict=True))
        # copies again: a graph that is retained may come here once more
        state |= {name: buffer.clone() for name, buffer in notes.buffers.items()}
        layer = run.layers[index]
        with _drawing_from(notes.random, x.device), _modes(layer, notes.training):
            out = torch.func.functional_call(layer, state, (_argument(run.chain, x),))
        return _split(out, x.shape[1], run.chain)

    def _input(self, index: int, buffer: Tensor) -> Tensor:
        x = buffer[:, self._channels(0, self.stops[index])].detach()
        # the first layer read x itself, before later features' type widened the buffer
        return x.to(self.input_dtype) if index == 0 else x

    def _rebuilt(self, x: Tensor) -> Tensor:
        """All features from the input alone."""
        features = _Features(x, self.run.chain.newest_first, len(self.run.layers))
        for index in range(len(self.run.layers)):
            features.add(self._call(index, features.read(), self.parameters[index]))
        return features.finish()

    def _channels(self, start: int, stop: int) -> slice:
        return channels(start, stop, self.stops[-1], self.run.chain.newest_first)


class _Comparisons:
    """Of one backward pass: (layer, whether it computed the same again, on the device)."""

    def __init__(self) -> None:
        self.found: list[tuple[int, Tensor]] = []

    def judge(self) -> None:
        """Raise where a layer is no function; waits for the device, once for all."""
        found, self.found = self.found, []
        device = found[0][1].device
        if bool(torch.stack([equal.to(device) for _, equal in found]).all()):
            return
        index = next(index for index, equal in found if not equal)
        raise RuntimeError(
            f"layer {index} of a dense block computed something else in backward than in "
            "forward: layers are run twice, so they must depend on nothing but their input, "
            'parameters, buffers and torch\'s random generators; or set save="all"'
        )


# by the number that autograd gives a pass, whose callback alone keeps them
_of_pass: WeakValueDictionary[int, _Comparisons] = WeakValueDictionary()


def _judge(found: list[tuple[int, Tensor]], layers: Sequence[nn.Module]) -> None:
    """Judge a block's comparisons when the whole backward pass ends.

    At once where parameters are stepped as soon as they have their gradients.
    """
    if not found:
        return
    parameters = [p for layer in layers for p in layer.parameters()]
    number = torch._C._current_graph_task_id()
    if number == -1 or any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters):
        alone = _Comparisons()
        alone.found = found
        alone.judge()
        return
    comparisons = _of_pass.get(number)
    if comparisons is None:
        comparisons = _of_pass[number] = _Comparisons()
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(comparisons.judge)
    comparisons.found += found


def dense_copy(x: Tensor, like: Tensor) -> Tensor:
    """``x`` (N, c, *spatial) without gaps, in the layout of ``like``."""
    return x.clone(memory_format=_layout(like))


def _layout(x: Tensor) -> torch.memory_format:
    """Channels last for tensors that are, and only so; else row by row."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _argument(chain: Chain, x: Tensor) -> Any:
    return [x] if chain.as_list else x


def _new_features(out: Any, run: _Run, features: _Features) -> Tensor:
    """The new features in what a layer returned, checked."""
    if not isinstance(out, Tensor):
        raise TypeError(f"a dense block's layer returned a {type(out).__name__}, not a tensor")
    new = _split(out, sum(features.widths), run.chain)
    x = features.x
    if new.dim() != x.dim() or new.shape[:1] + new.shape[2:] != x.shape[:1] + x.shape[2:]:
        raise ValueError(
            f"a dense block's layer returned shape {tuple(out.shape)} for features of "
            f"{tuple(x.shape)}: all but the channels must be equal"
        )
    return new


def _split(out: Tensor, width: int, chain: Chain) -> Tensor:
    """New features alone of a layer's output for ``width`` channels."""
    if not chain.concatenates:
        return out
    return out[:, : out.shape[1] - width] if chain.newest_first else out[:, width:]


def _run_layer(layer: nn.Module, argument: Any) -> Any:
    """A layer's first run; on copies of its buffers where a checkpoint around the block asks again.

    As a fused block's: see norms/buffers.py, NOTE [ running statistics ].
    """
    if torch._C._current_graph_task_id() == -1:
        return layer(argument)
    buffers = {name: buffer.detach().clone() for name, buffer in layer.named_buffers()}
    return torch.func.functional_call(layer, buffers, (argument,))


def _take_notes(layer: nn.Module, device: torch.device) -> _Notes:
    random = _RandomState.of(device) if recorded_constants.get() is None else None
    buffers = {name: buffer.detach().clone() for name, buffer in layer.named_buffers()}
    return _Notes(random, buffers, [module.training for module in layer.modules()])


@contextlib.contextmanager
def _modes(layer: nn.Module, training: Sequence[bool]) -> Iterator[None]:
    """Inside, its modules train where the first run's did."""
    pairs = zip(layer.modules(), training, strict=True)
    others = [module for module, then in pairs if module.training != then]
    for module in others:
        module.training = not module.training
    try:
        yield
    finally:
        for module in others:
            module.training = not module.training


@contextlib.contextmanager
def _drawing_from(random: _RandomState | None, device: torch.device) -> Iterator[None]:
    """Inside, random numbers are those of the first run; outside, nobody notices."""
    if random is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(random.host)
        if random.device is not None:
            torch.cuda.set_rng_state(random.device, device)
        yield
