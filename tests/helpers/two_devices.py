"""Steps of a network on the second device while the first is current; prints what was launched.

Launches are counted as in benchmarks/harness/launches.py; here the driver has two devices, and
torch says of tensors that they are on the second, of which it asks for it. In a process of its
own: ``python -m tests.helpers.two_devices``.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import effdense

sys.path.insert(0, "benchmarks")

from harness.launches import CountingDriver, OperationCounter

FIRST, SECOND = 1000, 1001


class TwoDevices(CountingDriver):
    """Of which one is current, and which knows on which each kernel was launched."""

    def __init__(self) -> None:
        super().__init__()
        self.current = FIRST
        self.seen: Counter[int] = Counter()
        self.streams: Counter[int] = Counter()

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> int:
        self.streams[device] += 1
        return 0

    def compiled(self, source: Any, target: Any = None, options: Any = None, **more: Any) -> Any:
        found, bound = super().compiled(source, target, options, **more), self.current
        counts = found.run

        def run(*arguments: Any) -> None:
            assert bound == self.current, "compiled for another device than it is started on"
            self.seen[self.current] += 1
            counts(*arguments)

        found.run = run
        return found

    @contextlib.contextmanager
    def guard(self, device: int) -> Iterator[None]:
        before, self.current = self.current, int(device)
        try:
            yield
        finally:
            self.current = before


def main() -> None:
    torch.set_num_threads(1)
    driver, place = TwoDevices(), [SECOND]
    found = {}

    def said(tensor: Tensor) -> int:
        return place[0]

    with (
        driver.active(),
        mock.patch.object(Tensor, "get_device", said),
        mock.patch.object(torch.cuda, "device", driver.guard),
    ):
        for save in ("features", "bottlenecks", "input"):
            torch.manual_seed(0)
            model = effdense.DenseNet(
                *(4, (2, 2), 6),
                num_classes=3,
                drop_rate=0.2,
                save=save,
                backend="triton",
            )
            for step in ("first", "again", "on the other"):
                place[0] = FIRST if step == "on the other" else SECOND
                driver.seen.clear()
                with OperationCounter():
                    model(torch.randn(2, 3, 32, 32)).sum().backward()
                assert driver.current == FIRST
                found[f"{save}, {step}"] = [driver.seen[FIRST], driver.seen[SECOND]]
    found["streams"] = [driver.streams[FIRST], driver.streams[SECOND]]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
