"""What the processes of a run have in common: a machine's memory, the norms' running statistics."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

import effdense
from effdense.engine import networks
from effdense.engine.distributed import World, average_running_statistics
from effdense.engine.options import TrainConfig


@pytest.mark.parametrize(
    ("processes", "budget", "each"),
    [(1, "auto", 1000), (2, "auto", 500), (3, "auto", 333), (2, "2GiB", 2 << 30)],
)
def test_processes_on_a_machine_share_what_it_has(
    processes: int, budget: str, each: int, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Plan:
        def apply(self, network: Any) -> None:
            asked.append(network)

    def plan(network: Any, shape: Any, budget: int, **options: Any) -> Plan:
        asked.extend([budget, shape, options["ddp"]])
        return Plan()

    monkeypatch.setattr(networks, "plan", plan)
    known = {"auto": 1000, "2GiB": 2 << 30}
    monkeypatch.setattr(networks, "budget_bytes", lambda budget, kind: known[budget])
    world = dataclasses.replace(alone, world_size=processes, local_world_size=processes)
    config = TrainConfig(data="fake", batch_size=7, image_size=8).resolved()
    network = torch.nn.Identity()
    networks.fit_to_budget(network, config, world, 3, budget)
    # the largest share of seven images
    assert asked == [each, (-(-7 // processes), 3, 8, 8), processes > 1, network]


def test_running_statistics_are_averaged_each_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As two processes would, of which the other's are all one larger."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda flat: flat.mul_(2).add_(1))
    model: Any = effdense.densenet_bc(10, 2).double()
    model.features.denseblock1.denselayer1.norm1.float()
    for number, buffer in enumerate(model.buffers()):
        if buffer.is_floating_point():
            buffer.copy_(torch.arange(buffer.numel()) + 10 * number)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    average_running_statistics(model)
    for name, buffer in model.named_buffers():
        moved = 0.5 if buffer.is_floating_point() else 0
        assert torch.equal(buffer, before[name] + moved), name
        assert buffer.dtype == before[name].dtype


@pytest.mark.parametrize("processes", [3, 7, 64])
def test_statistics_that_are_the_same_everywhere_stay(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of frozen norms, bit for bit, however often they are averaged."""

    def all_reduce(flat: torch.Tensor) -> None:
        own = flat.clone()
        for _ in range(processes - 1):
            flat += own

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: processes)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    norms = torch.nn.ModuleList(torch.nn.BatchNorm1d(1000) for _ in range(3))
    norms[1].bfloat16()
    for buffer in norms.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(-3, 3)
    before = [buffer.clone() for buffer in norms.buffers()]
    average_running_statistics(norms)
    assert all(map(torch.equal, norms.buffers(), before))
    average_running_statistics(torch.nn.Linear(2, 2))
