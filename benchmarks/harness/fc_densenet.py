"""FC-DenseNet, the fully convolutional DenseNet for segmentation (Jégou et al. 2017).

No package has it. Its layers are BN-ReLU-Conv3x3 with a bias and dropout, and a block on the way
up returns what its layers made without what it read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Layer(nn.Sequential):
    def __init__(self, width: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(width, growth_rate, kernel_size=3, padding=1)
        self.drop = nn.Dropout2d(drop_rate)


class Block(nn.Module):
    """(N, width, H, W) to all features, or to the new ones where it is on the way up."""

    def __init__(
        self, width: int, growth_rate: int, layers: int, drop_rate: float, up: bool
    ) -> None:
        super().__init__()
        self.up = up
        self.layers = nn.ModuleList(
            Layer(width + i * growth_rate, growth_rate, drop_rate) for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        made = []
        for layer in self.layers:
            new = layer(x)
            x = torch.cat([x, new], 1)
            made.append(new)
        return torch.cat(made, 1) if self.up else x


class Down(nn.Sequential):
    def __init__(self, width: int, drop_rate: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(width, width, kernel_size=1)
        self.drop = nn.Dropout2d(drop_rate)
        self.pool = nn.MaxPool2d(2)


class FCDenseNet(nn.Module):
    """(N, in_channels, H, W) to (N, classes, H, W), H and W multiples of 2 ** len(layers).

    Args:
        growth_rate: new channels per layer.
        layers: of each block on the way down; as many on the way up.
        bottom: layers of the block between.
        width: channels after the first convolution.
        drop_rate: probability of each new channel to be dropped.
    """

    def __init__(
        self,
        growth_rate: int = 16,
        layers: Sequence[int] = (5, 5, 5, 5, 5),
        bottom: int = 5,
        width: int = 48,
        classes: int = 12,
        in_channels: int = 3,
        drop_rate: float = 0.2,
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, width, kernel_size=3, padding=1)
        self.down, self.reduce = nn.ModuleList(), nn.ModuleList()
        skips = []
        for count in layers:
            self.down.append(Block(width, growth_rate, count, drop_rate, up=False))
            width += count * growth_rate
            skips.append(width)
            self.reduce.append(Down(width, drop_rate))
        self.bottom = Block(width, growth_rate, bottom, drop_rate, up=True)
        self.enlarge, self.up = nn.ModuleList(), nn.ModuleList()
        made = bottom * growth_rate
        for i, count in enumerate(reversed(layers)):
            self.enlarge.append(nn.ConvTranspose2d(made, made, kernel_size=2, stride=2))
            width, last = made + skips.pop(), i == len(layers) - 1
            self.up.append(Block(width, growth_rate, count, drop_rate, up=not last))
            made = count * growth_rate
        self.classify = nn.Conv2d(width + made, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skips = []
        for block, reduce in zip(self.down, self.reduce, strict=True):
            x = block(x)
            skips.append(x)
            x = reduce(x)
        x = self.bottom(x)
        for enlarge, block in zip(self.enlarge, self.up, strict=True):
            x = block(torch.cat([enlarge(x), skips.pop()], 1))
        return self.classify(x)
