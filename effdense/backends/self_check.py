"""Whether a backend computes what torch does, on the device and dtype it is to run on.

NOTE [ self-check ]
The loops for CPUs are compiled by whatever compiler the user has. So before "auto" uses
them, every operation is run once on the actual device and dtype, on a small odd-sized case,
and compared with torch operations on the same numbers. What fails, or is wrong beyond the
type's rounding, leaves the device to the torch backend for the whole process, with one
warning that names the operation. Of kernels each variant is checked instead, when it is
first met: variants.py, NOTE [ variants ].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..autocast import without_autocast
from ..errors import first_line
from .base import (
    Backend,
    Deferred,
    Normalization,
    PendingNorm,
    Rebuild,
    Statistics,
    Unfinished,
    accumulate_dtype,
)
from .dropout import layer_keys
from .precision import tf32_convolutions
from .torch_backend import TorchBackend

# Largest accepted difference in units of the largest value: products of rounded
# operands over 37 channels, in the type's precision (TF32's for float32 where allowed).
_TOLERANCE = {
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
    torch.float32: 1e-4,
    torch.float64: 1e-12,
}
_TF32_TOLERANCE = 5e-3


def tolerance(dtype: torch.dtype, tf32: bool) -> float:
    """The largest accepted difference, in units of the largest value."""
    return _TF32_TOLERANCE if tf32 and dtype == torch.float32 else _TOLERANCE[dtype]


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def self_check(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """The first operation of ``backend`` that fails or differs from torch's, and how; or None."""
    for operation, difference, allowed in operation_errors(backend, device, dtype):
        if isinstance(difference, Exception):
            return f"{operation}: {describe(difference)}"
        # not "difference > tolerance": a NaN has to fail
        if not difference <= allowed:
            return (
                f"{operation}: differs from torch by {difference:.2g} of the largest "
                f"value, more than {allowed:.2g}"
            )
    return None


def operation_errors(
    backend: Backend, device: torch.device, dtype: torch.dtype
) -> list[tuple[str, float | Exception, float]]:
    """Every operation of the protocol once, on 70 rows of 37 channels in a wider buffer.

    Each as (operation, largest difference from torch's on the same numbers in float64 in units
    of the largest value, or what it raised, and the largest difference accepted).
    """
    allowed = tolerance(dtype, device.type == "cuda" and tf32_convolutions())
    exact = TorchBackend("cpu")
    found: list[tuple[str, float | Exception, float]] = []
    # A caller's mode, such as one that counts memory, has no business with the check, nor a device
    # that new tensors are on, nor what autocast would make of torch's part of an operation.
    with (
        torch.no_grad(),
        _disable_current_modes(),
        torch.device("cpu"),
        without_autocast(device),
        without_autocast(torch.device("cpu")),
    ):
        for operation, run in _cases(dtype):
            expected = run(exact, torch.device("cpu"), torch.float64)
            try:
                results = [t.cpu() for t in run(backend, device, dtype)]
            except Exception as error:
                found.append((operation, error, allowed))
                continue
            differences = [
                (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1)
                for ours, theirs in zip(results, expected, strict=True)
            ]
            # a NaN stays one
            found.append((operation, torch.stack(differences).max().item(), allowed))
    return found


Run = Callable[[Backend, torch.device, torch.dtype], list[Tensor]]


def _cases(dtype: torch.dtype) -> Iterator[tuple[str, Run]]:
    """Every operation on the same numbers, which ``dtype`` holds exactly."""
    shape, c, width, b, k = (2, 5, 7), 37, 51, 19, 5
    rows, windows, outputs = 70, 12, 21
    # a generator of its own: the caller's random state is not touched
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    x_values, d_values = normal(rows, width), normal(rows, width)
    dz_values, y_values, dzb_values = normal(rows, c), normal(rows, b), normal(rows, b)
    dpooled_values, weight_values = normal(2, c), normal(b, c) / 8
    taps_values, mask_values = normal(k, b, 3, 3) / 16, (normal(rows, k) > 0).to(dtype) * 2
    transition_values, dout_values = normal(outputs, c) / 8, normal(windows, outputs)
    # of the features, and of the bottleneck
    vectors, vectors_b = (
        torch.randn(4, c, generator=generator),
        torch.randn(4, b, generator=generator),
    )

    class Inputs:
        """Fresh copies for one run, so that an operation may write into any of them."""

        def __init__(self, device: torch.device, store: torch.dtype) -> None:
            sums = accumulate_dtype(store)

            def put(values: Tensor, dtype: torch.dtype = store) -> Tensor:
                return values.to(device=device, dtype=dtype, copy=True)

            def norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Normalization:
                var, mean = torch.var_mean(x.double(), 0, correction=0)
                mean, var, gamma, beta = (put(v, sums) for v in (mean, var, gamma, beta))
                return Normalization(mean, var, gamma, beta, 1e-5)

            self.x, self.d = put(x_values)[:, :c], put(d_values)[:, :c]
            self.new, self.dnew = put(x_values)[:, c : c + k], put(d_values)[:, c : c + k]
            self.dz, self.y, self.dzb = put(dz_values), put(y_values), put(dzb_values)
            self.dpooled, self.weight = put(dpooled_values), put(weight_values)
            self.taps, self.mask = put(taps_values), put(mask_values)
            self.transition, self.dout = put(transition_values), put(dout_values)
            self.norm = norm(x_values[:, :c], vectors[0], vectors[1])
            self.norm_b = norm(y_values, vectors_b[0], vectors_b[1])
            self.s, self.t = put(vectors[2], sums), put(vectors[3], sums)
            correction = put(vectors_b[2], sums), put(vectors_b[3], sums), float(rows)
            # the ReLU's gradient is zero where it is closed
            self.dzb *= self.y.double() * self.norm_b.scale + self.norm_b.shift > 0
            self.pending = PendingNorm(self.y, self.norm_b, correction)
            self.gradient = Unfinished(
                d=self.dnew,
                x=self.new,
                mean=put(vectors[1][:k], sums),
                s=put(vectors[2][:k], sums),
                t=put(vectors[3][:k], sums),
                count=float(rows),
                mask=self.mask,
                scratch=lambda: self.like(rows, k),
            )

        def like(self, n: int, columns: int) -> Tensor:
            return torch.full_like(self.x[:1, :1].expand(n, columns), float("nan")).contiguous()

        def statistics(self, columns: int) -> Statistics:
            nothing = torch.full_like(self.s[:1].expand(columns), float("nan"))
            return Statistics(nothing.contiguous(), nothing.clone())

    def statistics(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        found = i.statistics(c)
        o.statistics(i.x, found)
        return [*found]

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

    def conv1x1(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        out, found = i.like(rows, b), i.statistics(b)
        o.bn_relu_conv1x1(i.x, i.norm, i.weight, out, found)
        return [out, *found]

    def conv1x1_backward(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i, found = Inputs(device, store), []
        before = i.like(rows, b)
        for rebuild in (None, Rebuild(i.norm, i.weight, before)):
            dzb, deferred = i.dzb.clone(), Deferred(i.s.clone(), i.t.clone())
            dw, s, t = o.bn_relu_conv1x1_backward(
                i.x, i.norm, i.weight, dzb, i.d, True, i.pending, rebuild, deferred
            )
            assert dw is not None
            found += [dw, s, t, i.d, *deferred]
        return [*found, before]

    def conv3(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        found = i.statistics(k)
        o.bn_relu_conv3(i.y, i.norm_b, i.taps, shape, i.new, i.mask, found)
        return [i.new, *found]

    def conv3_backward(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        given = (i.y, i.norm_b, i.taps, i.gradient, shape, True)
        dw, s, t = o.bn_relu_conv3_backward(*given, i.dzb, None)
        o.bn_relu_backward_apply(i.y, i.norm_b, i.dzb, (s, t, float(rows)))
        onto = i.y.clone()
        _, s_again, t_again = o.bn_relu_conv3_backward(*given, None, onto)
        assert dw is not None
        return [dw, s, t, i.dzb, s_again, t_again, onto]

    def transition(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        out = i.like(windows, outputs)
        o.bn_relu_avg_pool_conv1x1(i.x, i.norm, i.transition, shape, out)
        return [out]

    def transition_backward(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        d = i.like(rows, c)
        dw, s, t = o.bn_relu_avg_pool_conv1x1_backward(
            i.x, i.norm, i.transition, shape, i.dout, d, True
        )
        assert dw is not None
        return [dw, s, t, d]

    def global_pool(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        out = i.like(2, c)
        o.bn_relu_global_pool(i.x, i.norm, 2, out)
        return [out]

    def global_pool_backward(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        d = i.like(rows, c)
        sums = o.bn_relu_global_pool_backward(i.x, i.norm, 2, i.dpooled, d)
        return [*sums, d]

    def finish_gradient(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        i = Inputs(device, store)
        out = i.like(rows, c)
        o.finish_gradient(i.d, i.x, i.norm.mean, i.s, i.t, float(rows), out)
        return [out]

    def mask(o: Backend, device: torch.device, store: torch.dtype) -> list[Tensor]:
        out = Inputs(device, store).like(rows, k)
        o.dropout_mask(layer_keys(torch.tensor(5, device=device), 1)[0], 0.25, out)
        # 4/3 is rounded; its place is not
        return [(out > 0).to(store)]

    yield "statistics", statistics
    yield "bn_relu", bn_relu
    yield "bn_relu_backward_reduce and _apply", reduce_apply
    yield "finish_gradient", finish_gradient
    yield "dropout_mask", mask
    # what follows may be made of these
    yield "bn_relu_conv1x1", conv1x1
    yield "bn_relu_conv1x1_backward", conv1x1_backward
    yield "bn_relu_conv3", conv3
    yield "bn_relu_conv3_backward", conv3_backward
    yield "bn_relu_avg_pool_conv1x1", transition
    yield "bn_relu_avg_pool_conv1x1_backward", transition_backward
    yield "bn_relu_global_pool", global_pool
    yield "bn_relu_global_pool_backward", global_pool_backward
