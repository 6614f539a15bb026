"""``plan``: save modes that fit a budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from tyro.conf import arg

import effdense

from ..choices import DtypeName, OptimizerName
from ..errors import UserError
from .network import Batch, Network


@dataclass(frozen=True)
class Options:
    """Choose what each dense block saves for backward: the fastest that fits a budget.

    Nothing is allocated or trained.
    """

    network: Network = field(default_factory=Network)
    batch: Batch = field(default_factory=Batch)
    budget: Annotated[str, arg(metavar="SIZE")] = "auto"
    """Such as 8GiB; auto: what is free."""
    optimizer: OptimizerName = "sgd"
    """Whose state is counted."""
    momentum: float = 0.9
    """Momentum of sgd, in [0, 1)."""
    dtype: Annotated[
        DtypeName | None,
        arg(
            metavar="{float64,float32,bfloat16,float16}",
            help_behavior_hint="(default: the model's own)",
        ),
    ] = None
    """What is computed in; 16 bits by autocast over float32 parameters."""
    offload: bool = False
    """Keep what blocks keep elsewhere where nothing else fits."""
    ddp: bool = False
    """Count DistributedDataParallel's gradient buckets."""
    gradient_as_bucket_view: bool = False
    """Gradients are views of --ddp's buckets, as in train_ddp.py."""
    step_in_backward: bool = False
    """Count no gradients but those of a layer: see effdense.step_in_backward."""
    cuda_graphs: bool = False
    """Count what effdense.cuda_graphs keeps for good; with --device cuda."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Whose temporaries are counted."""


def run(options: Options) -> None:
    network, batch = options.network, options.batch
    try:
        with torch.device("meta"):
            model = network.ours()
        print(
            effdense.plan(
                model,
                network.input_shape(model, batch),
                options.budget,
                offload=options.offload,
                optimizer=options.optimizer,
                momentum=options.momentum,
                dtype=getattr(torch, options.dtype) if options.dtype else None,
                ddp=options.ddp,
                gradient_as_bucket_view=options.gradient_as_bucket_view,
                step_in_backward=options.step_in_backward,
                cuda_graphs=options.cuda_graphs,
                device=options.device,
            )
        )
    except ValueError as error:
        raise UserError(str(error)) from None
