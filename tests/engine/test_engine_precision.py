"""Accumulation, clipping, averaged weights and precision, alone and with resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effdense
from effdense.engine.checkpoint import Position
from effdense.engine.distributed import World, joined_world
from effdense.engine.options import TrainConfig
from effdense.engine.plots import read
from effdense.engine.tasks import Classification
from effdense.engine.trainer import Trainer
from effdense.engine.training import train
from tests.helpers import meddlers, workers
from tests.helpers.ranks import RUN, Ranks, final_state, wait_for


def test_a_step_in_parts_is_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    """In two processes, which share the batch unevenly into three parts each."""
    with Ranks(tmp_path, [], 2, meddle=meddlers.accumulated_steps) as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
    with joined_world("cpu", threads=1) as world:
        expected = workers.frozen_steps(world)
    for rank in range(2):
        together = torch.load(tmp_path / f"steps-{rank}.pt", weights_only=True)
        for name, weight in expected.items():
            torch.testing.assert_close(together[name], weight, rtol=1e-10, atol=1e-10)


def trainer(world: World, **options: Any) -> Trainer:
    torch.manual_seed(0)
    network = effdense.densenet_bc(depth=10, growth_rate=4, num_classes=5).double().train()
    config = TrainConfig(data="fake", momentum=0.0, weight_decay=0.0, threads=1, **options)
    task = Classification(tuple("abcde"))
    return Trainer(network, config.resolved(), world, task)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(5, (6,))


def test_the_gradient_is_clipped_to_its_norm() -> None:
    with joined_world("cpu", threads=1) as world:
        clipped = trainer(world, clip_grad=0.01)
    before = [p.detach().clone() for p in clipped.network.parameters()]
    images, labels = batch()
    reference = trainer(world).network
    F.cross_entropy(reference(images), labels).backward()
    gradient = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None])
    assert gradient.norm() > 0.01
    clipped.step(images, labels, 6, lr=1.0)
    moved = [a - b.detach() for a, b in zip(before, clipped.network.parameters(), strict=True)]
    moved_flat = torch.cat([m.flatten() for m in moved])
    torch.testing.assert_close(
        moved_flat, gradient * (0.01 / gradient.norm()), rtol=1e-4, atol=1e-18
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_in_backward_end_with_the_same_bits(optimizer: str) -> None:
    with joined_world("cpu", threads=1) as world:
        both = [
            trainer(world, optimizer=optimizer, step_in_backward=flag, ema=0.5)
            for flag in (False, True)
        ]
    for i in range(3):
        images, labels = batch()
        for each in both:
            each.step(images, labels, 6, lr=0.1 / (i + 1))
    states = [each.tested.state_dict().values() for each in both]
    assert all(map(torch.equal, *states))
    assert all(p.grad is None for p in both[1].network.parameters())


def test_the_averaged_weights_are_an_exponential_moving_average() -> None:
    with joined_world("cpu", threads=1) as world:
        averaged = trainer(world, ema=0.75)
    expected: list[torch.Tensor] | None = None
    for _ in range(3):
        averaged.step(*batch(), 6, lr=0.1)
        now = [p.detach().clone() for p in averaged.network.parameters()]
        expected = (
            now
            if expected is None
            else [0.75 * e + 0.25 * n for e, n in zip(expected, now, strict=True)]
        )
    assert expected is not None
    assert averaged.tested is not averaged.network
    for parameter, value in zip(averaged.tested.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
    moved = [m for m in averaged.tested.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(int(m.num_batches_tracked or 0) > 0 for m in moved)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        [
            "--dtype",
            "bfloat16",
            "--optimizer",
            "adam",
            "--lr",
            0.01,
            "--ema",
            0.9,
            "--accumulate",
            2,
        ],
        ["--dtype", "float16", "--clip-grad", 1.0, "--non-finite", "skip", "--channels-last"],
    ],
    ids=["bf16 adam ema accumulate", "fp16 clip skip channels-last"],
)
def test_every_state_there_is_survives_a_kill(options: list[object], tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        command = [*RUN, *options, "--deterministic", "--work-dir", name]
        if name == "cut":
            checkpoint = tmp_path / name / "checkpoints" / str(Position(1, 6))
            with Ranks(tmp_path, command, 2) as ranks:
                wait_for(checkpoint.exists)
                ranks.kill()
        with Ranks(tmp_path, command, 2) as ranks:
            assert ranks.wait() == [0, 0], ranks.said()
    assert "going on from epoch 1 of 2, step 7" in ranks.said()
    assert final_state(tmp_path / "cut") == final_state(tmp_path / "whole")


def test_bfloat16_learns_along_float32_s_curve(tmp_path: Path) -> None:
    curves = {}
    for dtype in ("float32", "bfloat16"):
        options: dict[str, Any] = {"dtype": dtype, "work_dir": tmp_path / dtype, "epochs": 3}
        small: dict[str, Any] = {"data": "digits", "depth": 10, "growth_rate": 6, "threads": 1}
        train(TrainConfig(**small, **options))
        curves[dtype] = read(tmp_path / dtype / "train.csv")["loss"]
    assert curves["bfloat16"] != curves["float32"]
    for half, single in zip(curves["bfloat16"], curves["float32"], strict=True):
        assert half == pytest.approx(single, rel=0.1)
