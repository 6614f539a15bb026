"""``verify``: is it correct here, and what does it save?"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

import effdense

from ..backends import select
from ..backends.base import Backend
from ..backends.cpu_backend import CpuBackend
from ..backends.cpu_library import DTYPES as LOOP_DTYPES
from ..backends.cpu_library import CannotLoad
from ..block.forwards import BlockForward
from ..errors import UserError
from ..machine.memory import show_size
from ..machine.tables import table
from ..memory.estimation import AMP_DTYPES
from ..verification.claims import (
    Comparison,
    Row,
    Status,
    Twins,
    block_inputs,
    first_tensor,
    guarded,
    not_checked,
    operations,
)
from . import Commands
from .env import as_text, environment
from .measure import Job, measured
from .network import Network, add_input_arguments, add_model_argument, converted, network_of

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}

# Of what benchmarks/estimates.py asks of predictions on a CPU; on a GPU nobody has measured yet.
_NEAR, _NEAR_BYTES, _NEAR_ON_GPU = 0.05, 30 << 20, 0.1
# Between two processes of the same work; and where the naive network keeps less than this for
# backward, there is little to save and everything else decides.
_NOISE_BYTES, _WORTH_SAVING = 8 << 20, 32 << 20
# of a channel, for batch statistics: normalised, two values are -1 and 1 whatever they were
_FEWEST_VALUES = 8


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="hold a network against its naive twin, measure both, and write a report",
        description="Hold effdense's network, or a model that it converts, against the naive one: "
        "hidden states, output, loss, gradients, buffers, save modes, finite differences, "
        "several optimiser steps; then measure memory and time of both, each in a process of its "
        "own. On a GPU also every Triton kernel and the predicted memory. Exit status 1 where a "
        "claim does not hold.",
    )
    add_model_argument(parser, default="densenet_bc", depth=40)
    add_input_arguments(parser, batch_size=8)
    parser.add_argument("--steps", type=int, default=3, help="of the optimisers (default 3)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=_DTYPES,
        metavar="DTYPE",
        help="float64 (relative error at most 1e-10), float32, bfloat16 under autocast (at most "
        "twice the naive network's own error); default float64, on a GPU all",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--no-measurements", action="store_true", help="leave memory and time out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON too")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("effdense-verify.md"),
        metavar="FILE",
        help="the report, worth attaching to an issue (default effdense-verify.md)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    for path in filter(None, (options.output, options.json)):
        _check_writable(path)
    device = _device(options.device)
    network = network_of(options)
    if options.steps < 1:
        raise UserError(f"--steps must be a positive integer, got {options.steps}")
    names = options.dtype or (list(_DTYPES) if device.type == "cuda" else ["float64"])
    verification = Verification(network, options, device, [_DTYPES[name] for name in names])
    print(f"{verification.describe()}\n{_one_line()}\n")
    print(_line(Row("claim", "compared", "error", "limit", "")))  # type: ignore[arg-type]
    rows = []
    for row in verification.rows():
        rows.append(row)
        print(_line(row), flush=True)
    failed = sum(row.failed for row in rows)
    unchecked = sum(row.status == "not checked" for row in rows)
    verdict = f"{failed} of {len(rows) - unchecked} claims FAILED" if failed else "all claims hold"
    verdict += f", {unchecked} not checked" if unchecked else ""
    verdict += f" ({time.perf_counter() - start:.0f} s)"
    _write(options.output, _report(verification.describe(), verdict, rows))
    if options.json:
        _write(options.json, _as_json(verification.describe(), verdict, rows))
    print(f"\n{verdict}\n{options.output}")
    return 1 if failed else 0


class Verification:
    """All that is checked of one network on one device.

    Raises:
        UserError: where there is no such network, no dense block in it, or it refuses the input.
    """

    def __init__(
        self,
        network: Network,
        options: argparse.Namespace,
        device: torch.device,
        dtypes: Sequence[torch.dtype],
    ) -> None:
        self._network, self._options = network, options
        self._device, self._dtypes = device, dtypes
        torch.manual_seed(0)
        naive = network.naive()
        self.shape = network.input_shape(naive, options.batch_size, options.image_size)
        ours = network.ours() if network.is_own else converted(copy.deepcopy(naive))
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
        try:
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
        except UserError:
            raise
        except Exception as error:
            line = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{self._network.name} refuses input of shape {self.shape}: {line}"
            ) from None

    def describe(self) -> str:
        kind = "" if self._network.is_own else ", converted, against itself as it was"
        size = "x".join(map(str, self.shape))
        return f"{self._network.describe()}{kind}, input {size}, {self._device}"

    def rows(self) -> Iterator[Row]:
        comparison = Comparison(self._twins, self.shape, self._options.steps)
        # for reproducible products on a GPU; but what is measured runs as it would anyway
        name, chosen = "CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        os.environ.setdefault(name, ":4096:8")
        for dtype in self._dtypes:
            exact = dtype == torch.float64
            yield from comparison.exact() if exact else comparison.narrow(dtype)
        if chosen is None:
            del os.environ[name]
        yield from guarded("backends", self._operations)
        if self._options.no_measurements:
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
        for amp in ("none", "bf16") if on_gpu else ("none",):
            label = "float32" if amp == "none" else "bfloat16 autocast"
            yield from guarded(f"memory and time in {label}", partial(self._race, amp, label))
        if not on_gpu:
            yield not_checked(
                "memory and throughput on a GPU",
                _why_not_gpu(),
            )

    def _race(self, amp: str, label: str) -> Iterator[Row]:
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
                    amp,
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
            yield from self._prediction(save, amp, label, peak, channels_last)

    def _state_bytes(self) -> int:
        """Parameters, gradients and momentum in float32."""
        return 12 * sum(p.numel() for p in self._twins.naive.parameters())

    def _prediction(
        self, save: str | None, amp: str, label: str, peak: int, channels_last: bool
    ) -> Iterator[Row]:
        if channels_last or len(self._output) != 2:
            # estimates are of classifiers
            return
        with torch.device("meta"):
            model = self._network.naive() if save is None else self._network.ours(save)
        on_gpu = self._device.type == "cuda"
        predicted = effdense.estimate(
            model, self.shape, amp=AMP_DTYPES[amp], device="cuda" if on_gpu else "cpu"
        )
        expected = predicted.peak if predicted.resident is None else predicted.resident
        allowed = max((_NEAR_ON_GPU if on_gpu else _NEAR) * peak, _NEAR_BYTES)
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


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if (device.index or 0) >= count:
        raise UserError(f"--device {name}: torch sees {count} CUDA devices here")
    return torch.device("cuda", device.index or 0)


def _line(row: Row) -> str:
    """A row for the terminal, as soon as it is known."""
    return f"{row.status:<12}{row.claim:<38}{row.error:>8}{row.limit:>8}  {row.compared}"


def _one_line() -> str:
    found = dict(environment())
    names = ("effdense", "torch", "processor")
    return ", ".join([found[names[0]], f"torch {found[names[1]]}", found[names[2]]])


def _report(what: str, verdict: str, rows: Sequence[Row]) -> str:
    header = ("claim", "error", "limit", "", "compared")
    cells = [(r.claim, r.error, r.limit, r.status, r.compared) for r in rows]
    command = shlex.join(["python", "-m", "effdense", *sys.argv[1:]])
    return (
        f"# effdense verify\n\n{what}: **{verdict}**\n\n```\n{command}\n\n"
        f"{as_text(environment())}\n```\n\n{table(header, cells)}\n"
    )


def _as_json(what: str, verdict: str, rows: Sequence[Row]) -> str:
    found = {
        "what": what,
        "verdict": verdict,
        "failed": sum(row.failed for row in rows),
        "environment": dict(environment()),
        "rows": [vars(row) for row in rows],
    }
    return json.dumps(found, indent=1) + "\n"


def _check_writable(path: Path) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {folder}")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
