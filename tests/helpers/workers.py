"""What the tests run in several processes: ``workers.py NAME OUTPUT``, under torchrun.

Rank 0 saves what NAME returns as OUTPUT; the tests call the same functions in one process.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from math import nan
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import effdense
from effdense.engine import training
from effdense.engine.data.images import Batch, ImageData, InMemory, Normalization
from effdense.engine.data.order import share
from effdense.engine.distributed import (
    World,
    all_or_none,
    gathered,
    joined_world,
    launched_processes,
)
from effdense.engine.normalization import settle_normalization
from effdense.engine.options import TrainConfig
from effdense.engine.scores import Tally, full_score
from effdense.engine.signals import StopSignals
from effdense.engine.tasks import Classification, MultiLabel, Task
from effdense.engine.trainer import Step, Trainer
from effdense.errors import UserError, one_line_errors
from effdense.verification.comparison import randomize_norms
from tests.helpers.replayed_ranks import refusals, replayed_steps, unseen_group
from tests.helpers.replayed_training import trained_by_replays

BATCH_SIZE = 10  # not a multiple of 3
TEST_SIZES = (1, 2, 3, 4, 25, 101)


def frozen_steps(world: World, **options: Any) -> dict[str, Tensor]:
    """Weights after two steps of SGD in float64 on batches of 10, every norm in eval mode."""
    return _steps(world, frozen=True, **options)


def equal_steps(world: World) -> dict[str, Tensor]:
    """What any number of processes agree on: steps with frozen norms, and --sync-batch-norm."""
    steps = {"frozen": frozen_steps(world), "synchronised": _steps(world, sync_batch_norm=True)}
    return {
        f"{kind} {name}": value for kind, found in steps.items() for name, value in found.items()
    }


def _steps(world: World, *, frozen: bool = False, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = effdense.densenet_bc(depth=16, growth_rate=4, num_classes=5).double()
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(not frozen)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    if options.get("sync_batch_norm"):
        effdense.SyncBatchNorm.convert_sync_batchnorm(network)
    config = TrainConfig(
        data="fake",
        batch_size=BATCH_SIZE,
        weight_decay=0.01,
        label_smoothing=0.1,
        threads=1,
        **options,
    ).resolved(world_size=world.world_size)
    trainer = Trainer(network, config, world, Classification(tuple("abcde"), 0.1))
    images = torch.randn(2, BATCH_SIZE, 3, 12, 12, dtype=torch.float64)
    labels = torch.randint(5, (2, BATCH_SIZE))
    for step in range(2):
        mine = share(torch.arange(BATCH_SIZE), world.rank, world.world_size)
        trainer.step(images[step, mine], labels[step, mine], BATCH_SIZE, lr=0.1)
    return {name: value.detach() for name, value in network.state_dict().items()}


class Watched(InMemory):
    """Remembers which samples were asked for."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__(images, labels, Normalization((0.0,) * 3, (1.0,) * 3))
        self.asked: list[int] = []

    def batches(
        self, indices: Sequence[Tensor], epoch: int | None, device: torch.device
    ) -> Iterator[Batch]:
        assert epoch is None
        self.asked += [index for chosen in indices for index in chosen.tolist()]
        return super().batches(indices, epoch, device)


def evaluations(world: World) -> dict[str, Tensor]:
    """For each size of the test set: loss, error, samples, and how often each was asked for.

    The running statistics differ between the processes, by as much as their ranks do: at first
    rank r's are those of a single process plus r - (N - 1) / 2, which average to the former.
    """
    torch.manual_seed(0)
    network = effdense.densenet_bc(depth=10, growth_rate=4, num_classes=5)
    config = TrainConfig(data="fake", batch_size=12, threads=1).resolved()
    trainer = Trainer(network, config, world, Classification(tuple("abcde")))
    # after the trainer, which starts all processes from the same buffers
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean += world.rank - (world.world_size - 1) / 2
    results = {}
    for size in TEST_SIZES:
        split = Watched(torch.randn(size, 3, 8, 8), torch.randint(5, (size,)))
        score = trainer.evaluate(split)
        counts = torch.bincount(torch.tensor(split.asked, dtype=torch.int64), minlength=size)
        if world.world_size > 1:
            torch.distributed.all_reduce(counts)
        results[f"{size} score"] = torch.tensor(
            [score.loss, score.error, score.samples], dtype=torch.float64
        )
        results[f"{size} asked"] = counts
    return results


def scores(world: World) -> dict[str, Tensor]:
    """What processes make together of their shares of some answers."""
    found = {}
    for samples in (2, 25):
        torch.manual_seed(1)
        outputs, labels = torch.randn(samples, 4), torch.randint(3, (samples,))
        gaps = (torch.rand(samples, 4) < 0.5).float().masked_fill(torch.rand(samples, 4) < 0.3, nan)
        mine = share(torch.arange(samples), world.rank, world.world_size)
        tasks: list[tuple[Task, Tensor]] = [
            (Classification(tuple("abcd")), labels),
            (MultiLabel(tuple("abcd"), known=2.0), gaps),
        ]
        for task, truth in tasks:
            tally = Tally(task, world.device)
            tally.add(torch.ones(()), outputs[mine], truth[mine])
            score = full_score(tally.score(), task, outputs[mine], truth[mine], samples)
            assert len(set(map(repr, gathered(score)))) == 1
            found[f"{samples} {task.kind} metrics"] = torch.tensor(
                [score.loss, score.error, *score.metrics.values()], dtype=torch.float64
            )
            numbers = [[mistake.number, mistake.probability] for mistake in score.mistakes]
            found[f"{samples} {task.kind} mistakes"] = torch.tensor(numbers, dtype=torch.float64)
            per_class = torch.tensor(list(score.per_class.values()), dtype=torch.float64)
            found[f"{samples} {task.kind} per class"] = per_class
            found[f"{samples} {task.kind} confusion"] = torch.tensor(score.confusion)
    return found


def normalization(world: World) -> dict[str, Tensor]:
    """What is measured of five images, in batches of other sizes for other numbers of processes."""
    torch.manual_seed(0)
    images, labels = torch.rand(5, 2, 7, 9) * 255, torch.arange(5)
    split = InMemory(images, labels, Normalization((0.0,) * 2, (1.0,) * 2))
    config = TrainConfig(data="imagefolder", normalization="measured", threads=1).resolved()
    data = ImageData(split, split, 5, 2)
    settle_normalization(config, data, world)
    fact = data.train.normalization.fact()
    return {"measured": torch.tensor([fact["mean"], fact["std"]], dtype=torch.float64)}


def sharded_steps(world: World) -> dict[str, Tensor]:
    """Two forwards and backwards of a network whose blocks, transitions and rest are sharded.

    As they are of torchvision's, of what ``convert`` makes of it, and of our own; no warnings.
    """
    torch.manual_seed(0)
    config: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 8}
    naive = torchvision.models.DenseNet(**config, bn_size=2, num_classes=5).double()
    randomize_norms(naive)
    own = effdense.DenseNet(**config, bn_size=2, num_classes=5).double()
    randomize_norms(own)  # their eps and momentum too, which no state has
    own.load_state_dict(naive.state_dict())
    converted = effdense.convert(copy.deepcopy(naive))
    torch.manual_seed(world.rank)
    x = torch.randn(2, 3, 37, 33, dtype=torch.float64)
    found = {}
    for kind, network in {"naive": naive, "converted": converted, "own": own}.items():
        for name, module in network.features.named_children():
            if "block" in name or "transition" in name:
                fully_shard(module)
        fully_shard(network)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                output = network(x)
                output.square().mean().backward()
        assert isinstance(output, Tensor)
        found[f"{kind} output"] = output.detach()
        for name, parameter in network.named_parameters():
            assert isinstance(parameter.grad, DTensor)
            found[f"{kind} {name}"] = parameter.grad.full_tensor()
        found |= {f"{kind} {name}": buffer for name, buffer in network.named_buffers()}
    return found


def mistake_on_rank_1(world: World) -> dict[str, Tensor]:
    """A user's mistake that only one process can see."""
    with all_or_none():
        if world.rank == 1:
            raise UserError("the disk of rank 1 is full")
    raise AssertionError("every process must have raised")


def defect_on_rank_1(world: World) -> dict[str, Tensor]:
    """A process that fails in the second epoch, while the others wait for its gradients."""
    step = Trainer.step

    def failing(self: Trainer, *arguments: Any, **options: Any) -> Step:
        if world.rank == 1 and self.optimizer.state:
            raise RuntimeError("a defect on rank 1")
        return step(self, *arguments, **options)

    Trainer.step = failing  # type: ignore[method-assign]
    options = TrainConfig(data="fake", depth=10, image_size=8, threads=1)
    config = options.resolved(world_size=world.world_size)
    training._run(config, world, StopSignals())
    raise AssertionError("training must have failed")


WORKERS: dict[str, Callable[[World], dict[str, Tensor]]] = {
    function.__name__: function
    for function in (
        equal_steps,
        evaluations,
        scores,
        normalization,
        sharded_steps,
        mistake_on_rank_1,
        defect_on_rank_1,
        replayed_steps,
        refusals,
        unseen_group,
        trained_by_replays,
    )
}


def instead_of_a_run(name: str, output: Path, rank: int) -> None:
    """For ``Ranks``: the process does what is called NAME, saves as OUTPUT and ends."""
    work(name, output)
    os._exit(0)


def work(name: str, output: Path) -> None:
    """Do what is called NAME in this process among the others; rank 0 saves it as OUTPUT."""
    with one_line_errors(), joined_world("cpu", threads=1) as world:
        assert world.world_size == launched_processes()[0]
        result = WORKERS[name](world)
        if world.is_main:
            torch.save(result, output)


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
