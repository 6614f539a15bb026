"""Dropout's masks by a counter-based generator: made again in backward instead of kept.

NOTE [ dropout masks ]
A mask is a function of a key, which lies in a tensor, and of each element's place, and of
nothing else: no generator is made, seeded or advanced for it. So forward, recomputation under
any save mode, a second backward, and a replay of captured launches see the same one, on every
backend with the same bits. What changes from one forward to the next is the seed from which
the layers' keys are derived. It is drawn on the features' device by torch's generator, once
for each forward of a block, and saved for backward like any other tensor; hence torch's own
means to put random states back (``torch.utils.checkpoint``, resumption, CUDA graphs, whose
replays move the generator on) hold for the masks too.

The generator is SplitMix64 in counter mode (Steele, Lea, Flood 2014, "Fast splittable
pseudorandom number generators"): element i of key K is a bijective mix of K + (i + 1) times an
odd constant. Its last step, which changes only bits that the comparison with a probability
hardly depends on, is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
FACTOR_1 = 0xBF58476D1CE4E5B9
FACTOR_2 = 0x94D049BB133111EB


def draw_seed(device: torch.device) -> Tensor:
    """The seed () of one forward, by torch's generator of ``device``."""
    return torch.empty((), dtype=torch.int64, device=device).random_()


def layer_keys(seed: Tensor, layers: int) -> Tensor:
    """The keys (layers, 1) of a block's masks in one forward, on the device of its seed ()."""
    return _random_bits(seed, 0, layers).view(layers, 1)


def threshold(p: float) -> int:
    """What an element's bits, as a signed number, must be less than to be kept."""
    return min(int((1 - p) * 2.0**64) - 2**63, 2**63 - 1)


def kept_value(p: float) -> float:
    """What elements that are kept are multiplied by."""
    return 1 / (1 - p) if p < 1 else 0.0


def dropout_mask(key: Tensor, p: float, out: Tensor, elements: int = 1 << 18) -> None:
    """The mask of one layer into ``out`` (rows, k), dense: 1/(1-p) with probability 1-p, else 0.

    Rows are in (image, pixel) order, ``key`` (1,) is one of :func:`layer_keys`; so many
    ``elements`` are treated at a time.
    """
    flat = out.view(-1)
    for first in range(0, len(flat), elements):
        part = flat[first : first + elements]
        part.copy_(_random_bits(key, first, first + len(part)) < threshold(p)).mul_(kept_value(p))


def _random_bits(key: Tensor, first: int, last: int) -> Tensor:
    """64 bits for each place in [first, last), as signed numbers."""
    z = torch.arange(first + 1, last + 1, dtype=torch.int64, device=key.device)
    z.mul_(_signed(GAMMA)).add_(key)
    for shift, factor in ((30, FACTOR_1), (27, FACTOR_2)):
        # a shift of signed numbers repeats the sign: it is cut off
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor))
    return z


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits
