"""The configurations over which estimates are held against measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import effdense
from effdense import reference
from effdense.choices import OptimizerName
from effdense.memory.optimizers import make_optimizer
from effdense.memory.timeline import Training
from effdense.models import configuration


@dataclass(frozen=True)
class Configuration:
    """One network and one batch.

    ``network`` are arguments of the constructor; ``save`` is one mode, several by "+", one
    per block, or "naive" for ``effdense.reference``. ``dtype`` is that of everything,
    ``amp`` what autocast computes in. ``ddp`` is of one of two processes that train together, with
    gradients beside DistributedDataParallel's buckets, or as views of them.
    """

    family: str
    network: dict[str, Any] = field(hash=False)
    save: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    amp: str | None = None
    optimizer: OptimizerName = "sgd"
    ddp: Literal["beside buckets", "in buckets"] | None = None

    def model(self) -> nn.Module:
        """The network, float32 or ``dtype``, on the present default device."""
        kind: Callable[..., nn.Module] = effdense.DenseNet
        options = dict(self.network)
        if self.save == "naive":
            kind = reference.DenseNet
        else:
            modes = self.save.split("+")
            options["save"] = modes[0] if len(modes) == 1 else modes
        return kind(**options).to(getattr(torch, self.dtype))

    def predicted(self) -> effdense.Estimate:
        """By effdense.estimate, without the network."""
        with torch.device("meta"):
            model = self.model()
        return effdense.estimate(
            model,
            self.shape,
            optimizer=self.optimizer,
            dtype=self._amp(),
            ddp=self.ddp is not None,
            gradient_as_bucket_view=self.ddp == "in buckets",
        )

    def training(self) -> Training:
        """A real step, ready to be taken; of DDP in a process of its group."""
        model = self.model()
        if self.ddp is not None:
            model = DistributedDataParallel(model, gradient_as_bucket_view=self.ddp == "in buckets")
        x = torch.randn(self.shape, dtype=getattr(torch, self.dtype))
        target = torch.zeros(self.shape[0], dtype=torch.int64)
        optimizer = make_optimizer(self.optimizer, model.parameters())
        return Training(model, optimizer, x, target, self._amp())

    def tiny(self) -> Configuration:
        """The smallest network of the same kind, to warm a process up with."""
        dims = len(self.shape) - 2
        network = {**self.network, "growth_rate": 4, "num_init_features": 8, "num_classes": 10}
        network["block_config"] = (1,) * len(self.network["block_config"])
        shape = (2, 3, *[8 if self.network.get("small_inputs") else 32] * dims)
        return replace(self, network=network, shape=shape)

    def _amp(self) -> torch.dtype | None:
        return None if self.amp is None else getattr(torch, self.amp)

    def label(self) -> str:
        size = "x".join(map(str, self.shape))
        kind = self.dtype if self.amp is None else f"{self.amp} autocast"
        optimizer = "" if self.optimizer == "sgd" else f", {self.optimizer}"
        ddp = "" if self.ddp is None else f", gradients {self.ddp}"
        return f"{self.family}, {self.save}, {size}, {kind}{optimizer}{ddp}"

    def columns(self) -> dict[str, Any]:
        """As of :meth:`harness.case.Case.columns`."""
        return {
            "arch": self.label(),
            "growth_rate": self.network["growth_rate"],
            "batch_size": self.shape[0],
            "image_size": "x".join(map(str, self.shape[2:])),
            "spatial_dims": len(self.shape) - 2,
            "dtype": self.amp or self.dtype,
            "device": "cpu",
        }

    def request(self) -> dict[str, Any]:
        """For a process of its own, through JSON; see :func:`from_request`."""
        return asdict(self)


def from_request(values: dict[str, Any]) -> Configuration:
    return Configuration(**{**values, "shape": tuple(values["shape"])})


def _bc(
    depth: int,
    k: int,
    save: str,
    batch: int,
    size: int | tuple[int, ...] = 32,
    **other: Any,
) -> Configuration:
    own = {name: other.pop(name) for name in ("drop_rate",) if name in other}
    spatial = (size, size) if isinstance(size, int) else size
    name = f"BC ({depth}, k {k}{', dropout' if own else ''})"
    return Configuration(
        name, configuration("densenet_bc", depth, k, **own), save, (batch, 3, *spatial), **other
    )


def _imagenet(name: str, save: str, batch: int, size: int, **other: Any) -> Configuration:
    return Configuration(name, configuration(name, 0, 0), save, (batch, 3, size, size), **other)


def _scan(save: str, batch: int, size: int, **other: Any) -> Configuration:
    """densenet121 of volumes, with its stem."""
    network = configuration("densenet121", 0, 0, spatial_dims=3)
    return Configuration("densenet121 3-D", network, save, (batch, 3, *[size] * 3), **other)


def _plain(save: str, batch: int) -> Configuration:
    """The paper's DenseNet (40, k 12) without bottlenecks or compression."""
    network = {"growth_rate": 12, "block_config": (12, 12, 12), "num_init_features": 16}
    network |= {"bn_size": None, "compression": 1.0, "small_inputs": True, "num_classes": 10}
    return Configuration("DenseNet (40, k 12)", network, save, (batch, 3, 32, 32))


def _volume(
    dims: int, save: str, batch: int, size: int, small: bool = True, **other: Any
) -> Configuration:
    network = {"growth_rate": 16, "block_config": (4, 6, 4), "num_init_features": 32}
    network |= {"spatial_dims": dims, "small_inputs": small, "num_classes": 10}
    return Configuration(
        f"{dims}-D (4+6+4, k 16)", network, save, (batch, 3, *[size] * dims), **other
    )


GRID: tuple[Configuration, ...] = (
    *(_bc(40, 12, save, 64) for save in ("features", "bottlenecks", "input", "all", "naive")),
    *(_bc(100, 12, save, 16) for save in ("features", "bottlenecks", "input", "naive")),
    _bc(100, 12, "features", 64),
    _bc(100, 24, "bottlenecks+features+input", 16),
    _bc(250, 12, "features", 8),
    _bc(250, 12, "bottlenecks", 8),
    _bc(250, 24, "features", 2),
    _bc(190, 40, "features", 2, 16),
    _bc(22, 24, "features", 128),
    _bc(22, 24, "bottlenecks", 128),
    _bc(22, 48, "input", 32),
    _bc(40, 24, "input+bottlenecks+features", 32),
    _bc(40, 24, "features+features+bottlenecks", 32),
    _bc(40, 12, "all+features+bottlenecks", 32),
    _bc(40, 12, "features", 1, 128),
    _bc(40, 12, "features", 7, (33, 47)),
    _bc(40, 12, "naive", 7, (33, 47)),
    _bc(40, 12, "features", 32, drop_rate=0.2),
    _bc(40, 12, "naive", 32, drop_rate=0.2),
    _bc(40, 12, "features", 32, optimizer="adam"),
    _plain("features", 32),
    _plain("input", 32),
    _plain("naive", 32),
    _imagenet("densenet121", "features", 4, 128),
    _imagenet("densenet121", "bottlenecks", 4, 128),
    _imagenet("densenet121", "naive", 4, 128),
    _imagenet("densenet121", "features", 2, 224),
    _imagenet("densenet161", "features", 2, 96),
    _imagenet("densenet169", "bottlenecks", 2, 96),
    _imagenet("densenet201", "features+bottlenecks+input+features", 2, 96),
    _bc(40, 12, "features", 32, dtype="float64"),
    _bc(40, 12, "naive", 16, dtype="float64"),
    _bc(40, 12, "features", 16, dtype="bfloat16"),
    *(_bc(40, 12, save, 32, amp="bfloat16") for save in ("features", "bottlenecks", "naive")),
    _imagenet("densenet121", "features", 2, 96, amp="bfloat16"),
    _imagenet("densenet121", "naive", 2, 96, amp="bfloat16"),
    *(_volume(3, save, 4, 24) for save in ("features", "bottlenecks", "input", "naive")),
    _volume(3, "features", 2, 24, amp="bfloat16"),
    _volume(3, "features", 1, 64, small=False),
    *(_scan(save, 2, 64) for save in ("features", "bottlenecks", "naive")),
    *(_scan("features", 1, size) for size in (64, 80, 96, 128)),
    *(_scan("slabs", 1, size) for size in (96, 128)),
    _scan("features", 1, 96, amp="bfloat16"),
    *(_bc(190, 40, "features", 2, 16, ddp=ddp) for ddp in ("beside buckets", "in buckets")),
    *(_bc(250, 24, "features", 2, ddp=ddp) for ddp in ("beside buckets", "in buckets")),
    *(_volume(1, save, 16, 1024) for save in ("features", "bottlenecks", "naive")),
)
