"""Counted on paper: a network's shapes, its floor of memory, its arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from .case import Case


class Layer(NamedTuple):
    """One dense layer: reads (positions, width), makes (positions, bottleneck)."""

    positions: int
    width: int
    bottleneck: int


class Block(NamedTuple):
    """One dense block of a case and what reads it.

    positions P = batch x pixels; ``input_width`` and ``width`` are its channels before
    and after; ``output_width`` those of the transition, or 0 for the last block.
    """

    positions: int
    input_width: int
    num_layers: int
    growth_rate: int
    bottleneck: int
    output_width: int

    @property
    def width(self) -> int:
        return self.input_width + self.num_layers * self.growth_rate

    def layers(self) -> Iterator[Layer]:
        for i in range(self.num_layers):
            width = self.input_width + i * self.growth_rate
            yield Layer(self.positions, width, self.bottleneck)


def taps(case: Case) -> int:
    """Weights of a layer's 3-wide convolution for each pair of channels."""
    return 3**case.spatial_dims


def stem_taps(case: Case) -> int:
    """Weights of the first convolution for each of its output's channels."""
    return 3 * (3 if case.is_cifar else 7) ** case.spatial_dims


def blocks(case: Case) -> list[Block]:
    """The case's dense blocks, first to last."""
    network = case.network()
    size = case.image_size if case.is_cifar else _halved(_halved(case.image_size))
    width, growth_rate = network["num_init_features"], network["growth_rate"]
    config = network["block_config"]
    found = []
    for i, num_layers in enumerate(config):
        last = i == len(config) - 1
        out = width + num_layers * growth_rate
        output_width = 0 if last else int(out * network.get("compression", 0.5))
        positions = case.batch_size * size**case.spatial_dims
        bottleneck = network.get("bn_size", 4) * growth_rate
        found.append(Block(positions, width, num_layers, growth_rate, bottleneck, output_width))
        width, size = output_width, size // 2
    return found


def _halved(size: int) -> int:
    """The ImageNet stem's convolution (7, stride 2, padding 3) and pooling round up."""
    return (size + 1) // 2


def stem_positions(case: Case) -> int:
    """Positions of the first convolution's output."""
    size = case.image_size if case.is_cifar else _halved(case.image_size)
    return case.batch_size * size**case.spatial_dims


def parameter_count(case: Case) -> int:
    """Parameters of the network; a formula, because searches over depth ask a hundred times."""
    network = case.network()
    width, classes = network["num_init_features"], network.get("num_classes", 1000)
    total = width * stem_taps(case) + (0 if case.is_cifar else 2 * width)
    for block in blocks(case):
        b, k = block.bottleneck, block.growth_rate
        total += sum(2 * x.width + x.width * b + 2 * b + taps(case) * b * k for x in block.layers())
        # what reads the block: a transition, or the last norm and the classifier
        out = block.width
        total += 2 * out
        total += out * block.output_width if block.output_width else out * classes + classes
    return total


class Floor(NamedTuple):
    """Bytes no training step with all features kept can go below; see :func:`floor`."""

    parameters: int
    gradients: int
    optimizer: int
    features: int
    gradient_buffer: int

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def state(self) -> int:
        """Parameters, gradients and optimizer state: what no trick on features changes."""
        return self.parameters + self.gradients + self.optimizer


def floor(case: Case) -> Floor:
    """The least memory a step can take that keeps every feature once, in bytes.

    Parameters, gradients, momentum, and the worst moment of backward: in block b the
    features of blocks 1..b are alive and one gradient buffer of block b's size. With an
    ImageNet stem also what it is computed again from: the images, or conv0's output where
    that is less.
    """
    state = parameter_count(case) * case.parameter_size
    kept = 0
    if not case.is_cifar:
        conv0 = stem_positions(case) * case.network()["num_init_features"] * case.element_size
        kept = min(conv0, math.prod(case.shape) * case.parameter_size)
    worst = (0, 0)
    for block in blocks(case):
        own = block.positions * block.width * case.element_size
        kept += own
        worst = max(worst, (kept, own), key=sum)
    return Floor(state, state, state, *worst)


def bottleneck_bytes(case: Case) -> int:
    """What ``save="bottlenecks"`` keeps besides the features."""
    return sum(
        layer.positions * layer.bottleneck * case.element_size
        for block in blocks(case)
        for layer in block.layers()
    )


def gradient_bytes(case: Case) -> int:
    """What one process has to reduce with the others in one step."""
    return parameter_count(case) * case.parameter_size


def statistics_bytes(case: Case, shared: bool) -> int:
    """What synchronised batch norm has to reduce in one step, forward and backward.

    Two sums per channel of each norm, both ways, in float32; a count per norm and the
    like not counted. With ``shared`` statistics (effdense) a feature is reduced once, not
    by every layer that reads it; see effdense/block/dense_block.py, NOTE [ shared statistics ].
    """
    channels = 0 if case.is_cifar else case.network()["num_init_features"]
    for block in blocks(case):
        channels += block.num_layers * block.bottleneck + block.width
        if not shared:
            channels += sum(layer.width for layer in block.layers())
    return 2 * 2 * 4 * channels


def forward_flops(case: Case) -> int:
    """Multiplications and additions of all convolutions and the classifier, one forward."""
    network = case.network()
    total = stem_positions(case) * network["num_init_features"] * stem_taps(case)
    for block in blocks(case):
        for layer in block.layers():
            convolution = taps(case) * block.growth_rate
            total += layer.positions * layer.bottleneck * (layer.width + convolution)
        total += block.positions * block.width * block.output_width
    total += case.batch_size * blocks(case)[-1].width * network.get("num_classes", 1000)
    return 2 * total


def training_flops(case: Case) -> int:
    """One step without recomputation: two products backward for each one forward.

    The first convolution needs no gradient of its input.
    """
    network = case.network()
    stem = 2 * stem_positions(case) * network["num_init_features"] * stem_taps(case)
    return 3 * forward_flops(case) - stem


def growth_exponent(sizes: list[float], values: list[float]) -> float:
    """The p of value ~ size^p, by least squares on logarithms.

    Raises:
        ValueError: with fewer than two different sizes, or a value that is not positive.
    """
    if len(set(sizes)) < 2 or min(values, default=0) <= 0:
        raise ValueError("a growth exponent needs two sizes and positive values")
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)
