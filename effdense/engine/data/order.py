"""The order of samples, and the keys of everything that is drawn at random.

Nothing is drawn from a generator whose state lives on from step to step. The order of an epoch
is a function of (seed, epoch) and what augmentation does to a sample one of (seed, epoch, index
of the sample), whatever the number of processes and loader workers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def random_key(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on every part, evenly spread."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A fresh generator seeded with :func:`random_key`."""
    return torch.Generator().manual_seed(random_key(*parts))


@contextmanager
def drawing(*parts: int | str) -> Iterator[None]:
    """Within it torch's global generator of the processor is :func:`generator`'s."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_key(*parts))
        yield


@contextmanager
def drawing_in_any_way(*parts: int | str) -> Iterator[None]:
    """Within it the global generators of NumPy and of Python are seeded likewise."""
    key, before = random_key(*parts), (random.getstate(), np.random.get_state())
    random.seed(key)
    np.random.seed(key % 2**32)
    try:
        with drawing(*parts):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def global_batches(
    num_samples: int, batch_size: int, seed: int, epoch: int, weights: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The batches of an epoch over all processes: indices, ``batch_size`` to each.

    A random order, cut; less than a batch at its end is left out. With ``weights`` (num_samples,)
    as many are drawn, with replacement and in proportion to them; a sample i that is drawn again
    is called i + num_samples, and so on, so that augmentation tells one time from another.
    """
    source = generator("order", seed, epoch)
    if weights is None:
        order = torch.randperm(num_samples, generator=source)
    else:
        # torch.multinomial takes 2^24 at most
        until = weights.double().cumsum(0)
        drawn = torch.rand(num_samples, dtype=torch.float64, generator=source) * until[-1]
        order = torch.searchsorted(until, drawn, right=True).clamp_max_(num_samples - 1)
        sorted_order, places = order.sort(stable=True)
        first = torch.searchsorted(sorted_order, sorted_order)
        order[places] += num_samples * (torch.arange(num_samples) - first)
    return order[: num_samples // batch_size * batch_size].split(batch_size)


def share(indices: Tensor, rank: int, world_size: int) -> Tensor:
    """What process ``rank`` takes of ``indices``: shares differ by one at most, all are used."""
    return indices.tensor_split(world_size)[rank]
