"""The optimizers that are trained with and predicted, by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

import torch
from torch import nn

from ..choices import OptimizerName


def make_optimizer(
    name: OptimizerName,
    parameters: Iterable[nn.Parameter],
    lr: float = 0.0,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """An optimizer of torch.optim.

    Args:
        name: "sgd", "adam", "adamw" or "rmsprop".
        parameters: those that need no gradient are left out.
        lr: learning rate.
        momentum: of sgd alone, Nesterov's, in [0, 1).
        weight_decay: on every parameter, the norms' included, as in the paper's code.
        fused: take a step in one launch; rmsprop has none such.

    Raises:
        ValueError: for another name.
    """
    check_optimizer(name)
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(
            wanted,
            lr,
            momentum,
            weight_decay=weight_decay,
            nesterov=momentum > 0,
            fused=fused or None,
        )
    kind = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
    }[name]
    options = {} if name == "rmsprop" else {"fused": fused or None}
    return kind(wanted, lr, weight_decay=weight_decay, **options)


def exempt_vectors(optimizer: torch.optim.Optimizer) -> None:
    """Take norms and biases, which are parameters of one dimension, out of the weight decay."""
    for group in list(optimizer.param_groups):
        vectors = [parameter for parameter in group["params"] if parameter.ndim <= 1]
        if len(vectors) == len(group["params"]):
            group["weight_decay"] = 0.0
        elif vectors:
            group["params"] = [p for p in group["params"] if p.ndim > 1]
            optimizer.add_param_group({**group, "params": vectors, "weight_decay": 0.0})


def state_copies(name: OptimizerName, momentum: float) -> int:
    """How many tensors of a parameter's size an optimizer holds for it."""
    return {"sgd": int(momentum > 0), "rmsprop": 1, "adam": 2, "adamw": 2}[name]


def check_optimizer(name: str) -> None:
    """ValueError naming the optimizers if ``name`` is none."""
    known = get_args(OptimizerName)
    if name not in known:
        raise ValueError(f"optimizer must be one of {', '.join(known)}, got {name!r}")
