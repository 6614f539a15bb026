"""What of a network learns, and at what rate.

A norm whose weights do not learn is frozen whole: it works by its running statistics, in training
too, and leaves them as they are.
"""

from __future__ import annotations

import fnmatch
import itertools

import torch
from torch import nn

from ..adaptation import head_of
from ..block.forwards import dense_blocks
from ..errors import UserError
from .options import ResolvedConfig

_NORM = nn.modules.batchnorm._BatchNorm


def freeze(network: nn.Module, config: ResolvedConfig) -> str:
    """Keep from learning what --freeze and --freeze-norms name; returns what is to be said.

    Raises:
        UserError: where they name nothing, or everything.
    """
    parameters = dict(network.named_parameters())
    frozen: set[str] = set()
    if config.freeze is not None and config.freeze.isdecimal():
        frozen = _before_block(network, int(config.freeze))
    elif config.freeze is not None:
        frozen = set(fnmatch.filter(parameters, config.freeze))
        if not frozen:
            raise UserError(
                f"--freeze: no parameter is called {config.freeze!r}; the first and the last are "
                f"called {next(iter(parameters))} and {list(parameters)[-1]}"
            )
    if config.freeze_norms:
        for name, module in network.named_modules():
            if isinstance(module, _NORM):
                frozen |= {f"{name}.{own}" for own, _ in module.named_parameters()}
    if frozen == set(parameters):
        raise UserError(f"--freeze {config.freeze} leaves nothing to learn")
    for name in frozen:
        parameters[name].requires_grad_(False)
    if not frozen:
        return ""
    learning = sum(p.numel() for p in parameters.values() if p.requires_grad)
    total = sum(p.numel() for p in parameters.values())
    return f"{learning:,} of {total:,} parameters learn"


def _before_block(network: nn.Module, count: int) -> set[str]:
    """The parameters of the first ``count`` dense blocks and of all before them and between."""
    blocks = list(dense_blocks(network))
    if not 1 <= count <= len(blocks):
        raise UserError(
            f"--freeze must be a number of dense blocks from 1 to {len(blocks)}, or a pattern for "
            f"names of parameters such as 'features.*', got {count}"
        )
    names = [name for name, _ in network.named_parameters()]
    if count < len(blocks):
        end = blocks[count] + "."
        return set(itertools.takewhile(lambda name: not name.startswith(end), names))
    last = max(i for i, name in enumerate(names) if name.startswith(blocks[-1] + "."))
    return set(names[: last + 1])


def set_training(network: nn.Module, config: ResolvedConfig) -> None:
    """Put a network into training mode, but for its frozen norms."""
    network.train()
    for module in network.modules():
        if isinstance(module, _NORM):
            own = [parameter.requires_grad for parameter in module.parameters()]
            # without weights of its own a norm is frozen by its option alone
            if not any(own) and (own or config.freeze_norms):
                module.eval()


def set_head_rate(network: nn.Module, optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Let the head learn at so many times the rate of the rest."""
    head = {id(parameter) for parameter in network.get_submodule(head_of(network)).parameters()}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in head]
        if len(own) == len(group["params"]):
            group["lr_factor"] = factor
        elif own:
            group["params"] = [p for p in group["params"] if id(p) not in head]
            optimizer.add_param_group({**group, "params": own, "lr_factor": factor})
