"""Memory of every process during a run, and what its GPU's driver says: system.csv.

One row per process, at every ``--system-interval`` steps and at each epoch's end. A cell is
empty where there is nothing to say: on a processor, or where the driver doesn't answer, which
stops no run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from ..machine.memory import peak_resident_bytes, resident_bytes
from .distributed import World, all_or_none, gathered_on_main
from .records import LOG_COLUMNS, CsvLog

# Bytes but for the last three; "peak" is since the process began.
SYSTEM_COLUMNS = LOG_COLUMNS["system.csv"]
_OF_DRIVER = SYSTEM_COLUMNS[-4:]


class Telemetry:
    """Samples every process at an interval; rank 0 writes.

    Args:
        world: this process's place.
        interval: steps between samples; 0 for none at all.
        log: system.csv, on rank 0 only.
    """

    def __init__(self, world: World, interval: int, log: CsvLog | None) -> None:
        self._world, self._interval, self._log = world, interval, log
        self._gpu = Gpu.of(world.device) if interval and world.device.type == "cuda" else None
        self.warning = ""
        """Why there are no figures of the driver, where there should be; empty otherwise."""
        if self._gpu is not None and self._gpu.failure:
            self.warning = f"system.csv: no figures from the GPU's driver: {self._gpu.failure}"

    def after_step(self, epoch: int, step: int, last: bool) -> None:
        """Record if it is time; ``step`` counts from 1 over all epochs, ``last`` of its epoch.

        A collective: every process calls it for the same steps.

        Raises:
            UserError: where the disk refuses, on every process.
        """
        if not self._interval or not (last or step % self._interval == 0):
            return
        everyone = gathered_on_main(self._figures())
        with all_or_none():
            if self._log is not None:
                for rank, found in enumerate(everyone):
                    cells = {name: found.get(name) for name in SYSTEM_COLUMNS[3:]}
                    self._log.add(epoch=epoch, step=step, rank=rank, **cells)

    def _figures(self) -> dict[str, float]:
        found: dict[str, float] = {
            "resident": resident_bytes(),
            "resident_peak": peak_resident_bytes(),
        }
        device = self._world.device
        if device.type == "cuda":
            found["cuda_allocated"] = torch.cuda.memory_allocated(device)
            found["cuda_allocated_peak"] = torch.cuda.max_memory_allocated(device)
            found["cuda_reserved"] = torch.cuda.memory_reserved(device)
            found["cuda_reserved_peak"] = torch.cuda.max_memory_reserved(device)
        if self._gpu is not None:
            found |= self._gpu.figures()
        return found


class Gpu:
    """One GPU as NVIDIA's management library (NVML) sees it, whatever else uses it.

    Asked for by UUID: CUDA numbers devices as CUDA_VISIBLE_DEVICES says, NVML doesn't.
    ``failure`` says why there is nothing to be had, and is empty where there is; ``nvml`` is the
    library, None where it fails, and ``handle`` what it calls the GPU.
    """

    def __init__(self, uuid: str) -> None:
        self.failure = ""
        self.nvml: Any = None
        self.handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(
                uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
            )
            self.nvml = pynvml
        except Exception as error:
            # ImportError, NVMLError, and whatever a half-installed driver makes of it
            self.failure = str(error) or type(error).__name__

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        """The GPU that torch means by a CUDA device."""
        # a ROCm build, or an old torch, has no UUID to ask with
        return cls(str(getattr(torch.cuda.get_device_properties(device), "uuid", "")))

    def figures(self) -> dict[str, float]:
        """Of ``_OF_DRIVER``, those that this GPU has and the driver tells now."""
        nvml, handle = self.nvml, self.handle
        if nvml is None:
            return {}
        queries: tuple[Callable[[], float], ...] = (
            lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        )
        found = {}
        for name, query in zip(_OF_DRIVER, queries, strict=True):
            # "not supported" of some GPUs, a lost GPU, a driver that was replaced meanwhile
            with suppress(Exception):
                found[name] = query()
        return found
