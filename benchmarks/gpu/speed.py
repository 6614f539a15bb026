"""Images a second, beside the naive network's best, and how near to the copy's bandwidth."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import effdense

from . import networks
from .networks import Network, Step, synchronize
from .sheet import Sheet

SAMPLES = 3


class Way(NamedTuple):
    """One implementation; ``seconds`` is what a first step of it may take."""

    name: str
    build: Callable[[Network], nn.Module]
    graphs: bool = False
    compiled: bool = False
    save: str | None = None
    channels_last: bool = True
    seconds: float = 5

    def takes(self, network: Network) -> bool:
        if self.name.startswith("torchvision"):
            return network.arch != "densenet_bc" and network.dims == 2
        # of images it is known to be the slower order; of volumes it is not
        return self.channels_last or network.dims == 3


WAYS = (
    Way("naive, channels last", networks.naive),
    Way("naive, channels first", networks.naive, channels_last=False),
    Way(
        "effdense bottlenecks, graphs",
        networks.ours("bottlenecks"),
        graphs=True,
        save="bottlenecks",
    ),
    Way("effdense features, graphs", networks.ours("features"), graphs=True, save="features"),
    Way("effdense bottlenecks", networks.ours("bottlenecks"), save="bottlenecks"),
    Way("effdense features", networks.ours("features"), save="features"),
    Way("torchvision, memory efficient", networks.torchvisions),
    Way("naive, compiled with graphs", networks.naive, compiled=True, seconds=60),
)


def run(sheet: Sheet, device: torch.device, tiny: bool) -> None:
    bandwidth = _copy_bandwidth(device, 1 << 24 if tiny else 1 << 30)
    what = "bandwidth of a copy in the device's memory"
    sheet.measured("device", what, bandwidth / 1e9, "GB/s", "read and written")
    races = networks.TINY if tiny else networks.FULL
    # what takes longest to begin comes last
    for compiled in (False, True):
        for dtype in networks.DTYPES:
            for network in races:
                for way in WAYS:
                    if way.compiled == compiled and way.takes(network):
                        _measure(sheet, network, dtype, way, device, bandwidth, tiny)


def _measure(
    sheet: Sheet,
    network: Network,
    dtype: str,
    way: Way,
    device: torch.device,
    bandwidth: float,
    tiny: bool,
) -> None:
    group = f"{network.name}, {dtype}"
    if device.type != "cuda" and (way.graphs or way.compiled):
        sheet.skip(group, way.name, "no GPU")
        return
    if not sheet.has_time(group, way.name, 1 if tiny else way.seconds):
        return
    try:
        seconds, host = _timed(network, dtype, way, device, 0.05 if tiny else 1.0)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError):
            sheet.skip(group, way.name, f"{error.name} is not installed")
        else:
            sheet.failed(group, way.name, error)
        return
    finally:
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    note = f"a step of {1e3 * seconds:.2f} ms"
    if device.type == "cuda":
        note += f", {100 * host / seconds:.0f} % of it the host's"
    if way.save is not None and device.type == "cuda":
        element = 4 if dtype == "float32" else 2
        share = networks.bytes_moved(network, way.save, element) / seconds / bandwidth
        note += f"; blocks' bytes at {100 * share:.0f} % of the copy's bandwidth"
    sheet.measured(group, way.name, network.batch / seconds, "images/s", note)


def _timed(
    network: Network, dtype: str, way: Way, device: torch.device, seconds: float
) -> tuple[float, float]:
    """Seconds of a step, and of these what the host takes to start it; medians."""
    model = way.build(network).to(device)
    if way.channels_last:
        model = model.to(memory_format=network.channels_last)
    step = Step(model, network, networks.DTYPES[dtype], device, way.channels_last)
    if way.graphs:
        with step.autocast(), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            effdense.cuda_graphs(model, step.images)
    if way.compiled:
        compiled: Any = torch.compile(model, mode="reduce-overhead", dynamic=False)
        step.model = compiled
    for _ in range(3):
        step()
    synchronize(device)
    begun = time.perf_counter()
    step()
    synchronize(device)
    count = max(1, int(seconds / (time.perf_counter() - begun)))
    whole, host = [], []
    for _ in range(SAMPLES):
        begun = time.perf_counter()
        for _ in range(count):
            step()
        host.append((time.perf_counter() - begun) / count)
        synchronize(device)
        whole.append((time.perf_counter() - begun) / count)
    return statistics.median(whole), statistics.median(host)


def _copy_bandwidth(device: torch.device, nbytes: int) -> float:
    source = torch.ones(nbytes // 4, device=device)
    out = torch.empty_like(source)
    rates = []
    for _ in range(5):
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(5):
            out.copy_(source)
        synchronize(device)
        rates.append(5 * 2 * nbytes / (time.perf_counter() - begun))
    return statistics.median(rates)
