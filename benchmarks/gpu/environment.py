"""What the figures depend on besides the code."""

from __future__ import annotations

import torch

import effdense
from effdense.machine import environment as machine

from .sheet import Row, Sheet


def run(sheet: Sheet, device: torch.device, tiny: bool) -> None:
    try:
        # every device and backend, with what "auto" finds; as `python -m effdense env` says it
        from effdense.commands import env

        for what, which in env.environment():
            sheet.add(Row("environment", what, "said", note=which))
    except ImportError as error:
        sheet.skip("environment", "devices and backends", f"{error.name} is not installed")
        versions = {**machine.versions(), "effdense": effdense.__version__}
        versions["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
        for what, which in versions.items():
            sheet.add(Row("environment", what, "said", note=which))
        sheet.add(Row("environment", "processor", "said", note=machine.processor()))
        sheet.add(Row("environment", "revision", "said", note=machine.short_revision()))
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} ({device})"
        sheet.add(Row("environment", "measured on", "said", note=name))
