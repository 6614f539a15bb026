"""DenseNets as other people spell them, in our own words; what they compute is theirs.

Of repositories that are no packages: which parts a module holds, under which names, and in
which order it concatenates, is what recognition has to cope with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AppendingBottleneck(nn.Module):
    """As in bamos/densenet.pytorch: functional ReLUs, ``cat((x, new))`` inside."""

    newest_first = False

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 4 * growth, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat((new, x) if self.newest_first else (x, new), 1)


class PrependingBottleneck(AppendingBottleneck):
    """As in kuangliu/pytorch-cifar: ``cat([new, x])``."""

    newest_first = True


class SingleLayer(nn.Module):
    """A layer without bottleneck."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, growth, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv1(F.relu(self.bn1(x)))), 1)


class DroppingBottleneck(nn.Module):
    """As in andreasveit/densenet-pytorch: one ReLU module, dropout after both convolutions."""

    def __init__(self, width: int, growth: int, droprate: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(width, 4 * growth, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, kernel_size=3, padding=1, bias=False)
        self.droprate = droprate

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(self.relu(self.bn1(x)))
        new = F.dropout(new, p=self.droprate, training=self.training)
        new = self.conv2(self.relu(self.bn2(new)))
        return torch.cat([x, F.dropout(new, p=self.droprate, training=self.training)], 1)


class ScaledBottleneck(AppendingBottleneck):
    """Made of a dense layer's parts, but no dense layer: the new features are scaled."""

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat((x, 0.2 * new), 1)


class WrongWidthChain(nn.Module):
    """A module whose children look like a dense block and are not used as one."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.first = AppendingBottleneck(width, growth)
        self.second = AppendingBottleneck(width + growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + 1


class Transition(nn.Module):
    """Functional ReLU and pooling."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, out, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class Wrapped(nn.Module):
    """A block that is a module around its Sequential."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class FlatNet(nn.Module):
    """Blocks and transitions as attributes, called one after the other."""

    def __init__(self, layer: Any = AppendingBottleneck, wrap: Any = None, **options: Any) -> None:
        super().__init__()
        growth, width = 4, 7
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        make = (lambda layers: nn.Sequential(*layers)) if wrap is None else wrap
        self.dense1 = make([layer(width + i * growth, growth, **options) for i in range(3)])
        width += 3 * growth
        self.trans1 = Transition(width, width // 2)
        width //= 2
        self.dense2 = make([layer(width + i * growth, growth, **options) for i in range(2)])
        width += 2 * growth
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense2(self.trans1(self.dense1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn(x)), 1).flatten(1))


class SequentialLayer(nn.Sequential):
    """As in gpleiss/efficient_densenet_pytorch: the layer is a Sequential that concatenates."""

    def __init__(self, width: int, growth: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.add_module("norm1", nn.BatchNorm2d(width))
        self.add_module("relu1", nn.ReLU(inplace=True))
        self.add_module("conv1", nn.Conv2d(width, 4 * growth, kernel_size=1, bias=False))
        self.add_module("norm2", nn.BatchNorm2d(4 * growth))
        self.add_module("relu2", nn.ReLU(inplace=True))
        conv2 = nn.Conv2d(4 * growth, growth, kernel_size=3, padding=1, bias=False)
        self.add_module("conv2", conv2)
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        new = super().forward(x)
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return torch.cat([x, new], 1)


class UsersChain(nn.Module):
    """Somebody's own ``cat([f(x), x])`` of layers that are no BN-ReLU-Conv."""

    def __init__(self, width: int, growth: int, layers: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, width + i * growth),
                nn.GELU(),
                nn.Conv2d(width + i * growth, growth, kernel_size=3, padding=1),
                nn.Dropout(0.3),
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = torch.cat([stage(x), x], dim=1)
        return x
