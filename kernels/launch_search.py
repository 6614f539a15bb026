"""Tile sizes found by trial on the device, once per shape class."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing
from torch import Tensor

from effdense.backends.told import Told
from effdense.kernels.launch_table import Architecture, Launch, LaunchTable
from effdense.kernels.layouts import alignment, pad, power_of_two


class SearchedLaunchTable(LaunchTable):
    """A launch table that times alternatives on the device it runs on, once per shape class.

    Opt-in (see TritonBackend): the first call for a class takes seconds, and which of
    two near-equal alternatives wins may differ from machine to machine, and with it the
    order of summation. The winner is written to ``directory`` in a file named by device
    and version, and read from there by later processes. Of several processes rank 0 tries, and
    tells the others; where it has no word for one, that goes by the table.
    """

    def __init__(
        self,
        architecture: Architecture,
        device_name: str,
        directory: Path,
        time: Callable[[Callable[[], Any]], Any] = triton.testing.do_bench,
        told: Told | None = None,
    ) -> None:
        super().__init__(architecture)
        self.time = time
        # decided in this process: by trial, by an earlier process's, or by rank 0
        self._settled: set[str] = set()
        name = re.sub(r"[^\w.]+", "-", device_name)
        self.file = directory / f"{name}-triton-{triton.__version__}-torch-{torch.__version__}.json"
        self._told = Told(self.file.stem) if told is None else told
        self.choices: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            self.choices = json.loads(self.file.read_text())

    @staticmethod
    def shape_class(operation: str, like: Tensor, channels: int, bottleneck: int) -> str:
        """Shapes that share a choice: same type and alignment, sizes of one power of two."""
        rows, c, b = (power_of_two(n, 1, 1 << 40) for n in (like.shape[0], channels, bottleneck))
        dtype = str(like.dtype).removeprefix("torch.")
        align = pad(like) if pad(like) > 1 else alignment(like.stride(0), channels)
        return f"{operation}/{dtype}/{rows}x{c}x{b}/{align}"

    def __call__(self, operation: str, like: Tensor, channels: int, bottleneck: int = 0) -> Launch:
        """The choice of this shape class where one was searched, else the table's."""
        first = super().__call__(operation, like, channels, bottleneck)
        choice = self.choices.get(self.shape_class(operation, like, channels, bottleneck))
        return first if choice is None else replace(first, **choice)

    def search(
        self,
        operation: str,
        like: Tensor,
        channels: int,
        bottleneck: int,
        run: Callable[[Launch], Any],
    ) -> None:
        """Choose for this shape class unless done; ``run`` is the operation on scratch data."""
        key = self.shape_class(operation, like, channels, bottleneck)

        def best() -> dict[str, Any]:
            times: list[tuple[float, int, Launch]] = []
            for i, launch in enumerate(_neighbours(self(operation, like, channels, bottleneck))):
                # a tile too large for this device is no error, only not a candidate
                with contextlib.suppress(triton.runtime.errors.OutOfResources):
                    times.append((float(self.time(partial(run, launch))), i, launch))
            found = min(times)[2]
            names = ("block_p", "block_c", "num_warps", "num_stages")
            return {name: getattr(found, name) for name in names}

        self._settle(key, lambda: self.choices.get(key) or best())

    def choose(
        self,
        operation: str,
        like: Tensor,
        channels: int,
        bottleneck: int,
        alternatives: dict[str, Callable[[], Any]],
    ) -> str | None:
        """The name of the fastest of ``alternatives`` to do ``operation`` for this shape class.

        None where rank 0 should have said, and did not.
        """
        key = "choice of " + self.shape_class(operation, like, channels, bottleneck)

        def fastest() -> dict[str, Any]:
            kept = self.choices.get(key)
            if kept and kept["name"] in alternatives:
                return kept
            times = {name: float(self.time(run)) for name, run in alternatives.items()}
            return {"name": min(times, key=lambda name: times[name])}

        return self._settle(key, fastest).get("name")

    def _settle(self, key: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self._settled:
            self._settled.add(key)
            tried = False

            def find_here() -> dict[str, Any]:
                nonlocal tried
                tried = True
                return find()

            self.choices[key] = self._told(key, find_here) or {}
            if tried:
                self._write()
        return self.choices[key]

    def _write(self) -> None:
        # a directory that cannot be written costs the next process a search, no more
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            whole = self.file.with_suffix(f".{os.getpid()}")
            whole.write_text(json.dumps(self.choices, indent=1, sort_keys=True))
            whole.replace(self.file)


def _neighbours(first: Launch) -> list[Launch]:
    """``first``, and it with half or twice the rows, channels or warps, or one stage more."""
    found = [first, replace(first, num_stages=first.num_stages + 1)]
    for name, low, high in (("block_p", 16, 256), ("block_c", 16, 256), ("num_warps", 1, 16)):
        now = getattr(first, name)
        for other in (now // 2, now * 2):
            if low <= other <= high:
                found.append(replace(first, **{name: other}))
    return found
