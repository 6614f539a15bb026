"""The network of a run, built and fitted to its memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import effdense

from ..errors import UserError
from ..models import configuration
from .data.images import ImageData
from .data.order import random_key
from .distributed import World
from .options import ResolvedConfig


def make_network(config: ResolvedConfig, data: ImageData) -> nn.Module:
    """The network ``config`` names, initialised by ``config.seed``.

    Raises:
        UserError: for sizes that no such network has.
    """
    torch.manual_seed(random_key("weights", config.seed))
    network = build(config.options(), data.num_classes, data.in_channels)
    assert isinstance(network, effdense.DenseNet)
    network.offload = config.offload
    if config.sync_batch_norm:
        effdense.SyncBatchNorm.convert_sync_batchnorm(network)
    return network


def build(options: Mapping[str, Any], num_classes: int, in_channels: int) -> nn.Module:
    """The network that a run's options name.

    Raises:
        UserError: for sizes that no such network has.
    """
    arguments: dict[str, Any] = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "drop_rate": options["drop_rate"],
        "save": options["save"],
        "backend": options["backend"],
    }
    try:
        network = (options["arch"], options["depth"], options["growth_rate"])
        return effdense.DenseNet(**configuration(*network, **arguments))
    except ValueError as error:
        raise UserError(str(error)) from None


def fit_to_budget(
    network: nn.Module, config: ResolvedConfig, world: World, channels: int, budget: str
) -> str:
    """Set each block's save mode by a budget; returns the plan to be shown.

    Raises:
        UserError: where no choice fits.
    """
    assert isinstance(network, effdense.DenseNet)
    if budget == "auto" and world.device.type == "cpu":
        # the machine's processes share its memory
        budget = str(effdense.budget_bytes("auto", "cpu") // world.local_world_size)
    try:
        plan = effdense.plan(
            network,
            largest_share(config, world, channels),
            budget,
            offload=config.offload,
            optimizer=config.optimizer,
            momentum=config.momentum,
            dtype=getattr(torch, config.dtype),
            ddp=world.world_size > 1,
            device=world.device.type,
        )
    except ValueError as error:
        raise UserError(f"--budget: {error}") from None
    plan.apply(network)
    return str(plan)


def largest_share(config: ResolvedConfig, world: World, channels: int) -> tuple[int, ...]:
    """The shape of the most images that a process gets in a step."""
    images = -(-config.batch_size // world.world_size)
    return images, channels, config.image_size, config.image_size
