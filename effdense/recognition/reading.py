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

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .. import reference
from .objections import (
    AVERAGE_POOLS,
    BATCH_NORMS,
    SYNC_BATCH_NORMS,
    conv_objection,
    has_hooks,
    module_objection,
    pool_objection,
)
from .parts import (
    BlockParts,
    Chain,
    TransitionParts,
    _Layer,
    _leaves,
    _norm_objection,
    _own_objection,
    _read_layer,
    _scalars,
    _shared_objection,
    _width_objection,
    layers_of,
)
from .proving import _prove_block, _prove_chain, _prove_norm_relu, _prove_transition, _proved


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
