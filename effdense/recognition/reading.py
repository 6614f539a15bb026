"""Dense blocks and transitions recognised by structure, whoever wrote them.

NOTE [ read, then proved ]
The fused path reads parameters and never calls a layer, so it must know what calling it
would do. Reading says what a layer is made of: one batch norm and one convolution, or two
of each, and nothing else with parameters. That doesn't say what its ``forward`` does with
them (which end of the concatenation is the new one, a scale, a skip connection), so the
forward is run: a copy of the block with random float64 parameters on the CPU, in eval and in
training mode, must give the dense block's function to 1e-9, and move the norms' buffers as
batch norm does. Where layers drop features, what they drop is looked at too. A proof holds
for a signature (the types and plain attributes of the block and everything in it), is made
once per process and never touches the user's tensors or random state. Blocks of this package
with their own layers need none. Layers of other kinds are proved to be a chain the same way,
against their own forwards.

Reading is done afresh at every forward, so that hooks, replaced modules and parametrisations
added later are seen.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..norms.synchronization import process_groups
from .objections import (
    AVERAGE_POOLS,
    BATCH_NORMS,
    CONVOLUTIONS,
    SYNC_BATCH_NORMS,
    conv_objection,
    has_hooks,
    module_objection,
    norm_objection,
    pool_objection,
)

_PLAIN_NORMS = tuple(norm for norm in BATCH_NORMS if norm not in SYNC_BATCH_NORMS)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# What packages call the rate that a layer passes to F.dropout.
_DROP_RATES = ("drop_rate", "dropout", "dropout_rate", "drop_prob", "dropRate", "droprate")
_TOLERANCE = 1e-9
_NO_FUNCTION = "its forward computes something else than BN-ReLU-Conv layers, concatenated"


class LayerParts(NamedTuple):
    """What a dense layer computes with: norm1-ReLU-conv1, then norm2-ReLU-conv2 if there."""

    norm1: Any
    conv1: Any
    norm2: Any
    conv2: Any
    drop_rate: float
    # 0 outside training
    drop_channels: bool


class BlockParts(NamedTuple):
    """A dense block's layers, and whether new features stand before the old ones."""

    layers: tuple[LayerParts, ...]
    newest_first: bool


class TransitionParts(NamedTuple):
    """The norm and the convolution of a BN-ReLU-Conv1x1-AvgPool."""

    norm: Any
    conv: Any


class Chain(NamedTuple):
    """How a block calls layers of any kind: ``f(x)`` or ``f([x])``, and what they return."""

    as_list: bool
    # new features alone, or already concatenated with what was read
    concatenates: bool
    newest_first: bool


def layers_of(block: nn.Module) -> list[nn.Module]:
    """A block's layers: its children, or those of the one container it holds."""
    children = [child for child in block._modules.values() if child is not None]
    if len(children) == 1 and type(children[0]) in _CONTAINERS:
        return [child for child in children[0]._modules.values() if child is not None]
    return children


# ------------------------------------------------------------------------ reading


class _Layer(NamedTuple):
    parts: LayerParts
    signature: tuple[Any, ...]
    # the attribute or the module that drops features
    drop: str | None


def read_block(block: nn.Module, original: type[nn.Module]) -> BlockParts | str:
    """The parts of a block whose forward is ``original``'s, or why it can't be fused."""
    layers = layers_of(block)
    if not layers:
        return BlockParts((), newest_first=False)
    read: list[_Layer] = []
    for layer in layers:
        found = _read_layer(layer)
        if isinstance(found, str):
            return found
        read.append(found)
    parts = tuple(layer.parts for layer in read)
    objection = _width_objection(parts) or _shared_objection(parts) or _own_objection(block)
    if objection is not None:
        return objection
    signature = (original, _scalars(block), tuple(layer.signature for layer in read))
    if original is reference.DenseBlock and all(s in _KNOWN for s in signature[2]):
        return BlockParts(parts, newest_first=False)
    order = _proved(signature, lambda: _prove_block(block, original))
    if isinstance(order, str):
        return order
    return BlockParts(parts, newest_first=order)


def read_transition(transition: nn.Module, original: type[nn.Module]) -> TransitionParts | str:
    """The parts of a transition whose forward is ``original``'s, or why it can't be fused."""
    norms, convs, types = [], [], []
    for name, module in _leaves(transition):
        types.append(type(module))
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            objection = _norm_objection(name, module)
            norms.append(module)
            types += map(type, module.children())
        elif isinstance(module, nn.modules.conv._ConvNd):
            objection = conv_objection(name, module, 1)
            convs.append(module)
        elif isinstance(module, (nn.ReLU, nn.Identity)):
            objection = module_objection(name, module)
        elif isinstance(module, AVERAGE_POOLS) or name.endswith("pool"):
            objection = pool_objection(name, module) or module_objection(name, module)
        else:
            objection = f"{name} is a {type(module).__name__}"
        if objection is not None:
            return objection
    if len(norms) != 1 or len(convs) != 1:
        names = [name for name, _ in _leaves(transition)]
        return f"a transition's modules are {names}, not a norm, a convolution and a pooling"
    objection = _own_objection(transition)
    if objection is not None:
        return objection
    parts = TransitionParts(norms[0], convs[0])
    if parts.norm.num_features != parts.conv.in_channels:
        return "a transition's norm and convolution differ in channels"
    if original is reference.Transition and tuple(types) in _KNOWN_TRANSITIONS:
        return parts
    signature = (original, _scalars(transition), tuple(types))
    proof = _proved(signature, lambda: _prove_transition(transition, original))
    return proof if isinstance(proof, str) else parts


def read_norm_relu(modules: Sequence[nn.Module | None]) -> tuple[Any, int] | str:
    """The batch norm at the head of ``modules`` if a ReLU follows, and how many modules both are.

    One where the norm applies it itself, else two.
    """
    norm = modules[0] if modules else None
    if not isinstance(norm, BATCH_NORMS):
        return "not a batch norm"
    objection = _norm_objection("the norm", norm)
    if objection is not None:
        return objection
    following = modules[1] if len(modules) > 1 else None
    if type(norm) in BATCH_NORMS:
        if type(following) is nn.ReLU and not has_hooks(following):
            return norm, 2
        return "no ReLU follows"
    signature = (type(norm), _scalars(norm), tuple(map(type, norm.children())))
    proof = _proved(signature, lambda: _prove_norm_relu(norm))
    return proof if isinstance(proof, str) else (norm, 1)


def _read_layer(layer: nn.Module) -> _Layer | str:
    if has_hooks(layer):
        return "a dense layer has hooks"
    norms: list[tuple[str, Any]] = []
    convs: list[tuple[str, Any]] = []
    types: list[Any] = [type(layer)]
    drop, drop_channels, rate = None, False, 0.0
    for name, module in _leaves(layer):
        kind = type(module)
        types.append(kind)
        if kind in CONVOLUTIONS or isinstance(module, nn.modules.conv._ConvNd):
            convs.append((name, module))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            norms.append((name, module))
            types += map(type, module.children())
        elif kind in _DROPOUTS and drop is None:
            assert isinstance(module, nn.modules.dropout._DropoutNd)
            drop, drop_channels = name, kind is not nn.Dropout
            rate = module.p if module.training else 0.0
            objection = module_objection(name, module)
            if objection is not None:
                return objection
        elif kind is nn.ReLU or kind is nn.Identity:
            objection = module_objection(name, module)
            if objection is not None:
                return objection
        elif has_hooks(module):
            return f"{name} has hooks (or a weight computed by one)"
        else:
            return f"{name} is a {kind.__name__}"
    objection = _norms_and_convs_objection(layer, norms, convs)
    if objection is not None:
        return objection
    own = vars(layer)
    for name in _DROP_RATES:
        if isinstance(own.get(name), (int, float)) and own[name] > 0:
            if drop is not None:
                return f"a dense layer drops features twice, by {drop} and {name}"
            drop = name
            rate = float(own[name]) if layer.training else 0.0
    if not 0 <= rate < 1:
        return f"a dense layer drops all its features ({drop} is {rate})"
    signature = (*types, _scalars(layer), drop)
    (_, norm1), (_, conv1) = norms[0], convs[0]
    norm2, conv2 = (norms[1][1], convs[1][1]) if len(norms) == 2 else (None, None)
    return _Layer(LayerParts(norm1, conv1, norm2, conv2, rate, drop_channels), signature, drop)


def _norms_and_convs_objection(
    layer: nn.Module, norms: list[tuple[str, Any]], convs: list[tuple[str, Any]]
) -> str | None:
    if len(norms) != len(convs) or len(norms) not in (1, 2):
        found = [name for name, _ in _leaves(layer)]
        return f"a dense layer's modules are {found}, not norms and convolutions in turn"
    for name, norm in norms:
        objection = _norm_objection(name, norm)
        if objection is not None:
            return objection
    for (name, conv), kernel in zip(convs, (3,) if len(convs) == 1 else (1, 3), strict=True):
        objection = conv_objection(name, conv, kernel)
        if objection is not None:
            return objection
    return _own_objection(layer)


def _norm_objection(name: str, norm: Any) -> str | None:
    """Why a batch norm, maybe with its activation inside, can't be fused, or None."""
    if type(norm) in BATCH_NORMS or not isinstance(norm, _PLAIN_NORMS):
        return norm_objection(name, norm)
    objection = module_objection(name, norm)
    if objection is not None:
        return objection
    if norm.weight is None or norm.bias is None:
        return f"{name} has no weight and bias (affine=False)"
    for child in norm.children():
        if type(child) not in (nn.ReLU, nn.Identity) or has_hooks(child):
            return f"{name} has a {type(child).__name__} inside"
    return None


def _own_objection(module: nn.Module) -> str | None:
    """Parameters or buffers directly in a module that should only hold others."""
    own = [
        n
        for held in (module._parameters, module._buffers)
        for n, t in held.items()
        if t is not None
    ]
    return f"{own[0]} is a tensor of its own" if own else None


def _width_objection(layers: Sequence[LayerParts]) -> str | None:
    """The layers must fit one another: each reads everything before it and adds as much."""
    first = layers[0]
    growth = (first.conv1 if first.conv2 is None else first.conv2).out_channels
    width = first.norm1.num_features
    for layer in layers:
        convs = [layer.conv1] if layer.conv2 is None else [layer.conv1, layer.conv2]
        norms = [layer.norm1] if layer.norm2 is None else [layer.norm1, layer.norm2]
        inner = [] if layer.conv2 is None else [layer.conv1.out_channels]
        widths = [width, *inner, growth]
        found = [(conv.in_channels, conv.out_channels) for conv in convs]
        normed = [norm.num_features for norm in norms]
        if found != list(pairwise(widths)) or normed != widths[:-1]:
            return (
                f"a layer's convolutions have {found} channels and its norms {normed}, "
                f"for {width} features and {growth} new ones"
            )
        width += growth
    return None


def _shared_objection(layers: Sequence[LayerParts]) -> str | None:
    seen: set[int] = set()
    for layer in layers:
        for name, module in zip(layer._fields[:4], layer[:4], strict=True):
            if module is not None and id(module) in seen:
                return f"{name} is shared by two layers"
            seen.add(id(module))
    return None


def _leaves(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules without children, and batch norms, by name, in the order of registration."""
    for name, child in module._modules.items():
        if child is None:
            continue
        if (
            not child._modules
            or isinstance(child, (nn.modules.batchnorm._BatchNorm, nn.modules.conv._ConvNd))
            or type(child) not in _CONTAINERS
            or has_hooks(child)
        ):
            yield prefix + name, child
        else:
            yield from _leaves(child, f"{prefix}{name}.")


def _scalars(module: nn.Module) -> tuple[Any, ...]:
    """Plain attributes on which a forward may depend."""
    return tuple(
        (name, value)
        for name, value in vars(module).items()
        if type(value) in (bool, int, float, str) and name not in _IGNORED
    )


_IGNORED = {"training", "save", "backend", *_DROP_RATES}


def _known_signatures() -> frozenset[tuple[Any, ...]]:
    """Of reference.DenseLayer, with and without bottleneck, dropout and in any dimension."""
    found = set()
    for dims in (1, 2, 3):
        for bn_size in (1, None):
            for rate in (0.0, 0.5):
                known = reference.DenseLayer(1, 1, bn_size, rate, dims)
                for module in (known, *_synchronised(known)):
                    layer = _read_layer(module)
                    assert isinstance(layer, _Layer)
                    found.add(layer.signature)
    return frozenset(found)


def _synchronised(module: nn.Module) -> Iterator[nn.Module]:
    """Copies of ``module`` whose norms synchronise, torch's way and this package's."""
    for kind in SYNC_BATCH_NORMS:
        yield kind.convert_sync_batchnorm(copy.deepcopy(module))


# on meta, importing draws no random numbers
with torch.device("meta"):
    _KNOWN = _known_signatures()
    _KNOWN_TRANSITIONS = {
        tuple(map(type, transition.children()))
        for known in (reference.Transition(1, 1, dims) for dims in (1, 2, 3))
        for transition in (known, *_synchronised(known))
    }


def read_chain(block: nn.Module, original: type[nn.Module]) -> Chain | str:
    """How a block of layers of any kind calls them, or why it can't be told.

    Its forward must be ``original``'s, a chain of ``x = cat([x, f(x)])`` in some spelling.
    """
    for name, module in block.named_modules():
        if module is block:
            continue
        objection = module_objection(name, module)
        if objection is not None:
            return objection
        if isinstance(module, SYNC_BATCH_NORMS):
            return f"{name} is a SyncBatchNorm, not to be run twice"
    if original is reference.DenseBlock:
        return Chain(as_list=False, concatenates=False, newest_first=False)
    objection = _own_objection(block)
    if objection is not None:
        return objection
    if not layers_of(block):
        return "it has no layers"
    kinds = tuple((type(module), _scalars(module)) for module in block.modules())
    return _proved((original, kinds), lambda: _prove_chain(block, original))


def input_width(layer: nn.Module) -> int | None:
    """The channels that a layer's first norm, convolution or linear map reads."""
    for module in layer.modules():
        for attribute in ("num_features", "num_channels", "in_channels", "in_features"):
            width = getattr(module, attribute, None)
            if isinstance(width, int):
                return width
        if isinstance(module, nn.LayerNorm):
            return module.normalized_shape[-1]
    return None


# ------------------------------------------------------------------------ proving

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
            line = (str(error) or type(error).__name__).splitlines()[0]
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
            torch.manual_seed(0)
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


def _prove_block(block: nn.Module, original: type[nn.Module]) -> bool:
    """Whether new features stand first; raises _Unproved where it is no dense block."""
    twin = _double_copy(block, original)
    layers = layers_of(twin)
    read = [layer for layer in map(_read_layer, layers) if isinstance(layer, _Layer)]
    for layer, found in zip(layers, read, strict=True):
        _set_drop_rate(layer, found.drop, 0.0)
    parts = [layer.parts for layer in read]
    x = _probe(parts[0].norm1.num_features, parts[0].conv1)
    order = None
    for training in (False, True):
        twin.train(training)
        both = [_expected_block(parts, x, order, training) for order in (False, True)]
        actual = twin(x.clone())
        orders = [order for order in (False, True) if _same(actual, both[order][0])]
        if not orders or (training and orders[0] != order):
            raise _Unproved(_NO_FUNCTION)
        order = orders[0]
        _check_buffers(parts, both[order][1])
    assert order is not None
    for layer, found in zip(layers, read, strict=True):
        if found.drop is not None:
            _check_drop(layer, found, order)
    return order


def _prove_transition(transition: nn.Module, original: type[nn.Module]) -> bool:
    twin = _double_copy(transition, original)
    norm = next(m for m in twin.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    conv = next(m for m in twin.modules() if isinstance(m, nn.modules.conv._ConvNd))
    x = _probe(norm.num_features, conv)
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3]
    for training in (False, True):
        twin.train(training)
        new, buffers = _norm_relu_conv(norm, conv, x, training)
        if not _same(twin(x.clone()), pool(new, 2)):
            raise _Unproved("its forward computes something else than BN-ReLU-Conv1x1-AvgPool")
        _check_buffers([LayerParts(norm, conv, None, None, 0.0, False)], buffers)
    return True


def _prove_norm_relu(norm: Any) -> bool:
    twin = _double_copy(norm, type(norm))
    conv = CONVOLUTIONS[next(i for i, kind in enumerate(_PLAIN_NORMS) if isinstance(norm, kind))]
    x = _probe(norm.num_features, conv)
    for training in (False, True):
        twin.train(training)
        expected, buffers = _batch_norm(twin, x, training)
        if not _same(twin(x.clone()), F.relu(expected)):
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
        torch.manual_seed(1)
        expected = twin(x.clone())
        after = [buffer.clone() for buffer in twin.buffers()]
        found = []
        for as_list, newest_first in ((False, False), (False, True), (True, False), (True, True)):
            for buffer, value in zip(twin.buffers(), before, strict=True):
                buffer.copy_(value)
            torch.manual_seed(1)
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


def _probe(channels: int, conv: Any) -> Tensor:
    """An input for the proofs; odd sizes, one of them smaller."""
    kind = conv if isinstance(conv, type) else type(conv)
    dims = 1 + next(i for i, each in enumerate(CONVOLUTIONS) if issubclass(kind, each))
    return torch.randn(2, channels, *(5, 4, 3)[:dims], dtype=torch.float64)


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
    return convolve(F.relu(y), conv.weight, padding=conv.padding), buffers


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
