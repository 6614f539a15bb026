"""Live memory through a step, moment by moment."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import effdense
from effdense import reference
from effdense.memory.timeline import ROLES, Training, live_memory, record_step
from tests.helpers.compare import SMALL


def training(save: effdense.Save | None, device: str = "cpu") -> Training:
    torch.manual_seed(0)
    model: nn.Module = reference.DenseNet(**SMALL)
    if save is not None:
        model = effdense.DenseNet(**SMALL, save=save)
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x = torch.empty((4, 3, 9, 10), device=device).normal_()
    return Training(model, optimizer, x, torch.zeros(4, dtype=torch.int64, device=device))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("save", [None, "features", "bottlenecks"])
def test_the_highest_moment_is_the_peak(save: effdense.Save | None, device: str) -> None:
    peak = record_step(lambda: training(save, device))
    moments = live_memory(lambda: training(save, device))
    highest = max(moments, key=lambda moment: moment.total)
    assert highest.total == peak.total
    assert highest.parts == peak.parts
    assert highest.phase == peak.phase


@pytest.mark.parametrize("save", [None, "features", "bottlenecks"])
def test_a_step_s_phases_and_roles(save: effdense.Save | None) -> None:
    moments = live_memory(lambda: training(save))
    assert list(dict.fromkeys(m.phase for m in moments)) == ["forward", "backward", "update"]
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(moments))
    assert all(tuple(m.parts) == ROLES and min(m.parts.values()) >= 0 for m in moments)
    weights = sum(p.numel() for p in training(save).model.parameters())
    last_forward = [m for m in moments if m.phase == "forward"][-1].parts
    last_backward = [m for m in moments if m.phase == "backward"][-1].parts
    assert last_forward["gradients"] == last_forward["gradient buffer"] == 0
    assert last_backward["gradients"] == last_backward["optimizer"] == 4 * weights
    # nothing that forward kept outlives backward but what leaves with its graph
    assert last_backward["features"] < last_forward["features"] / 4
    assert (last_forward["bottlenecks"] > 0) == (save == "bottlenecks")
    if save is not None:
        # the second block's widest: 7 + 3 layers of 4 channels, on quarters of the images
        buffers = {m.parts["gradient buffer"] for m in moments}
        assert 4 * (4 * 9 * 10) * (6 + 2 * 4) in buffers


@pytest.mark.parametrize("save", [None, "features", "bottlenecks"])
def test_what_places_keep_is_what_is_alive_after_forward(save: effdense.Save | None) -> None:
    peak = record_step(lambda: training(save, "meta"))
    moments = live_memory(lambda: training(save, "meta"))
    after = [moment for moment in moments if moment.phase == "forward"][-1]
    made_before = sum(after.parts[role] for role in ("parameters", "optimizer", "input"))
    assert sum(peak.kept.values()) == after.total - made_before


def test_gradients_keep_nothing_but_themselves(each_backend: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        job = training("features")
        job.loss().backward()
    finally:
        torch.set_num_threads(threads)
    for name, parameter in job.model.named_parameters():
        assert parameter.grad is not None
        kept = parameter.grad.untyped_storage().nbytes()
        assert kept == parameter.numel() * parameter.element_size(), name
