"""Other people's models: called by name, with the head and channels that are wanted."""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch
from torch import nn

from .choices import Save
from .conversion import convert
from .errors import UserError, first_line
from .weights import for_channels

_CONVOLUTION = nn.modules.conv._ConvNd


def called(target: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """A model from ``MODULE:CALLABLE``; a copy where that is a model already.

    Raises:
        UserError: where there is none.
    """
    name, _, path = target.partition(":")
    if not name or not path:
        raise UserError(f"expected MODULE:CALLABLE, got {target!r}")
    if name.startswith(".") or "/" in name:
        raise UserError(
            f"expected MODULE:CALLABLE, got {target!r}: MODULE is what import takes, not a file, "
            f"such as {PurePath(name).stem.lstrip('.') or 'models'}"
        )
    # as python -m of one's own module finds it
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        # what a module makes as it is imported is no part of a network on another device
        with torch.device("cpu"):
            found = importlib.import_module(name)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UserError(f"can't find {target}: {error}") from None
    except Exception as error:
        # a mistake in a module of the user's
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"importing {name} failed: {said}") from None
    if not callable(found):
        raise UserError(f"{target} is a {type(found).__name__}, which can't be called")
    if isinstance(found, nn.Module):
        return copy.deepcopy(found)
    try:
        model: object = found(**(arguments or {}))
    except Exception as error:
        how = f"with {json.dumps(arguments)}" if arguments else "without arguments"
        raise UserError(f"calling {target} {how} failed: {first_line(error)}") from None
    if not isinstance(model, nn.Module):
        raise UserError(f"{target} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def adapted(
    network: nn.Module,
    num_classes: int,
    in_channels: int,
    save: Save = "features",
    backend: str = "auto",
) -> nn.Module:
    """Somebody's model with as many channels and classes as are wanted, converted; in place.

    Its first convolution keeps what it knows, see :func:`effdense.weights.for_channels`; a head for
    another number of classes is new.

    Raises:
        UserError: where it has no convolution or head to be adapted.
    """
    first = next((m for m in network.modules() if isinstance(m, _CONVOLUTION)), None)
    if first is None:
        raise UserError(f"the model, a {type(network).__name__}, has no convolution")
    if first.in_channels != in_channels:
        if first.groups != 1:
            raise UserError(
                f"the model's first convolution is for {first.in_channels} channels in "
                f"{first.groups} groups, the images have {in_channels}"
            )
        weight = for_channels(first.weight.detach(), in_channels)
        first.weight = nn.Parameter(weight)
        first.in_channels = in_channels
    name = head_of(network)
    parent, _, own = name.rpartition(".")
    head: Any = network.get_submodule(name)
    if len(head.weight) != num_classes:
        bias = head.bias is not None
        new = (
            nn.Linear(head.in_features, num_classes, bias)
            if isinstance(head, nn.Linear)
            else type(head)(head.in_channels, num_classes, 1, bias=bias)
        )
        setattr(network.get_submodule(parent), own, new)
    # what torchxrayvision's published models answer with instead of the head's own outputs
    if getattr(network, "op_threshs", None) is not None:
        network.op_threshs = None  # type: ignore[assignment]
    return converted(network, save, backend)


def converted(model: nn.Module, save: Save | Sequence[Save], backend: str = "auto") -> nn.Module:
    """The model, converted; what was left of it is in convert-report, not in warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="effdense: ")
        return convert(model, save, backend)


def head_of(network: nn.Module) -> str:
    """The name of a network's classifier: its last linear map, or convolution of one pixel.

    Raises:
        UserError: where there is none.
    """
    heads = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, _CONVOLUTION) and set(module.kernel_size) == {1})
    ]
    linear = [name for name in heads if isinstance(network.get_submodule(name), nn.Linear)]
    if not heads:
        raise UserError(f"the model, a {type(network).__name__}, has no linear layer for a head")
    return (linear or heads)[-1]
