"""``plan``: save modes that fit a budget."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

import effdense

from ..errors import UserError
from ..machine.memory import show_size
from ..memory.estimation import AMP_DTYPES
from ..memory.planning import CANDIDATES
from . import Commands
from .network import add_input_arguments, add_model_argument, converted, network_of


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="choose what each dense block saves, so that training fits a memory budget",
        description="Choose what each dense block of a network saves for backward: the fastest "
        "choice whose predicted peak fits a budget of memory. Nothing is allocated or trained. "
        "Of a model that is converted, all blocks save the same.",
    )
    add_model_argument(parser)
    add_input_arguments(parser, batch_size=64)
    parser.add_argument(
        "--budget", default="auto", help='such as "8GiB"; "auto" (default): what is free'
    )
    parser.add_argument("--optimizer", default="sgd-momentum", help="default sgd-momentum")
    parser.add_argument("--amp", choices=("none", "bf16", "fp16"), default="none")
    parser.add_argument("--ddp", action="store_true", help="count DDP's gradient buckets")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    network = network_of(options)
    predicted = {
        "optimizer": options.optimizer,
        "amp": AMP_DTYPES[options.amp],
        "ddp": options.ddp,
        "device": options.device,
    }
    try:
        with torch.device("meta"):
            model = network.ours() if network.is_own else network.naive()
        shape = network.input_shape(model, options.batch_size, options.image_size)
        if isinstance(model, effdense.DenseNet):
            print(effdense.plan(model, shape, options.budget, **predicted))
        else:
            print(_plan_of_converted(model, shape, options.budget, predicted))
    except ValueError as error:
        raise UserError(str(error)) from None


def _plan_of_converted(
    model: nn.Module, shape: tuple[int, ...], budget: str, predicted: dict[str, Any]
) -> str:
    """The fastest mode for all blocks that fits, and what each would take."""
    limit = effdense.budget_bytes(budget, predicted["device"])
    estimates = {"as it is": effdense.estimate(model, shape, **predicted)}
    for save in CANDIDATES:
        estimates[f'save="{save}"'] = effdense.estimate(converted(model, save), shape, **predicted)
    lines = [f"{name:<20}{show_size(found.peak):>12}" for name, found in estimates.items()]
    # fastest first, but for the model as it is, which is no choice of conversion
    fitting = [name for name, found in estimates.items() if found.peak <= limit]
    chosen = next((name for name in fitting if name != "as it is"), None)
    if chosen is None:
        least = min(found.peak for found in estimates.values())
        raise effdense.BudgetError(
            f"no save mode fits a budget of {show_size(limit)}: a batch of {shape[0]} needs at "
            f"least {show_size(least)}",
            least,
        )
    call = f"effdense.convert(model, {chosen})"
    return "\n".join([*lines, f"{call} fits a budget of {show_size(limit)}"])
