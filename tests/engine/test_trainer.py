"""What a trainer counts and keeps from one step to the next."""

from __future__ import annotations

import copy
from typing import Any

import torch

import effdense
from effdense.engine.checkpoint import Position
from effdense.engine.data.images import InMemory, Normalization
from effdense.engine.distributed import World
from effdense.engine.options import TrainConfig
from effdense.engine.progress import Progress
from effdense.engine.tasks import Classification
from effdense.engine.trainer import Trainer


def trainer(world: World, seed: int) -> Trainer:
    torch.manual_seed(seed)
    network = effdense.densenet_bc(depth=10, growth_rate=2, num_classes=3)
    config = TrainConfig(data="fake", batch_size=4, ema=0.5, threads=1).resolved()
    return Trainer(network, config, world, Classification(tuple("abc")))


def test_an_epoch_counts_its_steps_down_and_goes_on_from_any(alone: World) -> None:
    images = torch.randn(14, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    split = InMemory(images, torch.arange(14) % 3, Normalization((0.0,) * 3, (1.0,) * 3))
    first, second = trainer(alone, seed=0), trainer(alone, seed=1)
    average = first.average
    assert average is not None
    began = copy.deepcopy(first.shared_state()["average"])
    left: list[int] = []
    kept: list[Any] = []

    def after_step(steps: int) -> None:
        left.append(steps)
        if steps == 1:
            # as a test of the averaged network would have left them
            for number, buffer in enumerate(average.buffers(), 1):
                buffer.fill_(number)
            kept.extend([first.position, first.shared_state(), first.own_state()])
            kept[:] = copy.deepcopy(kept)

    progress = Progress(first.config, alone)
    score = first.train_epoch(split, progress, after_step)
    assert left == [2, 1, 0]
    assert first.position == Position(1, 3)
    moved = first.shared_state()["average"]
    assert not any(torch.equal(moved[name], value) for name, value in began.items())
    position, shared, own = kept
    assert position == Position(1, 2)
    second.restore(position, shared)
    second.restore_own(own)
    for name, buffer in second.own_state()["average"].items():
        assert torch.equal(buffer, own["average"][name]), name
    assert second.train_epoch(split, progress, left.append) == score
    assert left == [2, 1, 0, 0]
    for one, other in ((first.network, second.network), (average, second.average)):
        assert other is not None
        there = other.state_dict()
        assert all(torch.equal(value, there[name]) for name, value in one.state_dict().items())
