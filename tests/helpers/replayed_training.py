"""A trainer's steps with --sync-batch-norm and --cuda-graphs on, in one of several processes."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import effdense
from effdense.engine import trainer as trainers
from effdense.engine.data.order import share
from effdense.engine.distributed import World, gathered
from effdense.engine.options import TrainConfig
from effdense.engine.tasks import Classification
from effdense.engine.trainer import Trainer
from tests.helpers.replaying import replaying

CLASSES = 5
IMAGE_SHAPE = (3, 8, 8)


@dataclass(frozen=True)
class Steps:
    """The batches of a run on two processes, and its options."""

    replayed: int
    """Forwards of a stage, over all its steps, that have the shape which was captured."""
    sizes: tuple[int, ...] = (7, 7, 5)
    """The last one is smaller."""
    options: dict[str, Any] = field(default_factory=dict)


RUNS = {
    "features": Steps(2),
    "bottlenecks": Steps(2, options={"save": "bottlenecks"}),
    "input, dropout": Steps(2, options={"save": "input", "drop_rate": 0.2}),
    # parts of 2 and 2 images, then of 2 and 1; of the small batch, of 2 and 2, then of 1 and 0
    "accumulation": Steps(3, options={"accumulate": 2}),
    "autocast, averaged": Steps(2, options={"dtype": "bfloat16", "ema": 0.75}),
    "loss scaling, clipping": Steps(2, options={"dtype": "float16", "clip_grad": 0.01}),
    "steps left out": Steps(2, options={"non_finite": "skip"}),
}


def _trained(world: World, run: Steps, graphs: Any) -> tuple[list[Tensor], str | None]:
    """All that the steps leave behind, and what came of the capture."""
    torch.manual_seed(0)
    config = TrainConfig(
        data="fake",
        image_size=IMAGE_SHAPE[-1],
        batch_size=run.sizes[0],
        threads=1,
        sync_batch_norm=True,
        cuda_graphs=graphs,
        **run.options,
    ).resolved(world_size=world.world_size)
    network = effdense.densenet_bc(
        depth=10,
        growth_rate=4,
        num_classes=CLASSES,
        drop_rate=config.drop_rate or 0.0,
        save=config.save,
    )
    effdense.SyncBatchNorm.convert_sync_batchnorm(network)
    trainer = Trainer(network, config, world, Classification(tuple("abcde")))
    said = trainer.capture(IMAGE_SHAPE)
    trainer.settle_buckets(IMAGE_SHAPE)
    network.train()
    found = []
    for step, size in enumerate(run.sizes):
        # the same in every process, each of which takes its share
        torch.manual_seed(10 + step)
        images, labels = torch.randn(size, *IMAGE_SHAPE), torch.randint(CLASSES, (size,))
        mine = share(torch.arange(size), world.rank, world.world_size)
        torch.manual_seed(100 * step + world.rank)
        if step == 1 and config.non_finite == "skip":
            # of one process alone
            images[0] = float("nan")
        loss, logits, held = trainer.step(images[mine], labels[mine], size, lr=0.1 / (step + 1))
        if held is None or held:
            found += [loss, logits]
        else:
            assert config.non_finite == "skip"
            assert step == 1
    found += [t.detach().clone() for t in network.state_dict().values()]
    found += [t.clone() for t in trainer.tested.state_dict().values()]
    return found, said


def trained_by_replays(world: World) -> dict[str, Tensor]:
    """For each run and process: whether replays are its steps; stages, and replays of steps."""
    os.environ["EFFDENSE_BACKEND"] = "torch"
    results = {}
    for name, run in RUNS.items():
        with (
            mock.patch.object(trainers, "CAPTURED", ("cpu",)),
            replaying() as device,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error", RuntimeWarning)
            expected, nothing = _trained(world, run, "off")
            assert nothing is None
            assert not device.recordings
            actual, said = _trained(world, run, "on")
        equal = len(actual) == len(expected) and all(map(torch.equal, actual, expected))
        stages = len(device.recordings) // 2
        assert said is not None
        assert said.startswith(f"{stages} stages by CUDA graphs; other batch sizes"), said
        # one of each recording is the check of what was captured
        replays = device.replays - len(device.recordings)
        results[name] = torch.tensor(gathered([int(equal), stages, replays]))
    return results
