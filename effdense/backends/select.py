"""Which backend computes: by name, device and dtype."""

from __future__ import annotations

import functools
import os
import shutil
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import get_args

import torch

from ..choices import BackendName
from .base import Backend
from .cpu_backend import CpuBackend
from .cpu_library import DTYPES as LOOP_DTYPES
from .cpu_library import CannotLoad
from .precision import tf32_convolutions
from .self_check import describe, self_check
from .torch_backend import TorchBackend

BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_CAPABILITY = (8, 0)
"""Compute capability from which "auto" takes Triton.

On 7.5 the compiler makes products without matrix instructions, and spills 3,397 registers.
"""


class _Shapes(TorchBackend):
    """Torch operations on tensors without values."""

    def sums_from_products(self, dtype: torch.dtype) -> bool:
        # which channels is a matter of values
        return False


# What computes on meta; a simulation (memory/meta.py) has something else for each name.
on_meta: ContextVar[Callable[[str, torch.dtype], Backend]] = ContextVar(
    "on_meta", default=lambda name, dtype: _Shapes()
)


def get_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called ``name`` for matrices of ``dtype`` on ``device``.

    "auto" is Triton on a GPU of NVIDIA's from compute capability 8.0 or of AMD's, operation
    by operation where its kernels pass their checks, and the compiled loops on a CPU, where
    there are any for the dtype and the self-check passes; else torch. The environment variable
    EFFDENSE_BACKEND, where set, replaces ``name``.

    Raises:
        ValueError: for another name; for "triton" or "cpu" on a device or dtype they have
            nothing for, or without an importable Triton or a C compiler.
    """
    override = os.environ.get("EFFDENSE_BACKEND")
    if override is not None:
        check_backend(override, "EFFDENSE_BACKEND")
        name = override
    check_backend(name)
    if device.type == "meta":
        return on_meta.get()(name, dtype)
    if name == "torch":
        return TorchBackend(device)
    if name == "triton":
        if dtype not in TRITON_DTYPES:
            raise ValueError(
                f'backend="triton" computes in float16, bfloat16 or float32, got {dtype}; '
                'use backend="torch" or "auto"'
            )
        return _triton_for(device)
    if name == "cpu":
        if device.type != "cpu" or dtype not in LOOP_DTYPES:
            raise ValueError(
                f'backend="cpu" computes in float32 or float64 on a CPU, got {dtype} on '
                f'{device.type!r}; use backend="torch" or "auto"'
            )
        try:
            return CpuBackend(dtype)
        except CannotLoad as error:
            raise ValueError(f'backend="cpu" needs a C compiler with OpenMP: {error}') from error
    if device.type == "cpu":
        usable = dtype in LOOP_DTYPES and fault(device, dtype) is None
        return CpuBackend(dtype) if usable else TorchBackend(device)
    if device.type != "cuda":
        _say_that_there_are_none(device.type)
        return TorchBackend(device)
    if dtype not in TRITON_DTYPES:
        return TorchBackend(device)
    if torch.cuda.is_available() and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return TorchBackend(device) if why_not_triton(device) else _triton_backend(checked=True)


def check_backend(name: str, where: str = "backend") -> None:
    """ValueError naming the backends if ``name`` is none; ``where`` it was given."""
    if name not in BACKENDS:
        valid = ", ".join(f'"{b}"' for b in BACKENDS)
        raise ValueError(f"{where} must be one of {valid}, got {name!r}")


def _triton_backend(checked: bool) -> Backend:
    # what backward rounds its operands to is settled with its forward
    return _triton_backend_in(tf32_convolutions(), checked)


@functools.cache
def _triton_backend_in(tf32: bool, checked: bool) -> Backend:
    # the only import of Triton in the library outside the kernels
    from .triton_backend import TritonBackend

    return TritonBackend(tf32=tf32, checked=checked)


def _triton_for(device: torch.device) -> Backend:
    try:
        backend = _triton_backend(checked=False)
    except Exception as error:
        # Triton's import runs compilers' and drivers' code: anything may come out of it
        raise ValueError(f'backend="triton" needs an importable Triton: {error}') from error
    if device.type != "cuda":
        from .triton_backend import INTERPRETED

        if not INTERPRETED:
            raise ValueError(
                f'backend="triton" needs a CUDA or ROCm device, got {device.type!r}; on any other '
                "device only Triton's interpreter runs it (TRITON_INTERPRET=1 in the environment "
                "before Triton is imported)"
            )
    return backend


@functools.cache
def why_not_triton(device: torch.device) -> str:
    """Why a GPU is left to torch operations; empty where it isn't. Warns when first asked.

    Kernels are checked later, each when it is first met: see variants.py, NOTE [ variants ].
    """
    reason = _what_triton_lacks(device)
    if reason:
        warnings.warn(
            f"effdense: torch operations instead of Triton kernels on {device}: {reason}",
            RuntimeWarning,
            stacklevel=3,
        )
    return reason


def _what_triton_lacks(device: torch.device) -> str:
    try:
        _triton_backend(checked=True)
    except Exception as error:
        # Triton's import runs compilers' and drivers' code: anything may come out of it
        return f"importing Triton: {describe(error)}"
    # Triton builds what starts a kernel with the machine's own compiler
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler, and there is neither gcc nor clang on PATH, nor CC set"
    if torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            return (
                f"its compute capability is {capability[0]}.{capability[1]}, and below "
                f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} the kernels' products have no "
                "tensor cores"
            )
    return ""


@functools.cache
def _say_that_there_are_none(kind: str) -> None:
    warnings.warn(
        f"effdense has kernels for CUDA and ROCm devices and loops for CPUs, none for {kind!r}: "
        "torch operations are used there",
        RuntimeWarning,
        stacklevel=3,
    )


@functools.cache
def fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with a CPU's loops, None if nothing; warns when first asked."""
    # See self_check.py, NOTE [ self-check ].
    try:
        fault = self_check(CpuBackend(dtype), device, dtype)
    except CannotLoad as error:
        fault = str(error)
    if fault is not None:
        warnings.warn(
            f"effdense: the compiled loops failed their self-check on {device} with {dtype} and "
            f"torch operations are used instead. {fault}",
            RuntimeWarning,
            stacklevel=3,
        )
    return fault
