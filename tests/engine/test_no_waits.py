"""A step reads nothing from its device and copies nothing to it: the host never waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import effdense
from effdense.backends.base import Statistics
from effdense.backends.torch_backend import TorchBackend
from effdense.engine import trainer as trainer_module
from effdense.engine.data.images import NORMALIZATIONS, InMemory, ShiftAndFlip
from effdense.engine.distributed import World, all_finite
from effdense.engine.options import TrainConfig
from effdense.engine.tasks import Classification
from effdense.engine.trainer import Trainer

META = torch.device("meta")
_READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique"}


class NoReading(TorchDispatchMode):
    """Reading a tensor of ``device`` raises, and so does copying between it and the host."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = [t for t in given if t.device.type == self.device.type]
        assert not (here and name in _READS), f"{name} reads from the device"
        out = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            kinds = {t.device.type for t in [*given, *tree_leaves(out)]}
            assert len(kinds) == 1, f"{name} copies between {kinds}"
        return out


class NoConstants(TorchFunctionMode):
    """Making a tensor of Python numbers on a device raises: that is a copy too."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        device = torch.device((kwargs or {}).get("device") or "cpu")
        constant = func in (torch.tensor, torch.as_tensor)
        assert not (constant and device.type != "cpu"), "numbers are copied to the device"
        return func(*args, **(kwargs or {}))


def trainer(device: torch.device, world_size: int = 1, **options: Any) -> Trainer:
    config = TrainConfig(data="fake", depth=10, growth_rate=4, image_size=8, **options)
    resolved = config.resolved(world_size=world_size)
    torch.manual_seed(0)
    network: Any = effdense.densenet_bc(10, 4, num_classes=10, drop_rate=resolved.drop_rate)
    if resolved.sync_batch_norm:
        network = effdense.SyncBatchNorm.convert_sync_batchnorm(network)
    world = World(0, world_size, 0, world_size, device, "gloo" if world_size > 1 else None)
    task = Classification(tuple("abcdefghij"), resolved.label_smoothing)
    return Trainer(network.to(device), resolved, world, task)


def step(trained: Trainer, images: int = 6) -> None:
    device, size = trained.world.device, trained.config.image_size
    batch = torch.zeros(images, 3, size, size, device=device)
    labels = torch.zeros(images, dtype=torch.int64, device=device)
    loss, logits, held = trained.step(batch, labels, images * trained.world.world_size, 0.1)
    trained._tally.add(loss, logits, labels, held)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"save": "bottlenecks"},
    {"save": "input"},
    {"save": "all"},
    {"drop_rate": 0.2},
    {"optimizer": "adam"},
    {"optimizer": "adamw"},
    {"optimizer": "rmsprop"},
    {"schedule": "cosine", "label_smoothing": 0.1},
    {"clip_grad": 1.0},
    {"accumulate": 4},
    {"ema": 0.9},
    {"channels_last": True},
    {"dtype": "bfloat16"},
    *({"non_finite": "skip", "optimizer": o} for o in ("sgd", "adam", "adamw", "rmsprop")),
    {"non_finite": "skip", "ema": 0.9, "clip_grad": 1.0, "accumulate": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_on_a_device(options: dict[str, Any]) -> None:
    trained = trainer(META, **options)
    # what is made once
    step(trained)
    with NoReading(META), NoConstants():
        step(trained)


def test_norms_of_many_tiles_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels don't run, torch operations take a norm's statistics by tiles of rows."""
    monkeypatch.setattr(TorchBackend, "_tile_rows", lambda self, x: 100)
    rows = torch.zeros(350, 6, device=META)
    found = Statistics(rows[0].clone(), rows[0].clone())
    with NoReading(META), NoConstants():
        TorchBackend("cuda").statistics(rows, found)
    values = torch.randn(350, 6, dtype=torch.float64) * 3 + 5
    found = Statistics(torch.empty(6).double(), torch.empty(6).double())
    TorchBackend("cpu").statistics(values, found)
    torch.testing.assert_close(found.mean, values.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.var, values.var(0, correction=0), rtol=1e-12, atol=0)


def test_a_batch_of_a_data_set_on_a_device() -> None:
    images = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    for augment in (None, ShiftAndFlip(1, True), ShiftAndFlip(0, True)):
        split = InMemory(images, torch.zeros(40).long(), NORMALIZATIONS["digits"], augment)
        batches = split.batches(torch.arange(40).split(10), 1, META)
        next(batches)
        with NoReading(META), NoConstants():
            for batch, labels in batches:
                assert (batch.shape, labels.shape) == ((10, 1, 8, 8), (10,))


def test_float16_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # on a CPU, where optimisers are fused as on a GPU; meta has no such
    cpu = torch.device("cpu")
    monkeypatch.setattr(trainer_module, "FUSED", ("cpu",))
    skips: dict[str, Any] = {"non_finite": "skip"}
    every: list[dict[str, Any]] = [{}, {"clip_grad": 1.0}, {"optimizer": "adamw"}]
    every += [{"optimizer": "rmsprop"}, {"optimizer": "rmsprop", "clip_grad": 1.0}]
    for options in [*every, skips, {"optimizer": "rmsprop", **skips}]:
        trained = trainer(cpu, dtype="float16", backend="torch", **options)
        # CPU tensors of blocks are read for another reason: which channels are near zero
        block: Any
        for block in trained.network.modules():
            if hasattr(block, "save"):
                block.save = "all"
        step(trained)
        with NoReading(cpu):
            step(trained)


@pytest.fixture
def two_processes() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_processes")
def test_synchronised_norms_know_how_many_images_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer_module, "data_parallel", lambda model, world: model)
    cpu = torch.device("cpu")
    for options in ({}, {"accumulate": 4}):
        trained = trainer(cpu, 2, sync_batch_norm=True, dtype="bfloat16", **options)
        with NoReading(cpu):
            step(trained)


def test_reading_is_noticed() -> None:
    with NoReading(META), pytest.raises(AssertionError, match="copies between"):
        torch.zeros(2).to(META)
    with NoReading(torch.device("cpu")), pytest.raises(AssertionError, match="reads from"):
        torch.zeros(2).sum().item()
    with NoConstants(), pytest.raises(AssertionError, match="numbers are copied"):
        torch.tensor([1.0], device=META)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_all_finite(bad: float) -> None:
    tensors = [torch.ones(3, 2), torch.full((5,), 1e38), torch.zeros(0), torch.tensor(7)]
    tensors += [torch.ones(2, dtype=torch.float64), torch.full((2,), 6e4, dtype=torch.float16)]
    assert all_finite(tensors)
    for i in (0, 1, 4, 5):
        broken = [tensor.clone() for tensor in tensors]
        broken[i].view(-1)[-1] = bad
        assert not all_finite(broken)
