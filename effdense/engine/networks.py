"""The network of a run, built and fitted to its memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..adaptation import adapted, called, converted
from ..autocast import AUTOCAST_DTYPES
from ..backends.select import get_backend
from ..block.forwards import set_offload
from ..errors import UserError
from ..machine.sizes import show_size
from ..memory.optimizers import state_copies
from ..memory.planning import budget_bytes, plan
from ..models import DenseNet, configuration
from ..norms.sync_batch_norm import SyncBatchNorm
from .data.images import ImageData
from .data.order import random_key
from .distributed import World
from .options import GIVEN, ResolvedConfig
from .recipes import FILES, OWN


def make_network(
    config: ResolvedConfig, data: ImageData, model: nn.Module | None = None
) -> nn.Module:
    """The network ``config`` names, initialised by ``config.seed``; or a given model, converted.

    Raises:
        UserError: for sizes that no such network has, or a model that cannot be made.
    """
    torch.manual_seed(random_key("weights", config.seed))
    network = build(config.options(), data.num_classes, data.in_channels, model)
    set_offload(network, config.offload)
    if config.sync_batch_norm:
        network = SyncBatchNorm.convert_sync_batchnorm(network)
    return network


def build(
    options: Mapping[str, Any], num_classes: int, in_channels: int, model: nn.Module | None = None
) -> nn.Module:
    """The network that a run's options name, or ``model`` where it was given in Python.

    Raises:
        UserError: for sizes that no such network has, or a model that cannot be made.
    """
    if model is not None:
        if options["data"] == OWN:
            # it has been asked about an image of these data
            return converted(model, options["save"], options["backend"])
        return adapted(model, num_classes, in_channels, options["save"], options["backend"])
    if str(options.get("model")).startswith(GIVEN):
        raise UserError(
            f"the run's network, a {options['model'].removeprefix(GIVEN)}, was given in Python: "
            f"give it again, with model=..."
        )
    if options.get("model"):
        network = called(options["model"], json.loads(options["model_args"] or "{}"))
        return adapted(network, num_classes, in_channels, options["save"], options["backend"])
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


# Images of that size are large enough for any network.
_AMPLE = 512


def check_size(network: nn.Module, config: ResolvedConfig, channels: int) -> None:
    """See whether images are large enough for a network; computes nothing.

    Raises:
        UserError: where they are not; says the least size.
    """
    shape = config.image_shape
    on_meta = copy.deepcopy(network).to("meta").eval()

    def takes(size: Sequence[int]) -> bool:
        try:
            with torch.no_grad():
                on_meta(torch.empty((2, channels, *size), device="meta"))
        # somebody's model raises what it likes
        except Exception:
            return False
        return True

    # one that refuses ample images too has another reason, of which its first step tells
    if takes(shape) or not takes((_AMPLE,) * len(shape)):
        return
    least, large = min(shape), _AMPLE
    while large - least > 1:
        middle = (least + large) // 2
        least, large = (least, middle) if takes((middle,) * len(shape)) else (middle, large)
    raise UserError(
        f"the images are too small for {network_name(config)}: it takes {large} along each side "
        f"and more, got {' x '.join(map(str, shape))}; {_way_out(config)}"
    )


def _way_out(config: ResolvedConfig) -> str:
    if config.data in FILES or config.data == "fake":
        return "choose a larger --image-size" if config.crop is None else "choose a larger --crop"
    if config.data == OWN:
        return "give larger images, or another model"
    return f"{config.data} has images of one size: choose another network with --arch"


def network_name(config: ResolvedConfig) -> str:
    """What a run calls its network."""
    return (config.model or str(config.arch)).removeprefix(GIVEN)


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
    try:
        limit = budget_bytes(budget, kind)
    except ValueError as error:
        raise UserError(f"--budget: {error}") from None
    if budget == "auto":
        limit //= sharing
    copies = held_copies(network, config)
    if copies >= limit:
        raise UserError(
            f"--budget: what --ema and --non-finite skip hold takes {show_size(copies)} of "
            f"{show_size(limit)}; leave them out, or allow more"
        )
    try:
        found = plan(
            network,
            largest_share(config, world, channels),
            limit - copies,
            offload=config.offload,
            optimizer=config.optimizer,
            momentum=config.momentum,
            dtype=getattr(torch, config.dtype),
            ddp=world.world_size > 1,
            gradient_as_bucket_view=True,
            step_in_backward=config.step_in_backward,
            device=world.device.type,
        )
    except ValueError as error:
        raise UserError(f"--budget: {error}") from None
    found.apply(network)
    if not copies:
        return str(found)
    return f"{found}\nbesides, --ema and --non-finite skip hold {show_size(copies)} of the budget"


def held_copies(network: nn.Module, config: ResolvedConfig) -> int:
    """Bytes that copies of the network's state take all through a step.

    The averaged weights of --ema; and of all that a step changes with --non-finite skip, which
    puts it back (see undoing.py).
    """
    weights = sum(t.nbytes for t in [*network.parameters(), *network.buffers()])
    moved = sum(p.nbytes for p in network.parameters() if p.requires_grad)
    moved *= state_copies(config.optimizer, config.momentum)
    average = weights if config.ema else 0
    undone = weights + moved + average if config.non_finite == "skip" else 0
    return average + undone


def largest_share(config: ResolvedConfig, world: World, channels: int) -> tuple[int, ...]:
    """The shape of the most images that a process gets in a step."""
    images = -(-config.batch_size // world.world_size)
    return images, channels, *config.image_shape
