"""What dense layers, blocks and transitions are made of, read from their modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn

from .objections import (
    BATCH_NORMS,
    CONVOLUTIONS,
    SYNC_BATCH_NORMS,
    conv_objection,
    has_hooks,
    module_objection,
    norm_objection,
)

_PLAIN_NORMS = tuple(norm for norm in BATCH_NORMS if norm not in SYNC_BATCH_NORMS)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# What packages call the rate that a layer passes to F.dropout.
_DROP_RATES = ("drop_rate", "dropout", "dropout_rate", "drop_prob", "dropRate", "droprate")


class LayerParts(NamedTuple):
    """What a dense layer computes with: norm1-ReLU-conv1, then norm2-ReLU-conv2 if there."""

    norm1: Any
    conv1: Any
    norm2: Any
    conv2: Any
    drop_rate: float
    """0 outside training."""
    drop_channels: bool


class BlockParts(NamedTuple):
    """What a dense block is."""

    layers: tuple[LayerParts, ...]
    newest_first: bool
    """New features stand before the old ones."""
    new_only: bool = False
    """The block returns what its layers made, without its input (FC-DenseNet's way up)."""


class TransitionParts(NamedTuple):
    """The norm and the convolution of a BN-ReLU-Conv1x1-AvgPool."""

    norm: Any
    conv: Any


class Chain(NamedTuple):
    """How a block calls layers of any kind: ``f(x)`` or ``f([x])``, and what they return."""

    as_list: bool
    concatenates: bool
    """With what was read, instead of new features alone."""
    newest_first: bool
    followed: bool = True
    """Whether the layers' own code is known to compute the same twice."""


def layers_of(block: nn.Module) -> list[nn.Module]:
    """A block's layers: its children, or those of the one container that it holds, being none."""
    children = [child for child in block._modules.values() if child is not None]
    holds_layers = isinstance(block, _CONTAINERS)
    if len(children) == 1 and type(children[0]) in _CONTAINERS and not holds_layers:
        return [child for child in children[0]._modules.values() if child is not None]
    return children


class _Layer(NamedTuple):
    parts: LayerParts
    signature: tuple[Any, ...]
    """The attribute or the module that drops features."""
    drop: str | None
    """Whose training mode says whether it does."""
    mode: nn.Module


def _read_layer(layer: nn.Module) -> _Layer | str:
    if has_hooks(layer):
        return "a dense layer has hooks"
    norms: list[tuple[str, Any]] = []
    convs: list[tuple[str, Any]] = []
    types: list[Any] = [type(layer)]
    drop, drop_channels, rate = None, False, 0.0
    mode = layer
    for name, module in _leaves(layer):
        kind = type(module)
        types.append(kind)
        if kind in CONVOLUTIONS or isinstance(module, nn.modules.conv._ConvNd):
            convs.append((name, module))
            types.append(module._parameters.get("bias") is not None)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            norms.append((name, module))
            types += map(type, module.children())
        elif kind in _DROPOUTS and drop is None:
            assert isinstance(module, nn.modules.dropout._DropoutNd)
            drop, drop_channels = name, kind is not nn.Dropout
            rate, mode = module.p, module
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
            rate = float(own[name])
    if not 0 <= rate < 1:
        return f"a dense layer drops all its features ({drop} is {rate})"
    signature = (*types, _scalars(layer), drop)
    (_, norm1), (_, conv1) = norms[0], convs[0]
    norm2, conv2 = (norms[1][1], convs[1][1]) if len(norms) == 2 else (None, None)
    parts = LayerParts(norm1, conv1, norm2, conv2, rate, drop_channels)
    return _Layer(parts, signature, drop, mode)


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
