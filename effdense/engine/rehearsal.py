"""One step before the first, so that a plan that is too large is mended rather than fatal.

It takes no part in training: parameters, buffers and random states are as before, and no
process waits for another, so that one which runs out of memory can still say so.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..autocast import AUTOCAST_DTYPES
from ..errors import UserError
from ..machine.sizes import show_size
from ..memory.estimation import bucket_bytes
from ..memory.optimizers import state_copies
from ..norms.synchronization import unsynchronised
from .distributed import World, gathered
from .freezing import set_training
from .options import ResolvedConfig


def replan_if_needed(
    network: nn.Module,
    shape: Sequence[int],
    config: ResolvedConfig,
    world: World,
    plan: Callable[[str], str],
) -> str | None:
    """Take a step; where memory runs out on any process, plan for what there was, once.

    Args:
        network: on its device, not yet wrapped.
        shape: of the largest share of a batch that any process gets.
        config, world: the run's.
        plan: sets the network's save modes by a budget; returns the plan to be shown.

    Returns:
        What to say of the change; None where there was none.

    Raises:
        UserError: on every process, where the second plan runs out of memory too.
    """
    reached = _least_reached(network, shape, config, world)
    if reached is None:
        return None
    shown = plan(str(reached))
    if _least_reached(network, shape, config, world) is not None:
        raise UserError(
            f"out of memory again, with a plan for the {show_size(reached)} that could be "
            "allocated: reduce --batch-size, or use --dtype bfloat16 or --offload"
        )
    return (
        f"the first plan ran out of memory after {show_size(reached)}; planned again for that\n"
        f"{shown}"
    )


def _least_reached(
    network: nn.Module, shape: Sequence[int], config: ResolvedConfig, world: World
) -> int | None:
    """Bytes allocated when memory ran out, the fewest over all processes; None where it didn't."""
    own = ""
    try:
        take_step(network, shape, config, world)
    except torch.OutOfMemoryError:
        own = str(allocated_peak(world.device))
    # after the exception, whose traceback holds the step's tensors
    network.zero_grad(set_to_none=True)
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    failures = [int(answer) for answer in gathered(own) if answer]
    return min(failures, default=None)


def allocated_peak(device: torch.device) -> int:
    """The most bytes that tensors have had on a GPU since the run began."""
    return torch.cuda.max_memory_allocated(device)


def take_step(
    network: nn.Module, shape: Sequence[int], config: ResolvedConfig, world: World
) -> None:
    """Forward and backward on zeros, beside what the optimizer and DDP will hold."""
    device, dtype = world.device, AUTOCAST_DTYPES.get(config.dtype)
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    # DDP's buckets are one more
    copies = state_copies(config.optimizer, config.momentum) + (world.world_size > 1)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            held = torch.empty(copies * bucket_bytes(network), dtype=torch.uint8, device=device)
            set_training(network, config)
            x = torch.zeros(tuple(shape), device=device)
            target = torch.zeros(shape[0], dtype=torch.int64, device=device)
            with unsynchronised(), torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = F.cross_entropy(network(x), target)
            loss.backward()
            del held
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        network.zero_grad(set_to_none=True)
