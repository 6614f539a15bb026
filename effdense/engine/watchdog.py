"""Finding out which process hangs.

A process that stands still makes all others wait in their next collective, until that gives up
with an error that names nobody. So every process has a thread that posts, in the store through
which the processes found each other, how far its run has come. When a run has not moved for too
long, the thread reads what the others have posted, says who is behind and ends the process.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .distributed import World

# The first that notices speaks; the others give it so long before they end.
_GRACE_SECONDS = 10.0


class Watchdog:
    """Ends a process, with status 1, whose run has not moved for ``seconds``; 0: never.

    There is none for a single process.
    """

    def __init__(self, world: World, seconds: float) -> None:
        self._world, self._seconds = world, seconds
        self._moves, self._doing, self._moved_at = 0, "starting", time.monotonic()
        self._beat = 0
        self._ended = threading.Event()
        self._interval = min(5.0, seconds / 4)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        if self._seconds > 0 and self._world.world_size > 1:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()

    def mark(self, doing: str) -> None:
        """The run has moved: it is now ``doing`` this."""
        self._moves, self._doing, self._moved_at = self._moves + 1, doing, time.monotonic()

    def doing(self) -> str:
        """What the run said last that it is doing."""
        return self._doing

    def _watch(self) -> None:
        store = None
        while True:
            # where its machine is gone or cut off the run will stand still, and end below
            with suppress(RuntimeError):
                store = self._store() if store is None else store
            store = self._post(store)
            if self._ended.wait(self._interval):
                return
            still = time.monotonic() - self._moved_at
            if still > self._seconds:
                self._end(store, still)

    def _post(self, store: dist.Store | None) -> dist.Store | None:
        """Post a sign of life; None if the store doesn't answer."""
        self._beat += 1
        try:
            if store is not None:
                store.set(str(self._world.rank), json.dumps(self._facts()))
        except RuntimeError:
            return None
        return store

    def _live_on(self, store: dist.Store | None, seconds: float) -> None:
        """Wait, posting: others that accuse at the same time must not find this one silent."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(self._interval / 2)
            self._post(store)

    def _store(self) -> dist.Store:
        # a connection of its own: the run may be waiting on the process group's
        client = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(1.0, self._interval)),
        )
        return dist.PrefixStore(f"effdense/{self._world.attempt}/watchdog", client)

    def _facts(self) -> dict[str, Any]:
        return {
            "beat": self._beat,
            "moves": self._moves,
            "doing": self._doing,
            "who": f"rank {self._world.rank} (process {os.getpid()} on {platform.node()})",
        }

    def _accusation(self, store: dist.Store | None, still: float) -> str:
        since = f"for {still:.0f} seconds"
        if store is None:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            return f"the run has not moved {since}, and its rendezvous at {where} does not answer"
        before = self._posted(store)
        self._live_on(store, 2 * self._interval)
        after = self._posted(store)
        silent = [
            rank
            for rank in range(self._world.world_size)
            if rank != self._world.rank
            and (rank not in after or before.get(rank, {}).get("beat") == after[rank]["beat"])
        ]
        if silent:
            names = [after[r]["who"] if r in after else f"rank {r}" for r in silent]
            return f"the run has not moved {since}: {', '.join(names)} does not answer"
        after[self._world.rank] = self._facts()
        least = min(facts["moves"] for facts in after.values())
        behind = [facts for facts in after.values() if facts["moves"] == least]
        if len(behind) == len(after):
            return f"the run has not moved {since}: every rank hangs {behind[0]['doing']}"
        return f"the run has not moved {since}: " + ", ".join(
            f"{facts['who']} hangs {facts['doing']}" for facts in behind
        )

    def _posted(self, store: dist.Store) -> dict[int, dict[str, Any]]:
        posted = {}
        for rank in range(self._world.world_size):
            try:
                if store.check([str(rank)]):
                    posted[rank] = json.loads(store.get(str(rank)))
            except RuntimeError:
                break
        return posted

    def _end(self, store: dist.Store | None, still: float) -> None:
        accusation = self._accusation(store, still)
        if not self._world.is_main:
            self._live_on(store, _GRACE_SECONDS)
        print(f"error: {accusation}", file=sys.stderr, flush=True)
        os._exit(1)
