"""Steps that are left out leave nothing behind, whatever had been computed by then."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import effdense
from effdense.engine import networks
from effdense.engine import trainer as trainer_module
from effdense.engine.distributed import World
from effdense.engine.options import TrainConfig
from effdense.engine.tasks import Classification
from effdense.engine.trainer import Step, Trainer
from effdense.engine.undoing import Undo
from effdense.errors import UserError


@pytest.mark.parametrize("holds", [True, False])
def test_all_bits_come_back_or_stay(holds: bool) -> None:
    numbers = torch.tensor([0.0, -0.0, 1.5, float("nan"), float("inf"), -1e-42])
    tensors = [numbers.clone(), numbers.half(), numbers.double(), torch.arange(6), torch.ones(())]
    tensors += [torch.tensor([True, False]), torch.randn(4, 5).t()[1:]]
    before = [tensor.clone() for tensor in tensors]
    undo = Undo(tensors)
    for tensor in tensors:
        tensor.copy_(tensor.flip(0) if tensor.ndim else tensor * float("nan"))
    changed, new = [tensor.clone() for tensor in tensors], torch.full((3,), float("nan"))
    undo.unless(torch.tensor(holds), [*tensors, new])
    for actual, expected in zip(tensors, changed if holds else before, strict=True):
        kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = [t.contiguous().view(kind[t.element_size()]) for t in (actual, expected)]
        assert torch.equal(*bits)
    assert bool(new.isnan().all()) is holds
    assert bool((new == 0).all()) is not holds


def trainer(**options: Any) -> Trainer:
    torch.manual_seed(0)
    network: Any = effdense.densenet_bc(10, 4, num_classes=5, drop_rate=0.2, backend="torch")
    config = TrainConfig(data="fake", image_size=8, **options).resolved()
    world = World(0, 1, 0, 1, torch.device("cpu"), None)
    found = Trainer(network, config, world, Classification(tuple("abcde")))
    found.network.train()
    return found


def step(trained: Trainer, number: int, bad: bool = False) -> Step:
    torch.manual_seed(number)
    images, labels = torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
    if bad:
        images[2] = float("inf")
    found = trained.step(images, labels, 6, lr=0.01)
    trained._tally.add(found.loss, found.logits, labels, found.held)
    return found


def state(trained: Trainer) -> list[Tensor]:
    found = trained._moved()
    return [tensor.detach().clone() for tensor in [trained._tally.state(), *found]]


OPTIONS: list[dict[str, Any]] = [
    *({"optimizer": name} for name in ("sgd", "adam", "adamw", "rmsprop")),
    {"dtype": "float16", "clip_grad": 1.0},
    {"dtype": "float16", "optimizer": "rmsprop", "ema": 0.9},
]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_left_out_is_as_if_it_had_not_been(
    options: dict[str, Any], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Be it the first or a later one; but for the average, which begins with the first."""
    monkeypatch.setattr(trainer_module, "FUSED", ("cpu",) if fused else ())
    left_out, without = (trainer(non_finite="skip", **options) for _ in range(2))
    first = 1 if "ema" in options else 0
    for number in range(3):
        if number >= first:
            before = state(left_out)
            assert not step(left_out, 10 + number, bad=True).held
            after = state(left_out)
            # what the optimiser makes at its first step is of zeros
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=number > 0))
        for trained in (left_out, without):
            assert step(trained, number).held
    for actual, expected in zip(state(left_out), state(without), strict=True):
        assert torch.equal(actual, expected)
    assert (left_out.skipped, without.skipped) == (3 - first, 0)


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
def test_an_overflow_in_the_first_step_of_float16_leaves_nothing(
    optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused steps of torch's SGD begin with momenta that nobody wrote, where the first is left."""
    monkeypatch.setattr(trainer_module, "FUSED", ("cpu",))
    trained = trainer(dtype="float16", optimizer=optimizer)
    trained.scaler._scale.fill_(2.0**80)  # type: ignore[union-attr]
    weights = [p.detach().clone() for p in trained.network.parameters()]
    step(trained, 0)
    assert all(
        torch.equal(p, w) for p, w in zip(trained.network.parameters(), weights, strict=True)
    )
    trained.scaler._scale.fill_(4.0)  # type: ignore[union-attr]
    step(trained, 1)
    assert all(p.isfinite().all() for p in trained.network.parameters())
    assert not all(
        torch.equal(p, w) for p, w in zip(trained.network.parameters(), weights, strict=True)
    )


def test_a_step_that_is_left_out_leaves_the_scale_of_losses() -> None:
    trained = trainer(dtype="float16", non_finite="skip")
    step(trained, 0)
    before = trained.scaler.state_dict()
    assert before["_growth_tracker"] == 1
    step(trained, 1, bad=True)
    assert trained.scaler.state_dict() == before
    step(trained, 2)
    assert trained.scaler.state_dict()["_growth_tracker"] == 2


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_budget_counts_what_is_held_to_be_put_back(optimizer: Any, ema: float) -> None:
    trained = trainer(non_finite="skip", optimizer=optimizer, ema=ema)
    step(trained, 0)
    # but for counts of steps, which take nothing
    moved = [t for t in Undo(trained._moved())._before if t.dim() or t.dtype == torch.int64]
    average = [] if trained.average is None else list(trained.average.module.state_dict().values())
    held = sum(t.nbytes for t in [*moved, *average])
    assert networks.held_copies(trained.network, trained.config) == held

    config = TrainConfig(
        data="fake",
        image_size=8,
        batch_size=6,
        non_finite="skip",
        optimizer=optimizer,
        ema=ema,
    ).resolved()
    with mock.patch.object(networks, "plan", wraps=networks.plan) as planned:
        said = networks.fit_to_budget(trained.network, config, trained.world, 3, "64MiB")
    assert planned.call_args.args[2] == 64 * 2**20 - held
    assert "--non-finite skip hold" in said
    with pytest.raises(UserError, match="what --ema and --non-finite skip hold takes"):
        networks.fit_to_budget(trained.network, config, trained.world, 3, str(held))
