"""How processes meet in a store in which others, now dead, have met before."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from effdense.engine import distributed
from effdense.errors import TrainingError

PROCESSES = 5


def meet(
    server: dist.TCPStore,
    ranks: Sequence[int],
    monkeypatch: pytest.MonkeyPatch,
    patience: float = 0.5,
) -> list[Any]:
    """What each rank of an attempt finds; a thread takes the place of its process."""
    me = threading.local()

    def rendezvous(url: str, timeout: timedelta) -> Any:
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timeout)
        return iter([(client, me.rank, PROCESSES)])

    monkeypatch.setattr(distributed.dist, "rendezvous", rendezvous)

    def one(rank: int) -> Any:
        me.rank = rank
        # one that comes late must not be taken for its predecessor
        time.sleep(0.05 * rank)
        try:
            return distributed._met(timedelta(seconds=60 if len(ranks) == PROCESSES else patience))
        except TrainingError as error:
            return error

    with ThreadPoolExecutor(PROCESSES) as pool:
        return list(pool.map(one, ranks))


def test_every_attempt_has_a_store_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    common = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    everyone = range(PROCESSES)
    first = meet(common, everyone, monkeypatch)
    # attempts in which somebody died, with and without rank 0
    for some in ((1, 3), (0, 2, 4), (4,)):
        # the first of them is rank 0 or waits for it
        assert isinstance(meet(common, some, monkeypatch)[0], TrainingError)
    again = meet(common, everyone[::-1], monkeypatch)
    names = []
    for met in (first, again):
        (name,) = {attempt for _, attempt, _ in met}
        names.append(name)
        for rank, (store, *_) in enumerate(met):
            assert store.check(["left"]) == (rank > 0)
            store.set("left", "by the first")
    assert names[0] != names[1]
    assert len({launch for met in (first, again) for _, _, launch in met}) == 1


def test_who_did_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    common = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # long enough for rank 1 to come while others use the machine
    errors = meet(common, (0, 1, 3), monkeypatch, 2)
    assert "rank 2 did not come within 0:00:02" in str(errors[0])
