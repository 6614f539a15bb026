"""Which backend computes: by name, device and dtype.

NOTE [ self-check ]
Kernels are proven on machines without a GPU: by interpreter and by cross-compilation.
Neither shows a driver that miscompiles, nor a race; and the loops for CPUs are compiled by
whatever compiler the user has. So before "auto" uses either, every operation is run once
on the actual device and dtype, on a small odd-sized case, and compared with torch
operations on the same numbers. What fails, or is wrong beyond the type's rounding, leaves
the device to the torch backend for the whole process, with one warning that names the
operation.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..choices import BackendName
from .base import KERNEL_STEP_BYTES, Backend, Normalization, accumulate_dtype
from .cpu_backend import CpuBackend
from .cpu_library import DTYPES as LOOP_DTYPES
from .cpu_library import CannotLoad
from .torch_backend import TorchBackend

BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Largest accepted difference in units of the largest value: products of rounded
# operands over 37 channels, in the type's precision (TF32's for float32 where allowed).
_TOLERANCE = {
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
    torch.float32: 1e-4,
    torch.float64: 1e-12,
}
_TF32_TOLERANCE = 5e-3


# The kind of device that meta tensors stand for: it decides how large temporaries are.
meta_stands_for: ContextVar[str] = ContextVar("meta_stands_for", default="cpu")


def get_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called ``name`` for matrices of ``dtype`` on ``device``.

    "auto" is Triton on a GPU and the compiled loops on a CPU, where there are any for the
    dtype and the self-check passes, else torch. The environment variable EFFDENSE_BACKEND,
    where set, replaces ``name``.

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
        return _on_meta(name, dtype)
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
    kind = device.type
    if dtype not in {"cuda": TRITON_DTYPES, "cpu": LOOP_DTYPES}.get(kind, ()):
        return TorchBackend(device)
    if kind == "cuda" and torch.cuda.is_available() and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if fault(device, dtype) is not None:
        return TorchBackend(device)
    return _compiled_backend(kind, dtype)


def _on_meta(name: str, dtype: torch.dtype) -> Backend:
    """What takes the memory, at least, that ``name`` takes on the device meta stands for."""
    stands_for = meta_stands_for.get()
    if name == "triton" or (name == "auto" and stands_for == "cuda"):
        return _KernelShapes()
    loops = name in ("auto", "cpu") and stands_for == "cpu" and dtype in LOOP_DTYPES
    if loops and fault(torch.device("cpu"), dtype) is None:
        return CpuBackend(dtype)
    return TorchBackend(stands_for)


class _KernelShapes(TorchBackend):
    """The Triton backend on meta tensors: its kernels have no tiles in memory."""

    def __init__(self) -> None:
        super().__init__("cuda")
        self._tile_bytes, self._step_bytes = 0, KERNEL_STEP_BYTES

    def sums_from_products(self, dtype: torch.dtype) -> bool:
        return False


def check_backend(name: str, where: str = "backend") -> None:
    """ValueError naming the backends if ``name`` is none; ``where`` it was given."""
    if name not in BACKENDS:
        valid = ", ".join(f'"{b}"' for b in BACKENDS)
        raise ValueError(f"{where} must be one of {valid}, got {name!r}")


@functools.cache
def _triton_backend() -> Backend:
    # the only import of Triton in the library outside the kernels
    from .triton_backend import TritonBackend

    return TritonBackend()


def _triton_for(device: torch.device) -> Backend:
    try:
        backend = _triton_backend()
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


def _compiled_backend(kind: str, dtype: torch.dtype) -> Backend:
    return _triton_backend() if kind == "cuda" else CpuBackend(dtype)


@functools.cache
def fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels or loops here, None if nothing; warns when first asked."""
    # See NOTE [ self-check ].
    try:
        fault = self_check(_compiled_backend(device.type, dtype), device, dtype)
    except CannotLoad as error:
        fault = str(error)
    except Exception as error:
        fault = f"importing Triton: {_describe(error)}"
    if fault is not None:
        what = "Triton kernels" if device.type == "cuda" else "compiled loops"
        warnings.warn(
            f"effdense: the {what} failed their self-check on {device} with {dtype} and "
            f"torch operations are used instead. {fault}",
            RuntimeWarning,
            stacklevel=3,
        )
    return fault


def _describe(error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"[:500]


def self_check(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """The first operation of ``backend`` that fails or differs from torch's, and how; or None."""
    for operation, difference, tolerance in operation_errors(backend, device, dtype):
        if isinstance(difference, Exception):
            return f"{operation}: {_describe(difference)}"
        # not "difference > tolerance": a NaN has to fail
        if not difference <= tolerance:
            return (
                f"{operation}: differs from torch by {difference:.2g} of the largest "
                f"value, more than {tolerance:.2g}"
            )
    return None


def operation_errors(
    backend: Backend, device: torch.device, dtype: torch.dtype
) -> list[tuple[str, float | Exception, float]]:
    """Every operation of the protocol once, on 70 rows of 37 channels in a wider buffer.

    Each as (operation, largest difference from torch's on the same numbers in float64 in units
    of the largest value, or what it raised, and the largest difference accepted).
    """
    tolerance = _TOLERANCE[dtype]
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        tolerance = _TF32_TOLERANCE
    exact = TorchBackend("cpu")
    found: list[tuple[str, float | Exception, float]] = []
    # A caller's mode, such as one that counts memory, has no business with the check.
    with torch.no_grad(), _disable_current_modes():
        for operation, run in _cases(dtype):
            expected = run(exact, torch.device("cpu"), torch.float64)
            try:
                results = [t.cpu() for t in run(backend, device, dtype)]
            except Exception as error:
                found.append((operation, error, tolerance))
                continue
            differences = [
                (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1)
                for ours, theirs in zip(results, expected, strict=True)
            ]
            # a NaN stays one
            found.append((operation, torch.stack(differences).max().item(), tolerance))
    return found


Run = Callable[[Backend, torch.device, torch.dtype], list[Tensor]]


def _cases(dtype: torch.dtype) -> Iterator[tuple[str, Run]]:
    """Every operation on the same numbers, which ``dtype`` holds exactly."""
    shape, c, width, b, k = (2, 5, 7), 37, 51, 19, 5
    rows, windows = 70, 12
    # a generator of its own: the caller's random state is not touched
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    x_values, d_values = normal(rows, width), normal(rows, width)
    dz_values, dy_values = normal(rows, c), normal(rows, b)
    dpooled_values, weight_values = normal(windows, c), normal(b, c) / 8
    taps_values, dout_values = normal(k, c, 3, 3) / 16, normal(rows, k)
    gamma, beta, s_values, t_values = torch.randn(4, c, generator=generator)
    x64 = x_values[:, :c].double()
    mean64, var64 = x64.mean(0), x64.var(0, unbiased=False)
    rstd64 = (var64 + 1e-5).rsqrt()
    scale64 = gamma * rstd64
    norm64 = Normalization(mean64, rstd64, scale64, beta - mean64 * scale64)

    class Inputs:
        """Fresh copies for one run, so that an operation may write into any of them."""

        def __init__(self, device: torch.device, store: torch.dtype) -> None:
            def put(values: Tensor) -> Tensor:
                return values.to(device=device, dtype=store, copy=True)

            self.x, self.d = put(x_values)[:, :c], put(d_values)[:, :c]
            self.dz, self.dy = put(dz_values), put(dy_values)
            self.dpooled, self.weight = put(dpooled_values), put(weight_values)
            self.taps, self.dout = put(taps_values), put(dout_values)
            sums = accumulate_dtype(store)
            self.norm = Normalization(*(v.to(device=device, dtype=sums) for v in norm64))
            self.s, self.t = (v.to(device=device, dtype=sums) for v in (s_values, t_values))

        def like(self, n: int, columns: int) -> Tensor:
            return torch.full_like(self.x[:1, :1].expand(n, columns), float("nan")).contiguous()

    def statistics(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        return list(o.statistics(Inputs(device, store).x))

    def bn_relu(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        out = i.like(rows, c)
        o.bn_relu(i.x, i.norm, out)
        return [out]

    def reduce_apply(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        s, t = o.bn_relu_backward_reduce(i.x, i.norm, i.dz)
        o.bn_relu_backward_apply(i.x, i.norm, i.dz, (s, t, float(rows)))
        return [s, t, i.dz]

    def accumulate(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        return [*o.bn_relu_backward_accumulate(i.x, i.norm, i.dz, i.d), i.d]

    def conv1x1(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        out = i.like(rows, b)
        found = o.bn_relu_conv1x1(i.x, i.norm, i.weight, out, True)
        assert found is not None
        return [out, *found]

    def conv1x1_backward(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        dw, s, t = o.bn_relu_conv1x1_backward(i.x, i.norm, i.weight, i.dy, i.d, True)
        assert dw is not None
        return [dw, s, t, i.d]

    def conv3(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        out = i.like(rows, k)
        o.bn_relu_conv3(i.x, i.norm, i.taps, shape, out)
        return [out]

    def conv3_backward(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        given = (i.x, i.norm, i.taps, i.dout, shape, True)
        dw, s, t = o.bn_relu_conv3_backward(*given, i.dz, None)
        o.bn_relu_backward_apply(i.x, i.norm, i.dz, (s, t, float(rows)))
        _, s_again, t_again = o.bn_relu_conv3_backward(*given, None, i.d)
        assert dw is not None
        return [dw, s, t, i.dz, s_again, t_again, i.d]

    def avg_pool(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        out = i.like(windows, c)
        o.bn_relu_avg_pool(i.x, i.norm, shape, out)
        return [out]

    def avg_pool_backward(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        d, pooled = i.like(rows, c), i.like(windows, c)
        sums = o.bn_relu_avg_pool_backward(i.x, i.norm, shape, i.dpooled, d, pooled)
        return [*sums, d, pooled]

    def global_pool(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        out = i.like(2, c)
        o.bn_relu_global_pool(i.x, i.norm, 2, out)
        return [out]

    def global_pool_backward(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        d = i.like(rows, c)
        sums = o.bn_relu_global_pool_backward(i.x, i.norm, 2, i.dpooled[:2], d)
        return [*sums, d]

    def finish_gradient(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        out = i.like(rows, c)
        o.finish_gradient(i.d, i.x, i.norm.mean, i.s, i.t, float(rows), out)
        return [out]

    yield "statistics", statistics
    yield "bn_relu", bn_relu
    yield "bn_relu_backward_reduce and _apply", reduce_apply
    yield "bn_relu_backward_accumulate", accumulate
    yield "bn_relu_conv1x1", conv1x1
    yield "bn_relu_conv1x1_backward", conv1x1_backward
    yield "bn_relu_conv3", conv3
    yield "bn_relu_conv3_backward", conv3_backward
    yield "bn_relu_avg_pool", avg_pool
    yield "bn_relu_avg_pool_backward", avg_pool_backward
    yield "bn_relu_global_pool", global_pool
    yield "bn_relu_global_pool_backward", global_pool_backward
    yield "finish_gradient", finish_gradient
