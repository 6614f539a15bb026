"""Dropout's masks: made again in backward instead of kept."""

from __future__ import annotations

import torch
from torch import Tensor


def dropout_mask(
    seed: int,
    layer: int,
    shape: tuple[int, int],
    p: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The (P, k) mask of one layer in one forward: 1/(1-p) with probability 1-p, else 0.

    A function of its arguments only (rows in (image, pixel) order), so that backward can
    make it again instead of keeping it.
    """
    generator = torch.Generator(device)
    # Knuth's multiplicative constant spreads consecutive layers over the seed space.
    generator.manual_seed((seed + (layer + 1) * 2654435761) % (1 << 63))
    mask = torch.empty(shape, dtype=dtype, device=device)
    return mask.bernoulli_(1 - p, generator=generator).div_(1 - p)
