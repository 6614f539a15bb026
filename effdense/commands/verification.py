"""All that ``verify`` checks of one network on one device."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median

import torch
from torch import nn

import effdense

from ..adaptation import converted
from ..backends import select
from ..backends.base import Backend
from ..backends.cpu_backend import CpuBackend
from ..backends.cpu_library import DTYPES as LOOP_DTYPES
from ..backends.cpu_library import CannotLoad
from ..block.forwards import BlockForward
from ..choices import DtypeName
from ..errors import UserError
from ..machine.sizes import show_size
from ..verification.claims import Comparison, Twins, operations
from ..verification.comparison import near_prediction
from ..verification.hidden_states import block_inputs, first_tensor
from ..verification.rows import Row, Status, guarded, not_checked
from .measure import Job, measured
from .network import Batch, Network

# Of predictions on a GPU, the larger of the two: libraries' workspaces come from torch's allocator
# too, and nobody has measured yet.
_NEAR_ON_GPU, _WORKSPACE_BYTES = 0.1, 30 << 20
# Between two processes of the same work; and where the naive network keeps less than this for
# backward, there is little to save and everything else decides.
_NOISE_BYTES, _WORTH_SAVING = 8 << 20, 32 << 20
# of a channel, for batch statistics: normalised, two values are -1 and 1 whatever they were
_FEWEST_VALUES = 8


class Verification:
    """All that is checked of one network on one device.

    Raises:
        UserError: where there is no such network, no dense block in it, or it refuses the input.
    """

    def __init__(
        self,
        network: Network,
        batch: Batch,
        device: torch.device,
        dtypes: Sequence[torch.dtype],
        *,
        steps: int = 3,
        measure: bool = True,
    ) -> None:
        self._network, self._steps, self._measure = network, steps, measure
        self._device, self._dtypes = device, dtypes
        torch.manual_seed(0)
        naive = network.naive()
        self.shape = network.input_shape(naive, batch)
        ours = network.ours() if network.is_own else converted(copy.deepcopy(naive), "features")
        if not any(isinstance(m, BlockForward) for m in ours.modules()):
            raise UserError(
                f"effdense converts no dense block of {network.name}; see python -m effdense "
                f"convert-report {network.name}"
            )
        self._twins = Twins.of(naive, ours, device)
        self._output = self._output_shape(copy.deepcopy(self._twins.naive))

    def _output_shape(self, naive: nn.Module) -> torch.Size:
        x = torch.randn(self.shape, dtype=torch.float64, device=self._device)
        ours = self._twins.ours
        blocks = [n for n, m in ours.named_modules() if isinstance(m, BlockForward)]
        with self._network.refusing(self.shape):
            shapes = block_inputs(naive, blocks, x)
            for name, (images, _, *spatial) in shapes.items():
                values = images * math.prod(spatial)
                if values < _FEWEST_VALUES:
                    raise UserError(
                        f"input of shape {self.shape} leaves {values} values of each channel in "
                        f"{name}: batch statistics of so few have no digits to compare; use "
                        "larger images or a larger batch"
                    )
            with torch.no_grad():
                return first_tensor(naive(x)).shape

    def describe(self) -> str:
        kind = "" if self._network.is_own else ", converted, against itself as it was"
        size = "x".join(map(str, self.shape))
        return f"{self._network.describe()}{kind}, input {size}, {self._device}"

    def rows(self) -> Iterator[Row]:
        comparison = Comparison(self._twins, self.shape, self._steps)
        # for reproducible products on a GPU; but what is measured runs as it would anyway
        name, chosen = "CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        os.environ.setdefault(name, ":4096:8")
        for dtype in self._dtypes:
            exact = dtype == torch.float64
            yield from comparison.exact() if exact else comparison.narrow(dtype)
        if chosen is None:
            del os.environ[name]
        yield from guarded("backends", self._operations)
        if not self._measure:
            yield not_checked("memory and time", "left out by --no-measurements")
        else:
            yield from guarded("memory and time", self._measurements)

    # ---------------------------------------------------------------- backends

    def _operations(self) -> Iterator[Row]:
        cpu = torch.device("cpu")
        for dtype in LOOP_DTYPES:
            try:
                yield from operations(CpuBackend(dtype), cpu, dtype, each=False)
            except CannotLoad as error:
                yield not_checked("operations of the cpu backend", str(error))
                break
        if self._device.type != "cuda":
            yield not_checked("every Triton kernel against float64", _why_not_gpu())
            return
        for dtype in select.TRITON_DTYPES:
            name = f"Triton kernels in {str(dtype).removeprefix('torch.')}"
            yield from guarded(name, partial(self._kernels, dtype))

    def _kernels(self, dtype: torch.dtype) -> Iterator[Row]:
        try:
            backend: Backend = select.get_backend("triton", self._device, dtype)
        except ValueError as error:
            yield not_checked("every Triton kernel against float64", str(error))
            return
        yield from operations(backend, self._device, dtype, each=True)

    # ------------------------------------------------------------ measurements

    def _measurements(self) -> Iterator[Row]:
        on_gpu = self._device.type == "cuda"
        names: tuple[DtypeName, ...] = ("float32", "bfloat16") if on_gpu else ("float32",)
        for dtype in names:
            label = "float32" if dtype == "float32" else "bfloat16 autocast"
            yield from guarded(f"memory and time in {label}", partial(self._race, dtype, label))
        if not on_gpu:
            yield not_checked("memory and throughput on a GPU", _why_not_gpu())

    def _race(self, dtype: DtypeName, label: str) -> Iterator[Row]:
        """Memory and time of the naive network and of ours."""
        images = self.shape[0]
        peaks: dict[str, int] = {}
        spatial = len(self.shape) - 2
        racers: list[tuple[str, str | None, bool]] = [("naive", None, False)]
        if self._device.type == "cuda" and spatial > 1:
            racers.append(("naive, channels last", None, True))
        racers += [(f'save="{save}"', save, False) for save in ("features", "bottlenecks")]
        for name, save, channels_last in racers:
            found = measured(
                Job(
                    self._network,
                    save,
                    self.shape,
                    (images, *self._output[2:]),
                    self._output[1] if len(self._output) > 1 else 1,
                    str(self._device),
                    dtype,
                    channels_last,
                ),
                torch.get_num_threads(),
                samples=3,
            )
            claim = f"training step, {name}"
            if "error" in found:
                # the naive network may well not fit
                yield not_checked(claim, f"{label}: {found['error']}")
                continue
            peaks[name] = peak = found["peak"]
            rate = f"{images / median(found['seconds']):.1f} images/s"
            yield Row(claim, f"{label}, {rate}, peak", show_size(peak), "", "measured")
            if save is not None and "naive" in peaks:
                limit = peaks["naive"] + _NOISE_BYTES
                status = _verdict(peak <= limit)
                if peaks["naive"] - self._state_bytes() < _WORTH_SAVING:
                    status = "measured"
                ratio, most = (f"{n / max(peaks['naive'], 1):.2f}" for n in (peak, limit))
                compared = f'{label}, save="{save}"'
                yield Row("memory over the naive network's", compared, ratio, most, status)
            yield from self._prediction(save, dtype, label, peak, channels_last)

    def _state_bytes(self) -> int:
        """Parameters, gradients and momentum in float32."""
        return 12 * sum(p.numel() for p in self._twins.naive.parameters())

    def _prediction(
        self, save: str | None, dtype: DtypeName, label: str, peak: int, channels_last: bool
    ) -> Iterator[Row]:
        if channels_last or len(self._output) != 2:
            # estimates are of classifiers
            return
        with torch.device("meta"):
            model = self._network.naive() if save is None else self._network.ours(save)
        on_gpu = self._device.type == "cuda"
        predicted = effdense.estimate(
            model, self.shape, dtype=getattr(torch, dtype), device="cuda" if on_gpu else "cpu"
        )
        expected = predicted.peak if predicted.resident is None else predicted.resident
        allowed = near_prediction(peak, getattr(torch, dtype))
        if on_gpu:
            allowed = max(_NEAR_ON_GPU * peak, _WORKSPACE_BYTES)
        name = "naive" if save is None else f'save="{save}"'
        yield Row(
            "memory as predicted",
            f"{label}, {name}: {show_size(expected)} predicted",
            show_size(abs(expected - peak)),
            show_size(allowed),
            _verdict(abs(expected - peak) <= allowed),
        )


def _why_not_gpu() -> str:
    if torch.cuda.is_available():
        return "not asked for by --device"
    return "torch sees no CUDA device"


def _verdict(holds: bool) -> Status:
    return "ok" if holds else "FAILED"
