"""Every kernel against float64; alone, so that compute-sanitizer can watch nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

import effdense
from effdense.autocast import computing_in
from effdense.backends import select
from effdense.backends.precision import float32_products, tf32_convolutions
from effdense.backends.self_check import describe, operation_errors

from .networks import FULL, Network
from .sheet import Sheet


def run(sheet: Sheet, device: torch.device, tiny: bool) -> None:
    if device.type != "cuda":
        for dtype in (torch.float32, torch.float64):
            _operations(sheet, device, dtype)
        sheet.skip("Triton kernels", "every variant of the README's networks", "no GPU")
        return
    for dtype in select.TRITON_DTYPES:
        ways: dict[str, Any] = {"": nullcontext}
        if dtype == torch.float32:
            ways = {
                ", TF32 as torch has it": nullcontext,
                ", no TF32": partial(float32_products, False),
            }
        for way, context in ways.items():
            with context():
                for network in FULL[1:3]:
                    group = f"{network.name}, {_name(dtype)}{way}"
                    if sheet.has_time(group, "variants of kernels", 10):
                        _variants(sheet, group, network, device, dtype)


def _operations(sheet: Sheet, device: torch.device, dtype: torch.dtype) -> None:
    """The compiled loops, each once."""
    group = f"compiled loops, {_name(dtype)}"
    try:
        found = operation_errors(select.get_backend("cpu", device, dtype), device, dtype)
    except Exception as error:
        sheet.failed(group, "all operations", error)
        return
    for operation, difference, tolerance in found:
        if isinstance(difference, Exception):
            sheet.check(group, operation, False, note=describe(difference))
        else:
            # a NaN fails
            note = f"of the largest value, at most {tolerance:.0e}"
            sheet.check(group, operation, difference <= tolerance, difference, note)


def _variants(
    sheet: Sheet, group: str, network: Network, device: torch.device, dtype: torch.dtype
) -> None:
    """Every variant of a kernel that a step of the network would start."""
    from effdense.backends.triton_backend import checks_of
    from effdense.backends.variants import Refused

    checks, largest, counts = checks_of(device), dict[str, float](), dict[str, int]()
    for met in _met(network, device, dtype):
        name = met.function.__name__
        try:
            checks.trust(*met)
        except Refused as refused:
            sheet.check(group, name, False, note=str(refused))
            continue
        difference = checks.differences[met.unknown.variant]
        largest[name] = max(difference, largest.get(name, 0.0))
        counts[name] = counts.get(name, 0) + 1
    for name, difference in largest.items():
        note = f"of the largest value, at most, of {counts[name]} variants"
        sheet.check(group, name, True, difference, note)


def _met(network: Network, device: torch.device, dtype: torch.dtype) -> Iterator[Any]:
    from effdense.backends.dry_run import DryRun
    from effdense.kernels.launch_table import Architecture

    dry = DryRun(Architecture.of(device), tf32_convolutions())
    with dry.on_meta(), computing_in(None if dtype == torch.float32 else dtype):
        arguments: Any = network.arguments() | {"drop_rate": 0.2}
        with torch.device("meta"):
            model = effdense.DenseNet(**arguments, backend="triton")
            model(torch.empty(network.shape)).sum().backward()
    return iter(dry.met)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
