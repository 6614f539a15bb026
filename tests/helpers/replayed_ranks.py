"""Replayed steps of networks whose norms synchronise, in one of several processes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import effdense
from effdense.engine.distributed import World, gathered
from effdense.verification.comparison import randomize_norms
from tests.helpers.replaying import ReplayingDevice, replaying

SHARES = (3, 2)
# in the second step rank 0 has as many images as ever
STEPS = (SHARES, (3, 1), SHARES)


def _ours(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 6}
    options = {"bn_size": 2, **options}
    model = effdense.DenseNet(**sizes, num_classes=5, small_inputs=True, **options)
    return _synchronised(model)


def _synchronised(model: nn.Module) -> nn.Module:
    randomize_norms(model)
    return effdense.SyncBatchNorm.convert_sync_batchnorm(model)


def _some_frozen() -> nn.Module:
    model = _ours()
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    for norm in norms[::2]:
        norm.eval()
    return model


def _converted() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.DenseNet(4, (2, 3), 8, num_classes=5, drop_rate=0.2)
    return effdense.convert(_synchronised(model))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "features": _ours,
    "bottlenecks": lambda: _ours(save="bottlenecks"),
    "no bottleneck": lambda: _ours(bn_size=None),
    "input": lambda: _ours(save="input", drop_rate=0.3),
    "some frozen": _some_frozen,
    "autocast": lambda: _ours(save="bottlenecks"),
    "converted": _converted,
}


@contextmanager
def _device(device: ReplayingDevice | None = None) -> Iterator[ReplayingDevice]:
    os.environ["EFFDENSE_BACKEND"] = "torch"
    with replaying(device) as found, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield found


def _images(kind: str, seed: int, share: int, rank: int) -> Tensor:
    pixels = (35, 33) if kind == "converted" else (10, 9)
    generator = torch.Generator().manual_seed(10 * seed + rank)
    return torch.randn(share, 3, *pixels, generator=generator)


def _autocast(kind: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else nullcontext()


def _trained(kind: str, model: nn.Module, rank: int) -> list[Tensor]:
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.05, momentum=0.9)
    torch.manual_seed(9 + rank)
    found = []
    for number, shares in enumerate(STEPS):
        optimizer.zero_grad()
        with _autocast(kind), effdense.known_images(shares):
            output = wrapped(_images(kind, number, shares[rank], rank))
        output.float().square().sum().backward()
        optimizer.step()
        found += [output.detach(), *[t.detach().clone() for t in model.state_dict().values()]]
    return found


def replayed_steps(world: World) -> dict[str, Tensor]:
    """For each kind: whether replays are the steps without, and stages, and replays by rank."""
    found = {}
    for kind, make in KINDS.items():
        model = make()
        with _device() as device:
            expected = _trained(kind, make(), world.rank)
            with _autocast(kind), effdense.known_images(SHARES):
                graphs = effdense.cuda_graphs(model, _images(kind, 99, SHARES[world.rank], 0))
            device.replays = 0
            actual = _trained(kind, model, world.rank)
        equal = all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert not graphs.left_out, graphs
        found[kind] = torch.tensor(gathered([int(equal), len(graphs.stages), device.replays]))
    return found


class _Failing(ReplayingDevice):
    """Can't record one thing."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        # here collectives are made while they are recorded: not to leave the others alone in them
        found = super().record(function)
        if len(self.recordings) - 1 == self.number:
            raise RuntimeError("CUDA error: out of memory")
        return found


def refusals(world: World) -> dict[str, Tensor]:
    """What one process can't capture none does, and nobody waits for it; what is left out."""
    shown = _images("", 0, SHARES[world.rank], world.rank)
    for number in range(4):
        failing = _Failing(number if world.rank == 1 else -1)
        with _device(failing), effdense.known_images(SHARES):
            graphs = effdense.cuda_graphs(_ours(), shown)
        assert graphs.stages == ()
        assert graphs.fault is not None
        expected = "out of memory" if world.rank == 1 else "another process can not"
        assert expected in graphs.fault, graphs.fault
    for known, reason in (
        (nullcontext(), "nobody said how many images each has"),
        (effdense.known_images(SHARES), "not by NCCL"),
    ):
        device = ReplayingDevice()
        if reason == "not by NCCL":
            device.records_collectives = lambda group: False  # type: ignore[method-assign]
        with _device(device), known:
            graphs = effdense.cuda_graphs(_ours(), shown)
        assert graphs.stages == ()
        assert len(graphs.left_out) == 2
        assert all(reason in why for why in graphs.left_out.values()), graphs.left_out
    return {}


def unseen_group(world: World) -> dict[str, Tensor]:
    """Captured while its norms were alone: not replayed where they synchronise."""
    from effdense.norms.synchronization import unsynchronised

    model, shown = _ours(), _images("", 0, SHARES[world.rank], world.rank)
    with _device() as device:
        with unsynchronised():
            graphs = effdense.cuda_graphs(model, shown)
            device.replays = 0
            model(shown).sum().backward()
        alone = device.replays
        model(shown).sum().backward()
        assert device.replays == alone
    return {"replays": torch.tensor([len(graphs.stages), alone])}
