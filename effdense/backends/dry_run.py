"""Which variants of kernels a network's step would run, found on tensors without memory.

Imports Triton, as triton_backend.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdense.kernels.launch import Launcher, Untrusted
from effdense.kernels.launch_table import Architecture, LaunchTable

from .select import on_meta
from .triton_backend import TritonBackend


class Met(NamedTuple):
    """A variant, and a call that has it: what :meth:`variants.Checks.trust` takes."""

    unknown: Untrusted
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    precision: str


class DryRun(TritonBackend):
    """The kernels' backend of an architecture that starts nothing and notes each new variant."""

    def __init__(self, architecture: Architecture, tf32: bool) -> None:
        super().__init__(LaunchTable(architecture), tf32=tf32, search=False)
        self.met: list[Met] = []
        self._trusted: set[Any] = set()

    @contextmanager
    def on_meta(self) -> Iterator[DryRun]:
        """Inside, this computes whatever is on meta."""
        token = on_meta.set(lambda name, dtype: self)
        try:
            yield self
        finally:
            on_meta.reset(token)

    def _launcher(self, device: torch.device) -> Launcher:
        assert self._table is not None
        found = _Silent(self._table, self._precision, self._trusted)
        self._launchers[-1] = found
        return found

    def _run(
        self,
        operation: str,
        function: Callable[..., Any],
        x: Tensor,
        *args: Any,
        like: Tensor | None = None,
        bottleneck: int = 0,
    ) -> Any:
        launcher = self._launchers.get(-1) or self._launcher(x.device)
        try:
            return function(x, *args, launcher)
        except Untrusted as unknown:
            self._trusted.add(unknown.variant)
            self.met.append(Met(unknown, function, (x, *args), self._precision))
        return function(x, *args, launcher)


class _Silent(Launcher):
    def start(self, *_: Any) -> Callable[..., None]:
        return lambda *_: None
