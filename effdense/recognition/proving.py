"""What a copy of a block computes on random numbers; see reading.py, NOTE [ read, then proved ]."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import first_line
from ..norms.synchronization import process_groups
from .objections import CONVOLUTIONS, SYNC_BATCH_NORMS
from .parts import _PLAIN_NORMS, Chain, LayerParts, _Layer, _read_layer, input_width, layers_of

_TOLERANCE = 1e-9
_NO_FUNCTION = "its forward computes something else than BN-ReLU-Conv layers, concatenated"


_proofs: dict[tuple[Any, ...], Any] = {}


class _Unproved(Exception):
    """Carries the objection."""


def _proved(signature: tuple[Any, ...], prove: Callable[[], Any]) -> Any:
    """What ``prove`` returns, or its objection; asked once per signature."""
    if signature not in _proofs:
        try:
            with _laboratory():
                _proofs[signature] = prove()
        except _Unproved as objection:
            _proofs[signature] = str(objection)
        except Exception as error:
            line = first_line(error)
            _proofs[signature] = f"running a copy of it failed: {line}"
    return _proofs[signature]


@contextlib.contextmanager
def _laboratory() -> Iterator[None]:
    """Plain float64 arithmetic on the CPU that leaves no trace, whatever surrounds it."""
    state = torch.get_rng_state()
    try:
        with (
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            # not torch.manual_seed, which is every device's
            torch.default_generator.manual_seed(0)
            yield
    finally:
        torch.set_rng_state(state)


def _double_copy(module: nn.Module, original: type[nn.Module]) -> Any:
    """A copy of type ``original`` without hooks, with random float64 parameters on the CPU."""
    memo: dict[int, Any] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if isinstance(tensor, nn.Parameter):
            value = torch.randn(tensor.shape, dtype=torch.float64)
            if tensor.dim() > 1:
                value /= max(1, tensor[0].numel()) ** 0.5
            memo[id(tensor)] = nn.Parameter(value, requires_grad=False)
        elif name.endswith("running_var"):
            memo[id(tensor)] = torch.rand(tensor.shape, dtype=torch.float64) + 0.5
        elif name.endswith("running_mean"):
            memo[id(tensor)] = torch.randn(tensor.shape, dtype=torch.float64)
        elif tensor.is_meta:
            memo[id(tensor)] = torch.zeros_like(tensor, device="cpu")
        elif tensor.is_floating_point():
            memo[id(tensor)] = tensor.detach().to("cpu", torch.float64, copy=True)
        else:
            memo[id(tensor)] = tensor.detach().to("cpu", copy=True)
    memo |= process_groups(module)
    _copy_sharded(module, memo)
    twin = copy.deepcopy(module, memo)
    twin.__class__ = original
    convs = [each for each in twin.modules() if isinstance(each, nn.modules.conv._ConvNd)]
    for each in twin.modules():
        if type(each) in SYNC_BATCH_NORMS:
            # the same function of one process's batch, which is all there is here
            each.__class__ = _PLAIN_NORMS[convs[0].weight.dim() - 3]
        each._forward_hooks.clear()
        each._forward_pre_hooks.clear()
    return twin


def _copy_sharded(module: nn.Module, memo: dict[int, Any]) -> None:
    """Into ``memo``, copies of what ``fully_shard`` manages, which refuses to be copied itself.

    It changes a module's class to one that inherits the module's own after FSDPModule, keeps its
    state under keys of its own, and does the rest by hooks. Copies have nothing of that.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for each in reversed(list(module.modules())):
        if isinstance(each, fsdp.FSDPModule):
            own: Any = type(each).__mro__[2]
            twin = own.__new__(own)
            memo[id(each)] = twin
            state = {
                key: OrderedDict() if key.endswith("_hooks") else value
                for key, value in vars(each).items()
                if not key.startswith("__composable_api_state_key")
            }
            vars(twin).update(copy.deepcopy(state, memo))


def _prove_block(block: nn.Module, original: type[nn.Module], new_only: bool) -> bool:
    """Whether new features stand first; raises _Unproved where it is no dense block.

    ``new_only``: the block returns nothing but them.
    """
    twin = _double_copy(block, original)
    layers = layers_of(twin)
    read = [layer for layer in map(_read_layer, layers) if isinstance(layer, _Layer)]
    for layer, found in zip(layers, read, strict=True):
        _set_drop_rate(layer, found.drop, 0.0)
    parts = [layer.parts for layer in read]
    orders = {False, True}
    for training in (False, True):
        twin.train(training)
        for x in _probes(parts[0].norm1.num_features, parts[0].conv1):
            with _gradients_of(twin, x) as asked:
                both = [_expected_block(parts, x, order, training) for order in (False, True)]
                actual = twin(x.clone())
                for order in sorted(orders):
                    expected = both[order][0]
                    if new_only:
                        width = x.shape[1]
                        expected = expected[:, :-width] if order else expected[:, width:]
                    if not _same(actual, expected) or not _same_gradients(actual, expected, asked):
                        orders.discard(order)
            if not orders:
                raise _Unproved(_NO_FUNCTION)
            _check_buffers(parts, both[min(orders)][1])
    order = min(orders)
    for layer, found in zip(layers, read, strict=True):
        if found.drop is not None:
            _check_drop(layer, found, order)
    return order


def _prove_transition(transition: nn.Module, original: type[nn.Module]) -> bool:
    twin = _double_copy(transition, original)
    norm = next(m for m in twin.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    conv = next(m for m in twin.modules() if isinstance(m, nn.modules.conv._ConvNd))
    for training in (False, True):
        twin.train(training)
        for x in _probes(norm.num_features, conv):
            pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3]
            with _gradients_of(twin, x) as asked:
                new, buffers = _norm_relu_conv(norm, conv, x, training)
                actual, expected = twin(x.clone()), pool(new, 2)
                if not _same(actual, expected) or not _same_gradients(actual, expected, asked):
                    raise _Unproved(
                        "its forward computes something else than BN-ReLU-Conv1x1-AvgPool"
                    )
            _check_buffers([LayerParts(norm, conv, None, None, 0.0, False)], buffers)
    return True


def _prove_norm_relu(norm: Any) -> bool:
    twin = _double_copy(norm, type(norm))
    conv = CONVOLUTIONS[next(i for i, kind in enumerate(_PLAIN_NORMS) if isinstance(norm, kind))]
    for training, x in product((False, True), _probes(norm.num_features, conv)):
        twin.train(training)
        with _gradients_of(twin, x) as asked:
            normed, buffers = _batch_norm(twin, x, training)
            actual, expected = twin(x.clone()), F.relu(normed)
            if not _same(actual, expected) or not _same_gradients(actual, expected, asked):
                raise _Unproved("the norm's forward is not batch norm and ReLU")
        if not all(map(_same, (twin.running_mean, twin.running_var), buffers)):
            raise _Unproved("the norm moves its buffers in its own way")
    return True


def _prove_chain(block: nn.Module, original: type[nn.Module]) -> Chain:
    """By the same random numbers: block and chain draw alike, so even dropout must agree."""
    twin = _double_copy(block, original)
    layers = layers_of(twin)
    width = input_width(layers[0])
    if width is None:
        raise _Unproved("the channels it reads can't be told")
    convs = [m for m in twin.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    dims = convs[0].weight.dim() - 2 if convs else 2
    x = torch.randn(2, width, *[8] * dims, dtype=torch.float64)
    fitting: list[Chain] = []
    for training in (False, True):
        twin.train(training)
        before = [buffer.clone() for buffer in twin.buffers()]
        torch.default_generator.manual_seed(1)
        expected = twin(x.clone())
        after = [buffer.clone() for buffer in twin.buffers()]
        found = []
        for as_list, newest_first in ((False, False), (False, True), (True, False), (True, True)):
            for buffer, value in zip(twin.buffers(), before, strict=True):
                buffer.copy_(value)
            torch.default_generator.manual_seed(1)
            try:
                output, concatenates = _run_chain(layers, x, as_list, newest_first)
            except Exception:
                # whatever a layer raises for arguments that aren't its own
                continue
            if _same(expected, output) and all(map(torch.equal, twin.buffers(), after)):
                found.append(Chain(as_list, concatenates, newest_first))
        fitting = [chain for chain in found if not training or chain in fitting]
        if not fitting:
            raise _Unproved("its forward is no chain of concatenations")
    return fitting[0]


def _run_chain(
    layers: Sequence[nn.Module], x: Tensor, as_list: bool, newest_first: bool
) -> tuple[Tensor, bool]:
    """Output of a chain, and whether its layers concatenate by themselves."""
    concatenating = set()
    for layer in layers:
        c = x.shape[1]
        out = layer([x.clone()] if as_list else x.clone())
        old = out[:, out.shape[1] - c :] if newest_first else out[:, :c]
        concatenates = out.shape[1] > c and torch.equal(old, x)
        concatenating.add(concatenates)
        if not concatenates:
            out = torch.cat([out, x] if newest_first else [x, out], 1)
        x = out
    if len(concatenating) != 1:
        raise TypeError("layers of two kinds")
    return x, concatenating.pop()


def _probes(channels: int, conv: Any) -> list[Tensor]:
    """Inputs for the proofs, of two sizes; odd ones among them, one of them smaller."""
    kind = conv if isinstance(conv, type) else type(conv)
    dims = 1 + next(i for i, each in enumerate(CONVOLUTIONS) if issubclass(kind, each))
    return [
        torch.randn(batch, channels, *sizes[:dims], dtype=torch.float64)
        for batch, sizes in ((2, (5, 4, 3)), (3, (2, 6, 4)))
    ]


@contextlib.contextmanager
def _gradients_of(module: nn.Module, x: Tensor) -> Iterator[list[Tensor]]:
    """Inside, x and a module's parameters want gradients; they are what is given."""
    asked = [x, *module.parameters()]
    with torch.enable_grad():
        for tensor in asked:
            tensor.requires_grad_()
        yield asked
    for tensor in asked:
        tensor.requires_grad_(False)


def _same_gradients(actual: Tensor, expected: Tensor, asked: Sequence[Tensor]) -> bool:
    weight = torch.randn_like(expected)
    found = [
        torch.autograd.grad(output, asked, weight, retain_graph=True, allow_unused=True)
        for output in (actual, expected)
        if output.requires_grad
    ]
    return len(found) == 2 and all(
        (one is None) == (other is None) and (other is None or _same(one, other))
        for one, other in zip(*found, strict=True)
    )


def _batch_norm(norm: Any, x: Tensor, training: bool) -> tuple[Tensor, list[Tensor]]:
    """Batch norm of x, and the running statistics it should leave behind."""
    running = [t.clone() for t in (norm.running_mean, norm.running_var) if t is not None]
    factor = norm.momentum
    if factor is None:
        factor = 1.0 / (float(norm.num_batches_tracked) + 1) if running else 0.0
    mean, var = running if running else (None, None)
    use_input = training or mean is None
    y = F.batch_norm(x, mean, var, norm.weight, norm.bias, use_input, factor, norm.eps)
    return y, running


def _norm_relu_conv(norm: Any, conv: Any, x: Tensor, training: bool) -> tuple[Tensor, list[Tensor]]:
    y, buffers = _batch_norm(norm, x, training)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    return convolve(F.relu(y), conv.weight, conv.bias, padding=conv.padding), buffers


def _expected_block(
    layers: Sequence[LayerParts], x: Tensor, newest_first: bool, training: bool
) -> tuple[Tensor, list[Tensor]]:
    """The dense block's function, and all running statistics it should leave behind."""
    all_buffers: list[Tensor] = []
    for layer in layers:
        new, buffers = _norm_relu_conv(layer.norm1, layer.conv1, x, training)
        all_buffers += buffers
        if layer.norm2 is not None:
            new, buffers = _norm_relu_conv(layer.norm2, layer.conv2, new, training)
            all_buffers += buffers
        x = torch.cat([new, x] if newest_first else [x, new], 1)
    return x, all_buffers


def _check_buffers(layers: Sequence[LayerParts], expected: list[Tensor]) -> None:
    norms = [norm for layer in layers for norm in (layer.norm1, layer.norm2) if norm is not None]
    found = [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None]
    if not all(map(_same, found, expected)):
        raise _Unproved("its norms move their buffers in their own way")


def _check_drop(layer: nn.Module, found: _Layer, newest_first: bool) -> None:
    """What a layer drops in training must be elements, or channels, of its new features."""
    parts = found.parts
    growth = (parts.conv1 if parts.conv2 is None else parts.conv2).out_channels
    channels = parts.norm1.num_features
    x = torch.randn(16, channels, *[4] * (parts.conv1.weight.dim() - 2), dtype=torch.float64)
    layer.train()
    for norm in (parts.norm1, parts.norm2):
        if norm is not None:
            norm.eval()
    outputs = []
    for rate in (0.0, 0.5):
        _set_drop_rate(layer, found.drop, rate)
        out = layer(x.clone())
        if out.shape[1] == channels + growth:
            old = out[:, growth:] if newest_first else out[:, :channels]
            if not torch.equal(old, x):
                raise _Unproved(f"{found.drop} drops more than a layer's new features")
            out = out[:, :growth] if newest_first else out[:, channels:]
        outputs.append(out)
    kept, dropped = outputs
    mask = dropped / kept
    zero, double = mask.abs() < _TOLERANCE, (mask - 2).abs() < _TOLERANCE
    if not bool((zero | double).all()) or not zero.any() or not double.any():
        raise _Unproved(f"{found.drop} does not drop a layer's new features")
    per_channel = bool((zero.flatten(2).all(2) | double.flatten(2).all(2)).all())
    if per_channel != parts.drop_channels:
        raise _Unproved(f"{found.drop} drops other pieces than its type says")


def _set_drop_rate(layer: nn.Module, drop: str | None, rate: float) -> None:
    if drop is None:
        return
    if drop in vars(layer):
        setattr(layer, drop, rate)
    else:
        layer.get_submodule(drop).p = rate  # type: ignore[assignment]


def _same(actual: Any, expected: Tensor) -> bool:
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return False
    return bool((actual - expected).abs().max() <= _TOLERANCE * expected.abs().max())
