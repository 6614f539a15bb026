"""Predicted memory beside what the allocator counts, and whether a plan keeps its budget."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn

import effdense
from effdense.machine.sizes import show_size

from . import networks
from .networks import FULL, TINY, Network, Step
from .sheet import Row, Sheet

TOLERANCE = 0.05
"""Relative difference of a peak from its prediction that passes."""


def run(sheet: Sheet, device: torch.device, tiny: bool) -> None:
    small, deep, image, large, volume = FULL
    cases = (
        [(TINY[0], "features")]
        if tiny
        else [
            *((small, "features"), (deep, "features"), (deep, "bottlenecks"), (image, "input")),
            *((small, "bottlenecks"), (deep, "input"), (image, "features"), (volume, "features")),
        ]
    )
    for network, save in cases:
        for name, dtype in networks.DTYPES.items():
            what = f"{network.name}, {save}, {name}"
            if sheet.has_time("peak", what, 0 if tiny else 8):
                _predict(sheet, what, network, save, dtype, device)
    for network in (TINY[0],) if tiny else (deep,):
        if sheet.has_time("budget", network.name, 0 if tiny else 15):
            _budget(sheet, network, device)
    if tiny:
        sheet.skip("16 GB", large.name, "tiny networks alone")
    elif sheet.has_time("16 GB", large.name, 15):
        _card(sheet, large, device)


def _predict(
    sheet: Sheet, what: str, network: Network, save: Any, dtype: torch.dtype, device: torch.device
) -> None:
    model = networks.ours(save)(network)
    kind: Any = device.type
    found = effdense.estimate(model, network.shape, dtype=dtype, device=kind)
    note = f"allocated at most, on a {'GPU' if kind == 'cuda' else 'CPU'}"
    sheet.add(Row("peak", what, "predicted", found.peak / 2**20, "MiB", note))
    if device.type != "cuda":
        sheet.skip("peak", f"{what}, measured", "no GPU")
        return
    try:
        allocated, reserved = _peak(model, network, dtype, device)
    except torch.cuda.OutOfMemoryError as error:
        sheet.failed("peak", what, error)
        return
    sheet.measured("peak", what, allocated / 2**20, "MiB", "allocated at most")
    if found.reserved is not None:
        note = f"predicted {found.reserved / 2**20:.0f} MiB"
        sheet.measured("reserved", what, reserved / 2**20, "MiB", note)
    difference = allocated / found.peak - 1
    holds = abs(difference) <= TOLERANCE
    sheet.check("difference", what, holds, difference, "of the predicted peak")


def _peak(
    model: nn.Module, network: Network, dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """Bytes allocated and reserved at most in a step with the optimiser's state in place."""
    step = Step(model.to(device), network, dtype, device)
    step()
    step.optimizer.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    found = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    del step
    model.to("meta")
    gc.collect()
    torch.cuda.empty_cache()
    return found


def _budget(sheet: Sheet, network: Network, device: torch.device) -> None:
    """Between what the thriftiest mode and the fastest take."""
    kind: Any = device.type
    peaks = [
        effdense.estimate(networks.ours(save)(network), network.shape, device=kind).needed
        for save in ("input", "bottlenecks")
    ]
    budget = (peaks[0] + peaks[1]) // 2
    model = networks.ours("features")(network)
    plan = effdense.plan(model, network.shape, budget, device=kind)
    plan.apply(model)
    what = f"{network.name}, {show_size(budget)}"
    if device.type != "cuda":
        sheet.skip("budget", what, "no GPU")
        return
    allocated, reserved = _peak(model, network, torch.float32, device)
    note = f"{allocated / 2**20:.0f} MiB allocated, {reserved / 2**20:.0f} reserved"
    sheet.check("budget", what, reserved <= budget, reserved / budget, note)


def _card(sheet: Sheet, network: Network, device: torch.device) -> None:
    """Whether it would train on a card of 16 GB: by what it reserves here."""
    _, reserved = _peak(networks.ours("features")(network), network, torch.bfloat16, device)
    # the driver and libraries want some of it
    sheet.check(
        "16 GB", f"{network.name}, bfloat16", reserved < 15e9, reserved / 1e9, "GB reserved"
    )
