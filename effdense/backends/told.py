"""What rank 0 found by trial, told to the other processes without a collective.

Processes need not meet the same question at the same time, or at all: their shares of a batch
differ. So rank 0's answers lie in the process group's store, where others look for them.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

# Longer than rank 0 takes for one; shorter than what a collective may take.
_PATIENCE = datetime.timedelta(minutes=5)


class Told:
    """Asks rank 0 of the default process group; without one this process is asked itself.

    Args:
        device: what answers are true of; another device's are of no use.
        store, rank: of the group; by default those of the group that there is when first asked.
        patience: how long an answer is waited for.
    """

    def __init__(
        self,
        device: str,
        store: dist.Store | None = None,
        rank: int = 0,
        patience: datetime.timedelta = _PATIENCE,
    ) -> None:
        self._device, self._store, self._rank, self._patience = device, store, rank, patience
        self._same_device: bool | None = None

    def __call__(self, question: str, find: Callable[[], T]) -> T | None:
        """``find()`` of rank 0, in JSON's types; None where rank 0 has no answer for us."""
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if self._store is None and together:
            store = dist.distributed_c10d._get_default_store()
            self._store, self._rank = dist.PrefixStore("effdense/told", store), dist.get_rank()
        if self._store is None:
            return find()
        if self._rank == 0:
            self._store.set("device", json.dumps(self._device))
            found = find()
            self._store.set(f"answer/{question}", json.dumps(found))
            return found
        if self._same_device is None:
            self._same_device = self._read("device") == self._device
        return self._read(f"answer/{question}") if self._same_device else None

    def _read(self, key: str) -> Any:
        assert self._store is not None
        try:
            self._store.wait([key], self._patience)
        except dist.DistStoreError:
            return None
        return json.loads(self._store.get(key))
