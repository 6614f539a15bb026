"""The networks that are measured, and a training step of each implementation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from effdense import reference
from effdense.kernels import traffic
from effdense.models import configuration


class Network(NamedTuple):
    """A network and its input."""

    name: str
    arch: str
    depth: int
    growth_rate: int
    batch: int
    pixels: int
    dims: int = 2

    def arguments(self) -> dict[str, Any]:
        more = {} if self.arch == "densenet_bc" else {"bn_size": 4, "num_classes": 1000}
        more["spatial_dims"] = self.dims
        return configuration(self.arch, self.depth, self.growth_rate, **more)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, 3, *[self.pixels] * self.dims)

    @property
    def channels_last(self) -> torch.memory_format:
        return torch.channels_last if self.dims == 2 else torch.channels_last_3d


FULL = (
    Network("(100, k12) batch 64", "densenet_bc", 100, 12, 64, 32),
    Network("(250, k24) batch 64", "densenet_bc", 250, 24, 64, 32),
    Network("densenet121 batch 32", "densenet121", 0, 0, 32, 224),
    Network("densenet121 batch 256", "densenet121", 0, 0, 256, 224),
    Network("densenet121 3-D batch 4", "densenet121", 0, 0, 4, 96, 3),
)
TINY = (
    Network("(16, k4) batch 4", "densenet_bc", 16, 4, 4, 8),
    Network("(10, k4) 3-D batch 2", "densenet_bc", 10, 4, 2, 8, 3),
)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def naive(network: Network) -> nn.Module:
    return reference.DenseNet(**network.arguments())


def ours(save: Any) -> Callable[[Network], nn.Module]:
    def build(network: Network) -> nn.Module:
        return effdense.DenseNet(**network.arguments(), save=save)

    return build


def torchvisions(network: Network) -> nn.Module:
    """torchvision's with its ``memory_efficient``; it has networks of images alone."""
    from torchvision.models import DenseNet

    arguments = network.arguments()
    del arguments["spatial_dims"]
    return DenseNet(**arguments, memory_efficient=True)


class Step:
    """A training step: forward, cross-entropy, backward, SGD with momentum.

    Args:
        model: on the device already.
        network: whose input it is given.
        dtype: bfloat16 means autocast.
        channels_last: how the images lie.
    """

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        dtype: torch.dtype,
        device: torch.device,
        channels_last: bool = True,
    ) -> None:
        self.model, self._dtype, self._device = model, dtype, device
        self.images = torch.randn(network.shape, device=device)
        if channels_last:
            self.images = self.images.contiguous(memory_format=network.channels_last)
        self._labels = torch.arange(network.batch, device=device) % 10
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, foreach=True)

    def autocast(self) -> Any:
        enabled = self._dtype != torch.float32
        return torch.autocast(self._device.type, torch.bfloat16, enabled=enabled)

    def loss(self) -> Tensor:
        with self.autocast():
            return F.cross_entropy(self.model(self.images), self._labels)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bytes_moved(network: Network, save: str, element: int) -> float:
    """Of a step's blocks and their readers, by the kernels' table; nothing around them."""
    arguments = network.arguments()
    c, k = arguments["num_init_features"], arguments["growth_rate"]
    b, size = 4 * k, network.pixels
    if network.arch != "densenet_bc":
        size //= 4
    config, total = arguments["block_config"], 0.0
    rows = [*traffic.FORWARD, *traffic.BACKWARD]
    rows += [] if save == "bottlenecks" else [traffic.REBUILD]
    for index, layers in enumerate(config):
        positions = network.batch * size**network.dims
        for layer in range(layers):
            total += positions * sum(row.moved.of(c + layer * k, b, k) for row in rows)
        c += layers * k
        last = index == len(config) - 1
        tail = (traffic.POOL_FORWARD, traffic.POOL_BACKWARD)
        tail = tail if last else traffic.transition(network.dims)
        total += positions * sum(row.moved.of(c, b, k) for row in tail)
        c, size = math.floor(c * 0.5), size // 2
    return total * element
