"""The network of a run, built and fitted to its memory."""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..autocast import AUTOCAST_DTYPES
from ..backends.select import get_backend
from ..block.forwards import set_offload
from ..conversion import convert
from ..errors import UserError, first_line
from ..memory.planning import budget_bytes, plan
from ..models import DenseNet, configuration
from ..norms.sync_batch_norm import SyncBatchNorm
from ..weights import for_channels
from .data.images import ImageData
from .data.order import random_key
from .distributed import World
from .options import ResolvedConfig

_CONVOLUTION = nn.modules.conv._ConvNd


def make_network(config: ResolvedConfig, data: ImageData) -> nn.Module:
    """The network ``config`` names, initialised by ``config.seed``.

    Raises:
        UserError: for sizes that no such network has, or a model that cannot be made.
    """
    torch.manual_seed(random_key("weights", config.seed))
    network = build(config.options(), data.num_classes, data.in_channels)
    set_offload(network, config.offload)
    if config.sync_batch_norm:
        network = SyncBatchNorm.convert_sync_batchnorm(network)
    return network


def build(options: Mapping[str, Any], num_classes: int, in_channels: int) -> nn.Module:
    """The network that a run's options name.

    Raises:
        UserError: for sizes that no such network has, or a model that cannot be made.
    """
    if options.get("model"):
        network = called(options["model"], json.loads(options["model_args"] or "{}"))
        return adapted(network, options, num_classes, in_channels)
    arguments: dict[str, Any] = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "spatial_dims": options.get("spatial_dims", 2),
        "drop_rate": options["drop_rate"],
        "save": options["save"],
        "backend": options["backend"],
    }
    try:
        named = (options["arch"], options["depth"], options["growth_rate"])
        return DenseNet(**configuration(*named, **arguments))
    except ValueError as error:
        raise UserError(str(error)) from None


def called(target: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """A model from ``MODULE:CALLABLE``; a copy where that is a model already.

    Raises:
        UserError: where there is none.
    """
    name, _, path = target.partition(":")
    if not name or not path:
        raise UserError(f"expected MODULE:CALLABLE, got {target!r}")
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
    network: nn.Module, options: Mapping[str, Any], num_classes: int, in_channels: int
) -> nn.Module:
    """Somebody's model with as many channels and classes as the data have, and converted.

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
    with warnings.catch_warnings():
        # what is left is in convert-report
        warnings.filterwarnings("ignore", message="effdense: ")
        return convert(network, options["save"], options["backend"])


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


def require_backend(config: ResolvedConfig, device: torch.device) -> None:
    """Find out before anything is loaded whether the backend can compute the run.

    Raises:
        UserError: for one that was asked for by name and can't.
    """
    if config.backend == "auto":
        return
    try:
        get_backend(config.backend, device, AUTOCAST_DTYPES.get(config.dtype, torch.float32))
    except ValueError as error:
        raise UserError(f"--backend {config.backend} --dtype {config.dtype}: {error}") from None


def fit_to_budget(
    network: nn.Module, config: ResolvedConfig, world: World, channels: int, budget: str
) -> str:
    """Set each block's save mode by a budget; returns the plan to be shown.

    Raises:
        UserError: where no choice fits.
    """
    kind = world.device.type
    # a machine's processes share its memory, those on one GPU the GPU's
    sharing = world.local_world_size if kind == "cpu" else world.sharing
    if budget == "auto" and sharing > 1:
        budget = str(budget_bytes("auto", kind) // sharing)
    try:
        found = plan(
            network,
            largest_share(config, world, channels),
            budget,
            offload=config.offload,
            optimizer=config.optimizer,
            momentum=config.momentum,
            dtype=getattr(torch, config.dtype),
            ddp=world.world_size > 1,
            step_in_backward=config.step_in_backward,
            device=world.device.type,
        )
    except ValueError as error:
        raise UserError(f"--budget: {error}") from None
    found.apply(network)
    return str(found)


def largest_share(config: ResolvedConfig, world: World, channels: int) -> tuple[int, ...]:
    """The shape of the most images that a process gets in a step."""
    images = -(-config.batch_size // world.world_size)
    return images, channels, *config.image_shape
