"""The naive DenseNet: the yardstick for every test and benchmark, written to be read.

Source: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional
Networks", CVPR 2017. Module names are torchvision's, so state dicts move freely
between torchvision, this file and :mod:`effdense.models`, whose modules are the
ones below with another ``forward``.

Memory for backward grows with the square of a block's depth: layer l keeps a
concatenation and a normalised copy of all features before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Init = Literal["paper", "torchvision"]

_CONV: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORM: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MAX_POOL: tuple[type[nn.Module], ...] = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVG_POOL: tuple[type[nn.Module], ...] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


class DenseLayer(nn.Module):
    """BN-ReLU-Conv1x1-BN-ReLU-Conv3x3, or BN-ReLU-Conv3x3 when ``bn_size`` is None.

    Reads the (N, in_channels, *spatial) concatenation of all features before it and
    returns (N, growth_rate, *spatial) new ones.
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        bn_size: int | None,
        drop_rate: float,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        conv, norm = _CONV[spatial_dims - 1], _BATCH_NORM[spatial_dims - 1]
        self.drop_rate = float(drop_rate)
        self.norm1 = norm(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        if bn_size is None:
            self.conv1 = conv(in_channels, growth_rate, kernel_size=3, padding=1, bias=False)
        else:
            bottleneck = bn_size * growth_rate
            self.conv1 = conv(in_channels, bottleneck, kernel_size=1, bias=False)
            self.norm2 = norm(bottleneck)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = conv(bottleneck, growth_rate, kernel_size=3, padding=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        new = self.conv1(self.relu1(self.norm1(features)))
        if hasattr(self, "norm2"):
            new = self.conv2(self.relu2(self.norm2(new)))
        if self.drop_rate > 0:
            new = F.dropout(new, self.drop_rate, self.training)
        return new


class DenseBlock(nn.ModuleDict):
    """Layers that read everything before them: (N, C0, *spatial) to (N, C0 + sum of k, *spatial).

    ``layers`` by name, or in order ("0", "1", ...). Each maps the (N, c, *spatial)
    concatenation of all features before it to its new ones.
    """

    def __init__(self, layers: Mapping[str, nn.Module] | Iterable[nn.Module]) -> None:
        super().__init__()
        if not isinstance(layers, Mapping):
            layers = {str(i): layer for i, layer in enumerate(layers)}
        for name, layer in layers.items():
            if not isinstance(layer, nn.Module):
                raise ValueError(
                    f"a dense block's layers are modules, got a {type(layer).__name__}"
                )
            self[name] = layer

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def dense_layers(
    num_layers: int,
    in_channels: int,
    growth_rate: int,
    bn_size: int | None,
    drop_rate: float = 0.0,
    spatial_dims: int = 2,
) -> dict[str, nn.Module]:
    """The layers of a block under torchvision's names; arguments as of :class:`DenseLayer`."""
    return {
        f"denselayer{i + 1}": DenseLayer(
            in_channels + i * growth_rate, growth_rate, bn_size, drop_rate, spatial_dims
        )
        for i in range(num_layers)
    }


class Transition(nn.Sequential):
    """BN-ReLU-Conv1x1-AvgPool between two blocks; halves every spatial size."""

    def __init__(self, in_channels: int, out_channels: int, spatial_dims: int = 2) -> None:
        super().__init__()
        self.norm = _BATCH_NORM[spatial_dims - 1](in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = _CONV[spatial_dims - 1](in_channels, out_channels, kernel_size=1, bias=False)
        self.pool = _AVG_POOL[spatial_dims - 1](kernel_size=2, stride=2)


class DenseNet(nn.Module):
    """The naive DenseNet.

    Args:
        growth_rate: new channels per layer, the paper's k.
        block_config: layers in each dense block.
        num_init_features: channels after the first convolution.
        bn_size: bottleneck width in units of the growth rate; None for layers without
            a bottleneck (the paper's plain DenseNet).
        drop_rate: dropout probability of each layer's new features.
        num_classes: width of the classifier.
        compression: the paper's theta: a transition keeps ``int(theta * channels)``.
        small_inputs: the CIFAR stem (one 3x3 convolution) instead of ImageNet's.
        in_channels: channels of the input.
        spatial_dims: 1, 2 or 3.
        init: "paper" (He normal over the fan-out, as in the authors' code) or
            "torchvision" (He normal over the fan-in).
    """

    block_type: type[DenseBlock] = DenseBlock
    transition_type: type[Transition] = Transition
    features_type: type[nn.Sequential] = nn.Sequential

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        *,
        compression: float = 0.5,
        small_inputs: bool = False,
        in_channels: int = 3,
        spatial_dims: int = 2,
        init: Init = "paper",
    ) -> None:
        super().__init__()
        _check_positive(growth_rate=growth_rate, num_init_features=num_init_features)
        _check_positive(num_classes=num_classes, in_channels=in_channels)
        if bn_size is not None:
            _check_positive(bn_size=bn_size)
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims!r}")
        if not isinstance(block_config, Sequence) or not block_config:
            raise ValueError(
                f"block_config must be layer counts, one per block, got {block_config!r}"
            )
        if any(not isinstance(n, int) or n < 0 for n in block_config):
            raise ValueError(
                f"block_config must be layer counts, one per block, got {block_config!r}"
            )
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate must be in [0, 1), got {drop_rate!r}")
        if not 0 < compression <= 1:
            raise ValueError(f"compression must be in (0, 1], got {compression!r}")
        if init not in ("paper", "torchvision"):
            raise ValueError(f'init must be "paper" or "torchvision", got {init!r}')

        conv, norm = _CONV[spatial_dims - 1], _BATCH_NORM[spatial_dims - 1]
        self.features = self.features_type()
        width = num_init_features
        if small_inputs:
            conv0 = conv(in_channels, width, kernel_size=3, padding=1, bias=False)
            self.features.add_module("conv0", conv0)
        else:
            conv0 = conv(in_channels, width, kernel_size=7, stride=2, padding=3, bias=False)
            pool0 = _MAX_POOL[spatial_dims - 1](kernel_size=3, stride=2, padding=1)
            self.features.add_module("conv0", conv0)
            self.features.add_module("norm0", norm(width))
            self.features.add_module("relu0", nn.ReLU(inplace=True))
            self.features.add_module("pool0", pool0)
        for i, num_layers in enumerate(block_config):
            layers = dense_layers(num_layers, width, growth_rate, bn_size, drop_rate, spatial_dims)
            self.features.add_module(f"denseblock{i + 1}", self.block_type(layers))
            width += num_layers * growth_rate
            if i != len(block_config) - 1:
                out = int(width * compression)
                if out < 1:
                    raise ValueError(
                        f"compression {compression} leaves none of {width} channels in "
                        f"transition {i + 1}"
                    )
                transition = self.transition_type(width, out, spatial_dims)
                self.features.add_module(f"transition{i + 1}", transition)
                width = out
        # torchvision's name, whatever the number of blocks
        self.features.add_module("norm5", norm(width))
        self.classifier = nn.Linear(width, num_classes)
        initialize(self, init)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.features(x), inplace=True)
        pooled = features.mean(dim=tuple(range(2, features.dim())))
        return self.classifier(pooled)


def initialize(model: nn.Module, init: Init = "paper") -> None:
    """Set convolutions to He normal, norms to weight 1 and bias 0, the classifier's bias to 0."""
    mode: Any = "fan_out" if init == "paper" else "fan_in"
    for module in model.modules():
        if isinstance(module, _CONV):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")  # type: ignore[arg-type]
        elif isinstance(module, _BATCH_NORM):
            nn.init.ones_(module.weight)  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def densenet_bc(depth: int, growth_rate: int, num_classes: int = 10, **kwargs: Any) -> DenseNet:
    """The naive twin of :func:`effdense.densenet_bc`."""
    return DenseNet(**densenet_bc_config(depth, growth_rate, num_classes, **kwargs))


def densenet_bc_config(
    depth: int, growth_rate: int, num_classes: int = 10, **kwargs: Any
) -> dict[str, Any]:
    """Arguments of the paper's CIFAR family: three blocks of (depth - 4) / 6 bottleneck layers.

    Every bottleneck layer holds two convolutions; the first convolution, the two
    transitions and the classifier are the other four, so depth = 6 n + 4.

    Raises:
        ValueError: for any other depth; names the nearest valid ones.
    """
    if not isinstance(depth, int) or isinstance(depth, bool):
        raise ValueError(f"depth must be an integer, got {depth!r}")
    if depth < 10 or (depth - 4) % 6:
        below = max(10, (depth - 4) // 6 * 6 + 4)
        nearest = f"{below} and {below + 6}" if depth > 10 else "10"
        raise ValueError(
            f"a DenseNet-BC has depth 6 n + 4 (three blocks of n layers with two convolutions "
            f"each), got {depth}; the nearest valid depths: {nearest}"
        )
    config: dict[str, Any] = {
        "growth_rate": growth_rate,
        "block_config": ((depth - 4) // 6,) * 3,
        "num_init_features": 2 * growth_rate,
        "num_classes": num_classes,
        "small_inputs": True,
    }
    return config | kwargs


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
