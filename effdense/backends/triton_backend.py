"""The dense block's operations as Triton kernels; NVIDIA, AMD, or the Triton interpreter.

Importing this module imports Triton. :mod:`effdense.backends.select` does so only when
the backend is asked for.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effdense.backends.base import (
    KERNEL_ROW_MULTIPLE,
    KERNEL_STEP_BYTES,
    Correction,
    Deferred,
    Normalization,
    PendingNorm,
    Rebuild,
    Statistics,
    Unfinished,
)
from effdense.backends.precision import tf32_convolutions
from effdense.backends.stepwise import Stepwise
from effdense.kernels import (
    bn_relu,
    bn_relu_conv1x1,
    bn_relu_conv1x1_backward,
    bn_relu_conv3,
    bn_relu_conv3_backward,
    bn_relu_pool,
    dropout,
    finish_gradient,
    launch,
    launch_search,
    launch_table,
    statistics,
)

from ..machine.environment import cache_folder
from . import variants
from .layout import round_up
from .torch_backend import TorchBackend

# what an operation asks the launch table for, where that is not one thing of its own name
_ASKED = {"conv3_backward": ("conv3_backward", "conv3_weight")}

INTERPRETED: bool = launch.interpreted(statistics.statistics_fwd_kernel)
"""Whether this process runs the kernels in Triton's interpreter, on any device."""


class TritonBackend(Stepwise):
    """The :class:`effdense.backends.base.Backend` of the kernels in :mod:`effdense.kernels`.

    Args:
        table: chooses launch configurations; None for the hand-reasoned table of the
            device that each matrix lies on.
        tf32: whether products of float32 may round their operands to TF32; None for what
            torch's convolutions do now.
        search: time alternative configurations on the device, once per shape class, and
            keep the fastest in ``search_directory``. Off unless asked for: the
            environment variable EFFDENSE_LAUNCH_SEARCH=1 asks where the argument is None.
            Never while torch allows only deterministic algorithms.
        search_directory: by default "effdense/launch" in the user's cache directory.
        checked: run only variants of kernels that are right on their device, and torch's
            operation where one is not; see variants.py, NOTE [ variants ].
    """

    name = "triton"
    row_multiple = KERNEL_ROW_MULTIPLE

    def __init__(
        self,
        table: Callable[..., launch_table.Launch] | None = None,
        *,
        tf32: bool | None = None,
        search: bool | None = None,
        search_directory: Path | None = None,
        checked: bool = False,
    ) -> None:
        if search is None:
            search = os.environ.get("EFFDENSE_LAUNCH_SEARCH", "0") == "1"
        self._search_directory = search_directory or cache_folder("launch")
        self._search = search
        self._table = table
        self._precision = "tf32" if (tf32_convolutions() if tf32 is None else tf32) else "ieee"
        # by the device's number, -1 for a CPU's tensors
        self._launchers: dict[int, launch.Launcher] = {}
        self._checked = checked
        # operations that are left to torch, by device
        self._refused: set[tuple[torch.device, Callable[..., Any]]] = set()
        # shapes for which configurations were searched, and whose convolution was the faster
        self._searched: set[tuple[Any, ...]] = set()
        self._vendor_chosen: dict[tuple[Any, ...], bool | None] = {}

    def _run(
        self,
        operation: str,
        function: Callable[..., Any],
        x: Tensor,
        *args: Any,
        like: Tensor | None = None,
        bottleneck: int = 0,
    ) -> Any:
        """``function(x, *args)`` with the launcher of ``x``'s device.

        ``operation``, ``like`` (x by default) and ``bottleneck`` are what the function asks the
        launch table with, for the search alone.
        """
        launcher = self._launchers.get(x.get_device()) or self._launcher(x.device)
        if self._search and not torch.are_deterministic_algorithms_enabled():
            like = x if like is None else like
            for asked in _ASKED.get(operation, (operation,)):
                self._search_launch(launcher, asked, function, x, args, like, bottleneck)
        try:
            if self._refused and (x.device, function) in self._refused:
                return variants.CHECKS[function].torchs(TorchBackend(x.device), x, *args)
            return function(x, *args, launcher)
        except launch.Untrusted as unknown:
            try:
                checks_of(x.device).trust(unknown, function, (x, *args), self._precision)
            except variants.Refused as refused:
                self._leave_to_torch(x, function, refused)
        return self._run(operation, function, x, *args, like=like, bottleneck=bottleneck)

    def _leave_to_torch(
        self, x: Tensor, function: Callable[..., Any], refused: variants.Refused
    ) -> None:
        self._refused.add((x.device, function))
        warnings.warn(
            f"effdense: {function.__name__} failed its self-check on {x.device} with {x.dtype} "
            f"and is left to torch operations. {refused}",
            RuntimeWarning,
            stacklevel=3,
        )

    def _search_launch(
        self,
        launcher: launch.Launcher,
        operation: str,
        function: Callable[..., Any],
        x: Tensor,
        args: tuple[Any, ...],
        like: Tensor,
        bottleneck: int,
    ) -> None:
        table = launcher.table
        shape = operation, like.shape, like.stride(), like.dtype, bottleneck
        if shape in self._searched or not isinstance(table, launch_search.SearchedLaunchTable):
            return
        self._searched.add(shape)
        scratch = [_copied(a) for a in args]
        launchers: dict[launch_table.Launch, launch.Launcher] = {}

        def run(chosen: launch_table.Launch) -> None:
            if chosen not in launchers:

                def choose(asked: str, *shape: Any) -> launch_table.Launch:
                    return chosen if asked == operation else table(asked, *shape)

                launchers[chosen] = launch.Launcher(choose, self._precision)
            function(x, *scratch, launchers[chosen])

        table.search(operation, like, x.shape[1], bottleneck, run)

    def _launcher(self, device: torch.device) -> launch.Launcher:
        table = self._table
        if table is None:
            architecture = launch_table.Architecture("interpreter")
            if not INTERPRETED:
                architecture = launch_table.Architecture.of(device)
            table = launch_table.LaunchTable(architecture)
            if self._search and architecture.kind != "interpreter":
                name = torch.cuda.get_device_name(device)
                table = launch_search.SearchedLaunchTable(
                    architecture, name, self._search_directory
                )
        number = -1 if device.index is None else device.index
        trusted = checks_of(device).trusted if self._checked else None
        launcher = self._launchers[number] = launch.Launcher(table, self._precision, trusted)
        return launcher

    def sums_from_products(self, dtype: torch.dtype) -> bool:
        # x is read for the mask anyway: T costs the kernels nothing
        return False

    def images_per_step(self, images: int, bytes_per_image: int) -> int:
        return max(1, min(images, KERNEL_STEP_BYTES // max(1, bytes_per_image)))

    def dropout_mask(self, key: Tensor, p: float, out: Tensor) -> None:
        self._run("map", dropout.dropout_mask, dropout.wide(out), key, p)

    def statistics(self, x: Tensor, out: Statistics) -> None:
        self._run("reduce", statistics.statistics, x, out)

    def bn_relu(self, x: Tensor, norm: Normalization, out: Tensor) -> None:
        self._run("map", bn_relu.bn_relu, x, norm, out)

    def bn_relu_backward_reduce(
        self,
        x: Tensor,
        norm: Normalization,
        dz: Tensor,
        z: Tensor | None = None,
        out: Tensor | None = None,
        channels: slice | Tensor | None = slice(None),
    ) -> tuple[Tensor, Tensor]:
        if out is not None:
            dz = out.copy_(dz)
        # z is cheaper to rebuild than to read: x is needed for xhat in any case
        return self._run("reduce", bn_relu.bn_relu_backward_reduce, x, norm, dz, None)

    def bn_relu_backward_apply(
        self,
        x: Tensor,
        norm: Normalization,
        dz: Tensor,
        correction: Correction | None,
    ) -> None:
        self._run("map", bn_relu.bn_relu_backward_apply, x, norm, dz, correction)

    def bn_relu_backward_accumulate(
        self, x: Tensor, norm: Normalization, dz: Tensor, d: Tensor, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._run("reduce", bn_relu.bn_relu_backward_reduce, x, norm, dz, d)

    def bn_relu_conv1x1(
        self,
        x: Tensor,
        norm: Normalization,
        weight: Tensor,
        out: Tensor,
        statistics: Statistics | None,
    ) -> None:
        function = bn_relu_conv1x1.bn_relu_conv1x1
        args = (norm, weight, out, statistics)
        self._run("product", function, x, *args, bottleneck=weight.shape[0])

    def bn_relu_conv1x1_backward(
        self,
        x: Tensor,
        norm: Normalization,
        weight: Tensor,
        dz: Tensor,
        d: Tensor,
        need_weight: bool,
        pending: PendingNorm,
        rebuild: Rebuild | None,
        deferred: Deferred | None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        function = bn_relu_conv1x1_backward.bn_relu_conv1x1_backward
        args = (norm, weight, dz, d, need_weight, pending, deferred)
        sums = self._run("product_backward", function, x, *args, bottleneck=weight.shape[0])
        if rebuild is not None:
            c = rebuild.weight.shape[1]
            self.bn_relu_conv1x1(x[:, :c], rebuild.norm, rebuild.weight, rebuild.out, None)
        return sums

    def bn_relu_conv3(
        self,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        shape: tuple[int, ...],
        out: Tensor,
        mask: Tensor | None,
        statistics: Statistics | None,
    ) -> None:
        given = (norm, weight, shape, out, mask, statistics)
        function, vendors = bn_relu_conv3.bn_relu_conv3, super().bn_relu_conv3
        self._convolve("conv3", function, vendors, source, weight, given)

    def bn_relu_conv3_backward(
        self,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        gradient: Unfinished,
        shape: tuple[int, ...],
        need_weight: bool,
        dz: Tensor | None,
        d: Tensor | None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        given = (norm, weight, gradient, shape, need_weight, dz, d)
        function = bn_relu_conv3_backward.bn_relu_conv3_backward
        vendors = super().bn_relu_conv3_backward
        return self._convolve("conv3_backward", function, vendors, source, weight, given)

    def _convolve(
        self,
        operation: str,
        function: Callable[..., Any],
        vendors: Callable[..., Any],
        source: Tensor,
        weight: Tensor,
        given: tuple[Any, ...],
    ) -> Any:
        """By our kernels, ``function``, or by the vendor's convolution beside our norms.

        Without timing the type decides. A kernel of ours moves 5 B + 5 k elements a row where
        the vendor's convolution, with what must stand around it, moves 12 B + 13 k (see
        effdense.kernels.traffic), in 5 launches where that takes 16. On tensor cores bytes
        decide: at B = 128, k = 32 the 54 B k operations of forward and backward take an H100's
        990e12 a second 0.22 ns a row, and the bytes that the vendor's costs more 0.70 ns at
        3.35e12 a second; ours need a quarter of the peak rate. Exact products of float32 run
        without tensor cores: the same operations take 3.3 ns at 67e12 a second, all bytes
        1.1 ns, and a library's loops come closer to that rate than ours.
        """
        vendor = None
        if self._search and not (INTERPRETED or torch.are_deterministic_algorithms_enabled()):
            vendor = self._vendor_is_faster(operation, function, vendors, source, weight, given)
        if vendor is None:
            exact = source.dtype == torch.float32 and self._precision == "ieee"
            vendor = exact and not INTERPRETED
        if vendor:
            return vendors(source, *given)
        return self._run(operation, function, source, *given, bottleneck=weight.shape[0])

    def _vendor_is_faster(
        self,
        operation: str,
        function: Callable[..., Any],
        vendors: Callable[..., Any],
        source: Tensor,
        weight: Tensor,
        given: tuple[Any, ...],
    ) -> bool | None:
        """Timed once per shape, and kept with the launches that were searched.

        By rank 0, which tells the others; None where it has not.
        """
        shape = operation, source.shape, source.dtype, weight.shape
        if shape not in self._vendor_chosen:
            scratch = [_copied(a) for a in given]
            k = weight.shape[0]

            def ours() -> None:
                self._run(operation, function, source, *scratch, bottleneck=k)

            # the search comes first: the vendor's is compared with the best of ours
            ours()
            table = self._launchers[source.get_device()].table
            assert isinstance(table, launch_search.SearchedLaunchTable)
            alternatives = {"ours": ours, "vendor": lambda: vendors(source, *scratch)}
            chosen = table.choose(operation, source, source.shape[1], k, alternatives)
            self._vendor_chosen[shape] = None if chosen is None else chosen == "vendor"
        return self._vendor_chosen[shape]

    def bn_relu_avg_pool(
        self, x: Tensor, norm: Normalization, shape: tuple[int, ...], out: Tensor
    ) -> None:
        self._run("pool", bn_relu_pool.bn_relu_avg_pool, x, norm, shape, out)

    def bn_relu_avg_pool_backward(
        self,
        x: Tensor,
        norm: Normalization,
        shape: tuple[int, ...],
        dpooled: Tensor,
        d: Tensor,
        pooled: Tensor | None,
        channels: slice | Tensor | None = slice(None),
    ) -> tuple[Tensor, Tensor]:
        function = bn_relu_pool.bn_relu_avg_pool_backward
        return self._run("pool_backward", function, x, norm, shape, dpooled, d, pooled, None)

    def bn_relu_global_pool(self, x: Tensor, norm: Normalization, images: int, out: Tensor) -> None:
        function = bn_relu_pool.bn_relu_global_pool
        self._run("global_pool", function, x, norm, images, out, like=out)

    def bn_relu_global_pool_backward(
        self, x: Tensor, norm: Normalization, images: int, dpooled: Tensor, d: Tensor
    ) -> tuple[Tensor, Tensor]:
        function = bn_relu_pool.bn_relu_global_pool_backward
        columns = round_up(dpooled.shape[1], self.row_multiple)
        if columns != dpooled.shape[1]:
            # small beside d, whose stores would be as narrow as these loads
            padded = dpooled.new_empty((images, columns))[:, : dpooled.shape[1]]
            dpooled = padded.copy_(dpooled)
        return self._run("reduce", function, x, norm, images, dpooled, d, None)

    def finish_gradient(
        self,
        d: Tensor,
        x: Tensor,
        mean: Tensor,
        s: Tensor,
        t: Tensor,
        count: float,
        out: Tensor,
    ) -> None:
        self._run("map", finish_gradient.finish_gradient, d, x, mean, s, t, count, out)


@functools.cache
def checks_of(device: torch.device) -> variants.Checks:
    """The process's checks of variants on ``device``, which has its number."""
    return variants.Checks(device)


def _copied(a: Any) -> Any:
    """A copy of what a timed operation may write into: a matrix or a pair of vectors."""
    if isinstance(a, Tensor) and a.dim() == 2:
        empty = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device)
        return empty.copy_(a)
    if isinstance(a, (Statistics, Deferred)):
        return type(a)(*(v.clone() for v in a))
    return a
