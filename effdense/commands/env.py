"""``env``: what a bug report should say of a machine."""

from __future__ import annotations

import functools
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import torch

from ..autocast import computing_in
from ..backends import select
from ..backends.cpu_library import DTYPES as LOOP_DTYPES
from ..backends.cpu_library import compilers, find_compiler
from ..backends.precision import tf32_convolutions
from ..errors import first_line
from ..machine import environment as machine
from ..machine.memory import available_bytes, total_bytes
from ..machine.sizes import show_size
from ..machine.tables import columns
from ..models import DenseNet, configuration

if TYPE_CHECKING:
    from ..backends.dry_run import DryRun


@dataclass(frozen=True)
class Options:
    """Versions, machine, devices, and each backend's self-check on them."""


def run(options: Options) -> None:
    print(as_text(environment()))


def as_text(rows: list[tuple[str, str]]) -> str:
    return columns(rows)


@functools.cache
def environment() -> list[tuple[str, str]]:
    """(what, which) pairs. Nothing that is missing or broken here is an error."""
    return [*_versions(), *_machine(), *_devices(), *_backends()]


def _versions() -> Iterator[tuple[str, str]]:
    found = machine.versions()
    yield "effdense", f"{found.get('effdense', 'not installed')} ({machine.short_revision()})"
    yield "python", found["python"]
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    for package in ("torchvision", "triton", "numpy", "nvidia-ml-py"):
        yield package, found.get(package, "not installed")


def _machine() -> Iterator[tuple[str, str]]:
    yield "system", machine.versions()["system"]
    yield "processor", machine.processor()
    yield "cores", f"{machine.usable_cores()} usable, {torch.get_num_threads()} torch threads"
    yield "memory", f"{show_size(total_bytes())}, {show_size(available_bytes())} free"
    yield "C compiler", _compiler()


def _compiler() -> str:
    words = find_compiler()
    if not words:
        return f"none ({', '.join(compilers())} not on PATH)"
    called = " ".join(words)
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run([*words, "--version"], capture_output=True, text=True, timeout=10)
        return f"{called}: {first_line(said.stdout or 'no version')}"
    return called


def _devices() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        yield "CUDA devices", "none"
        return
    yield "float32 products", "TF32" if tf32_convolutions() else "exact"
    for i in range(torch.cuda.device_count()):
        yield f"cuda:{i}", _guarded(lambda i=i: _device(i))  # type: ignore[misc]


def _device(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    size = show_size(properties.total_memory)
    return f"{properties.name}, compute capability {capability}, {size}, driver {_driver()}"


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else str(version)
    except Exception as error:
        # ImportError, NVMLError, and whatever a half-installed driver makes of it
        return f"unknown ({first_line(error)})"


def _backends() -> Iterator[tuple[str, str]]:
    """What "auto" would find, by device and dtype."""
    for dtype in LOOP_DTYPES:
        yield f"cpu loops, {_name(dtype)}", _checked(torch.device("cpu"), dtype)
    if not torch.cuda.is_available():
        yield "triton", _why_not_triton()
        return
    for i in range(torch.cuda.device_count()):
        for dtype in select.TRITON_DTYPES:
            yield f"triton cuda:{i}, {_name(dtype)}", _kernels(torch.device("cuda", i), dtype)


def _checked(device: torch.device, dtype: torch.dtype) -> str:
    with warnings.catch_warnings():
        # it is said here
        warnings.simplefilter("ignore", RuntimeWarning)
        return _guarded(lambda: select.fault(device, dtype) or "self-check ok")


# Whose kernels are checked, as the README trains them: name, depth, growth rate, images' shape.
NETWORKS = (
    ("densenet_bc", 100, 12, (64, 3, 32, 32)),
    ("densenet_bc", 250, 24, (64, 3, 32, 32)),
    ("densenet121", 0, 0, (32, 3, 224, 224)),
)


def _kernels(device: torch.device, dtype: torch.dtype) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        reason = _guarded(lambda: select.why_not_triton(device))
        if reason:
            return f"torch operations instead: {reason}"
        return _guarded(lambda: _kernels_of_networks(device, dtype))


def _kernels_of_networks(device: torch.device, dtype: torch.dtype) -> str:
    from ..backends.dry_run import DryRun
    from ..kernels.launch_table import Architecture

    return checked_variants(device, dtype, DryRun(Architecture.of(device), tf32_convolutions()))


def checked_variants(device: torch.device, dtype: torch.dtype, dry: DryRun) -> str:
    """How many variants of kernels a network of the README runs in ``dtype``, and the faulty."""
    from ..backends.triton_backend import checks_of
    from ..backends.variants import Refused

    with dry.on_meta(), computing_in(None if dtype == torch.float32 else dtype):
        for name, depth, growth_rate, shape in NETWORKS:
            with torch.device("meta"):
                network = DenseNet(**configuration(name, depth, growth_rate, backend="triton"))
                network(torch.empty(shape)).sum().backward()
    checks, faults = checks_of(device), []
    before = checks.cost
    for met in dry.met:
        try:
            checks.trust(*met)
        except Refused as refused:
            faults.append(f"{met.function.__name__}: {refused}")
    seconds = checks.cost.seconds - before.seconds
    compiling = checks.cost.compiling - before.compiling
    said = f"{len(dry.met)} variants of kernels checked in {seconds:.1f} s"
    said += f" and {compiling:.1f} s of compilation, "
    return said + (f"{len(faults)} faulty, the first {faults[0]}" if faults else "all ok")


def _why_not_triton() -> str:
    try:
        metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not checked: Triton is not installed, and torch sees no CUDA device"
    return "not checked: torch sees no CUDA device"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _guarded(say: Callable[[], str]) -> str:
    try:
        return say()
    except Exception as error:
        return f"failed: {type(error).__name__}: {first_line(error)}"
