"""Whether a variant of an operation's kernels computes what torch does, on the device it is for.

NOTE [ variants ]
Kernels are proven on machines without a GPU: by interpreter and by cross-compilation. Neither
shows a driver that miscompiles, nor a race. What a device runs is not one kernel but variants
of it: tile, alignment, warps and types are compiled in, and a deep network's layers use forty
of them. So "auto" checks each variant once in a process, when a launcher prepares it and before
it has run on anybody's data: on small tensors of the same types, alignments and modes, of
several tiles with ragged ends, in the same tile and with the choices that were made for the
large ones, against torch in float64. What fails, differs beyond the type's rounding, or asks
for more shared memory or registers than there are leaves its operation to torch from then on,
with one warning. A graph's capture must have been preceded by a step that met its variants.

The ReLU's two sides must not depend on rounding: matrices hold eighths, and norms turn sign
in between.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from effdense.backends.base import (
    Deferred,
    Normalization,
    PendingNorm,
    Statistics,
    Unfinished,
)
from effdense.backends.torch_backend import TorchBackend
from effdense.kernels import (
    bn_relu,
    bn_relu_conv1x1,
    bn_relu_conv1x1_backward,
    bn_relu_conv3,
    bn_relu_conv3_backward,
    bn_relu_pool,
    dropout,
    finish_gradient,
    statistics,
)
from effdense.kernels.launch import Launcher, Untrusted, Variant
from effdense.kernels.launch_table import Launch
from effdense.kernels.layouts import cdiv

from .self_check import describe, tolerance

PROGRAMS = 6
"""Ranges of rows in a check, times tiles of channels: each range is a loop over tiles."""
_SPATIAL = {1: (67,), 2: (9, 7), 3: (5, 4, 6)}


class Refused(Exception):
    """A variant is not right on this device, and why."""


class Small:
    """Small tensors in the layouts of a call's.

    Args:
        device: where they are to lie.
        exact: the same numbers in float64 instead of the call's types.
        block_p: rows of the largest tile.
        sizes: of the call, by the letters of its dimensions. Here they are such that sizes
            modulo 128 are the call's.
    """

    def __init__(self, device: torch.device, exact: bool, block_p: int, **sizes: int) -> None:
        self.device, self.exact = device, exact
        self.block_p = block_p
        # a generator of its own: the caller's random state is not touched
        self._generator = torch.Generator().manual_seed(0)
        self.sizes = {name: n if n < 384 else 256 + n % 128 for name, n in sizes.items()}
        self.sizes["P"] = min(4 * block_p + 3, 1200)

    @property
    def rows(self) -> float:
        return float(self.sizes["P"])

    def image(self, shape: tuple[int, ...], pooled: bool = False) -> tuple[int, ...]:
        """An (n, *spatial) of several tiles of rows, or of windows where ``pooled``."""
        spatial = _SPATIAL[len(shape) - 1]
        rows = math.prod(n // 2 if pooled else n for n in spatial)
        shape = (max(2, cdiv(2 * self.block_p + 1, rows)), *spatial)
        self.sizes["P"] = math.prod(shape)
        self.sizes["W"] = shape[0] * math.prod(n // 2 for n in spatial)
        return shape

    def images(self) -> int:
        self.sizes["N"] = 3
        self.sizes["P"] = 3 * cdiv(self.sizes["P"], 3)
        return 3

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator, dtype=torch.float64)

    def _type(self, like: Tensor) -> torch.dtype:
        return torch.float64 if self.exact else like.dtype

    def matrix(self, like: Tensor, dims: str, scale: float = 1.0) -> Tensor:
        """Of eighths, times ``scale``, in the alignment of ``like``'s rows; around it NaN."""
        rows, columns = (self.sizes[d] for d in dims)
        stride, offset = columns, int(like.storage_offset() % 16)
        if like.stride(0) != like.shape[1]:
            stride += (like.stride(0) - like.shape[1]) % 16 + 16
        values = (8 * self._normal(rows, columns)).round().clamp(-31, 31) / 8 * scale
        flat = torch.full((offset + rows * stride,), math.nan, dtype=self._type(like))
        flat = flat.to(self.device)
        out = flat.as_strided((rows, columns), (stride, 1), offset)
        return out.copy_(values.to(like.dtype))

    def nothing(self, like: Tensor, dims: str) -> Tensor:
        """Room for a result, in the alignment of ``like``'s rows."""
        return self.matrix(like, dims).fill_(math.nan)

    def vector(self, like: Tensor, dim: str, add: float = 0.0) -> Tensor:
        values = self._normal(self.sizes[dim]).to(like.dtype) + add
        return values.to(device=self.device, dtype=self._type(like))

    def weight(self, like: Tensor, dims: str) -> Tensor:
        """(K, B) or (K, B, 3, ...), in the order of ``like``'s dimensions in memory."""
        shape = (*(self.sizes[d] for d in dims), *like.shape[2:])
        strides = like.stride()
        order = sorted(range(len(shape)), key=lambda i: (-strides[i], i))
        values = self._normal(*shape) / math.sqrt(math.prod(shape[1:]))
        stored = values.to(like.dtype).permute(order).contiguous()
        stored = stored.to(device=self.device, dtype=self._type(like))
        return stored.permute([order.index(i) for i in range(len(shape))])

    def norm(self, like: Normalization, dim: str) -> Normalization:
        n = self.sizes[dim]
        mean = ((2 * self._normal(n)).round() + 0.5) / 8
        var, gamma = 0.5 + self._normal(n).abs(), self._normal(n).to(like.gamma.dtype).double()
        # so that the sign turns at a sixteenth, where no value is
        beta = gamma * torch.rsqrt(var + like.eps) * (2 * self._normal(n)).round() / 8
        # rounded as it is stored, it turns elsewhere, if not by much
        mean, var, gamma, beta = (
            v.to(to.dtype).to(device=self.device, dtype=self._type(to))
            for v, to in (
                *((mean, like.mean), (var, like.var)),
                *((gamma, like.gamma), (beta, like.beta)),
            )
        )
        return Normalization(mean, var, gamma, beta, like.eps)

    def statistics(self, like: Statistics | None, dim: str) -> Statistics | None:
        if like is None:
            return None
        return Statistics(*(self.vector(v, dim).fill_(math.nan) for v in like))

    def deferred(self, like: Deferred | None, dim: str) -> Deferred | None:
        return None if like is None else Deferred(*(self.vector(v, dim) for v in like))

    def correction(
        self, like: tuple[Tensor, Tensor, float] | None, dim: str
    ) -> tuple[Tensor, Tensor, float] | None:
        return None if like is None else (*(self.vector(v, dim) for v in like[:2]), self.rows)  # type: ignore[return-value]

    def closed(self, dz: Tensor, x: Tensor, norm: Normalization) -> Tensor:
        """``dz``, zero where the ReLU behind a norm is closed."""
        return dz.mul_(_is_open(x, norm))


def _is_open(x: Tensor, norm: Normalization) -> Tensor:
    return x.double() * norm.scale.double() + norm.shift.double() > 0


class Check(NamedTuple):
    """How one operation is checked.

    Args:
        sizes: a call's sizes by the letters of its dimensions.
        small: a small call's arguments, from the call's own.
        torchs: the operation in torch.
        written: which of its arguments it writes.
    """

    sizes: Callable[..., dict[str, int]]
    small: Callable[..., tuple[Any, ...]]
    torchs: Callable[..., Any]
    written: tuple[int, ...]


def _columns(x: Tensor, *_: Any) -> dict[str, int]:
    return {"C": x.shape[1]}


def _statistics(s: Small, x: Tensor, out: Statistics) -> tuple[Any, ...]:
    return s.matrix(x, "PC"), s.statistics(out, "C")


def _bn_relu(s: Small, x: Tensor, norm: Normalization, out: Tensor) -> tuple[Any, ...]:
    return s.matrix(x, "PC"), s.norm(norm, "C"), s.nothing(out, "PC")


def _reduce(
    s: Small, x: Tensor, norm: Normalization, dz: Tensor, d: Tensor | None
) -> tuple[Any, ...]:
    onto = None if d is None else s.matrix(d, "PC")
    return s.matrix(x, "PC"), s.norm(norm, "C"), s.matrix(dz, "PC"), onto


def _torchs_reduce(
    o: TorchBackend, x: Tensor, norm: Normalization, dz: Tensor, d: Tensor | None
) -> tuple[Tensor, Tensor]:
    if d is None:
        return o.bn_relu_backward_reduce(x, norm, dz)
    return o.bn_relu_backward_accumulate(x, norm, dz, d)


def _apply(
    s: Small, x: Tensor, norm: Normalization, dz: Tensor, correction: Any
) -> tuple[Any, ...]:
    source, own = s.matrix(x, "PC"), s.norm(norm, "C")
    return source, own, s.closed(s.matrix(dz, "PC"), source, own), s.correction(correction, "C")


def _product_sizes(x: Tensor, norm: Normalization, weight: Tensor, *_: Any) -> dict[str, int]:
    return {"C": x.shape[1], "B": weight.shape[0]}


def _product(
    s: Small,
    x: Tensor,
    norm: Normalization,
    weight: Tensor,
    out: Tensor,
    found: Statistics | None,
) -> tuple[Any, ...]:
    arguments = s.matrix(x, "PC"), s.norm(norm, "C"), s.weight(weight, "BC")
    return *arguments, s.nothing(out, "PB"), s.statistics(found, "B")


def _product_backward(
    s: Small,
    x: Tensor,
    norm: Normalization,
    weight: Tensor,
    dz: Tensor,
    d: Tensor,
    need_weight: bool,
    pending: PendingNorm,
    deferred: Deferred | None,
) -> tuple[Any, ...]:
    arguments = s.matrix(x, "PC"), s.norm(norm, "C"), s.weight(weight, "BC")
    y, norm2 = s.matrix(pending.y, "PB"), s.norm(pending.norm, "B")
    inner = PendingNorm(y, norm2, s.correction(pending.correction, "B"))
    dz = s.closed(s.matrix(dz, "PB"), y, norm2)
    return *arguments, dz, s.matrix(d, "PC"), need_weight, inner, s.deferred(deferred, "C")


def _torchs_product_backward(o: TorchBackend, *given: Any) -> Any:
    x, norm, weight, dz, d, need_weight, pending, deferred = given
    return o.bn_relu_conv1x1_backward(x, norm, weight, dz, d, need_weight, pending, None, deferred)


def _conv3_sizes(source: Tensor, norm: Normalization, weight: Tensor, *_: Any) -> dict[str, int]:
    return {"B": source.shape[1], "K": weight.shape[0]}


def _conv3(
    s: Small,
    source: Tensor,
    norm: Normalization,
    weight: Tensor,
    shape: tuple[int, ...],
    out: Tensor,
    mask: Tensor | None,
    found: Statistics | None,
) -> tuple[Any, ...]:
    shape = s.image(shape)
    arguments = s.matrix(source, "PB"), s.norm(norm, "B"), s.weight(weight, "KB"), shape
    keep = None if mask is None else s.matrix(mask, "PK").abs_()
    return *arguments, s.nothing(out, "PK"), keep, s.statistics(found, "K")


def _conv3_backward(
    s: Small,
    source: Tensor,
    norm: Normalization,
    weight: Tensor,
    gradient: Unfinished,
    shape: tuple[int, ...],
    need_weight: bool,
    dz: Tensor | None,
    d: Tensor | None,
) -> tuple[Any, ...]:
    shape = s.image(shape)
    arguments = s.matrix(source, "PB"), s.norm(norm, "B"), s.weight(weight, "KB")
    own = s.matrix(gradient.d, "PK")
    inner = Unfinished(
        d=own,
        x=s.matrix(gradient.x, "PK"),
        mean=s.vector(gradient.mean, "K"),
        s=s.vector(gradient.s, "K"),
        t=s.vector(gradient.t, "K"),
        count=s.rows,
        mask=None if gradient.mask is None else s.matrix(gradient.mask, "PK").abs_(),
        scratch=lambda: torch.empty_like(own, memory_format=torch.contiguous_format),
    )
    into = None if dz is None else s.nothing(dz, "PB")
    onto = None if d is None else s.matrix(d, "PB")
    return *arguments, inner, shape, need_weight, into, onto


def _pool(
    s: Small, x: Tensor, norm: Normalization, shape: tuple[int, ...], out: Tensor
) -> tuple[Any, ...]:
    shape = s.image(shape, pooled=True)
    return s.matrix(x, "PC"), s.norm(norm, "C"), shape, s.nothing(out, "WC")


def _pool_backward(
    s: Small,
    x: Tensor,
    norm: Normalization,
    shape: tuple[int, ...],
    dpooled: Tensor,
    d: Tensor,
    pooled: Tensor | None,
    deferred: Deferred | None,
) -> tuple[Any, ...]:
    shape = s.image(shape, pooled=True)
    again = None if pooled is None else s.nothing(pooled, "WC")
    given = s.matrix(x, "PC"), s.norm(norm, "C"), shape, s.matrix(dpooled, "WC")
    return *given, s.nothing(d, "PC"), again, s.deferred(deferred, "C")


def _torchs_pool_backward(o: TorchBackend, x: Tensor, norm: Normalization, *rest: Any) -> Any:
    *given, deferred = rest
    return _deferring(norm, deferred, o.bn_relu_avg_pool_backward(x, norm, *given))


def _global_pool(
    s: Small, x: Tensor, norm: Normalization, images: int, out: Tensor
) -> tuple[Any, ...]:
    images = s.images()
    return s.matrix(x, "PC"), s.norm(norm, "C"), images, s.nothing(out, "NC")


def _global_pool_backward(
    s: Small,
    x: Tensor,
    norm: Normalization,
    images: int,
    dpooled: Tensor,
    d: Tensor,
    deferred: Deferred | None,
) -> tuple[Any, ...]:
    images = s.images()
    given = s.matrix(x, "PC"), s.norm(norm, "C"), images, s.matrix(dpooled, "NC")
    return *given, s.nothing(d, "PC"), s.deferred(deferred, "C")


def _torchs_global_backward(o: TorchBackend, x: Tensor, norm: Normalization, *rest: Any) -> Any:
    *given, deferred = rest
    return _deferring(norm, deferred, o.bn_relu_global_pool_backward(x, norm, *given))


def _deferring(norm: Normalization, deferred: Deferred | None, sums: Any) -> Any:
    if deferred is not None:
        deferred.add(norm, *sums)
    return sums


def _finish(
    s: Small,
    d: Tensor,
    x: Tensor,
    mean: Tensor,
    to_s: Tensor,
    to_t: Tensor,
    count: float,
    out: Tensor,
) -> tuple[Any, ...]:
    vectors = (s.vector(v, "C") for v in (mean, to_s, to_t))
    own = s.matrix(d, "PC")
    into = own if out is d else s.nothing(out, "PC")
    return own, s.matrix(x, "PC"), *vectors, s.rows, into


def _mask(s: Small, out: Tensor, key: Tensor, p: float) -> tuple[Any, ...]:
    return s.nothing(out, "PC"), torch.full_like(key, 5, device=s.device), p


def _torchs_mask(o: TorchBackend, out: Tensor, key: Tensor, p: float) -> None:
    o.dropout_mask(key, p, out)


CHECKS: dict[Callable[..., Any], Check] = {
    statistics.statistics: Check(_columns, _statistics, TorchBackend.statistics, (1,)),
    bn_relu.bn_relu: Check(_columns, _bn_relu, TorchBackend.bn_relu, (2,)),
    bn_relu.bn_relu_backward_reduce: Check(_columns, _reduce, _torchs_reduce, (3,)),
    bn_relu.bn_relu_backward_apply: Check(
        _columns, _apply, TorchBackend.bn_relu_backward_apply, (2,)
    ),
    bn_relu_conv1x1.bn_relu_conv1x1: Check(
        _product_sizes, _product, TorchBackend.bn_relu_conv1x1, (3, 4)
    ),
    bn_relu_conv1x1_backward.bn_relu_conv1x1_backward: Check(
        _product_sizes, _product_backward, _torchs_product_backward, (4, 7)
    ),
    bn_relu_conv3.bn_relu_conv3: Check(_conv3_sizes, _conv3, TorchBackend.bn_relu_conv3, (4, 6)),
    bn_relu_conv3_backward.bn_relu_conv3_backward: Check(
        _conv3_sizes, _conv3_backward, TorchBackend.bn_relu_conv3_backward, (6, 7)
    ),
    bn_relu_pool.bn_relu_avg_pool: Check(_columns, _pool, TorchBackend.bn_relu_avg_pool, (3,)),
    bn_relu_pool.bn_relu_avg_pool_backward: Check(
        _columns, _pool_backward, _torchs_pool_backward, (4, 5, 6)
    ),
    bn_relu_pool.bn_relu_global_pool: Check(
        _columns, _global_pool, TorchBackend.bn_relu_global_pool, (3,)
    ),
    bn_relu_pool.bn_relu_global_pool_backward: Check(
        _columns, _global_pool_backward, _torchs_global_backward, (4, 5)
    ),
    dropout.dropout_mask: Check(_columns, _mask, _torchs_mask, (0,)),
    finish_gradient.finish_gradient: Check(_columns, _finish, TorchBackend.finish_gradient, (6,)),
}


class _Again(Launcher):
    """Makes a launcher's choices again, on fewer rows, and trusts only the variant in question."""

    def __init__(self, unknown: Untrusted, precision: str) -> None:
        super().__init__(lambda *_: Launch(), precision, trusted={unknown.variant})
        self._recorded = unknown.choices

    def choose(self, name: str, choice: Any) -> Any:
        found = self._recorded[name]
        if isinstance(found, Launch) and found.programs:
            return replace(found, programs=PROGRAMS)
        return found


class Checked(NamedTuple):
    """What checks have cost a device so far."""

    variants: int
    compiling: float
    """Seconds of each variant's first run, nearly all of it compilation or loading."""
    seconds: float
    """Of everything else."""


class Checks:
    """The variants that are right on one device; the same for every backend in the process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.trusted: set[Variant] = set()
        self.cost = Checked(0, 0.0, 0.0)
        self.differences: dict[Variant, float] = {}
        """From torch in float64, in units of the largest value."""
        self._faults: dict[Variant, str] = {}

    def trust(
        self,
        unknown: Untrusted,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        precision: str,
    ) -> None:
        """Check the variant that a call of ``function`` has met.

        Raises:
            Refused: where it does not compute what torch does, with the reason.
            RuntimeError: within the capture of a CUDA graph, which a check would break.
        """
        variant = unknown.variant
        if variant not in self._faults:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"effdense: {variant.operation.__name__} meets a kernel for the first time "
                    "while a CUDA graph is captured; take a step on these shapes before"
                )
            # random numbers of the CPU's generator, whatever the default device
            with torch.no_grad(), _disable_current_modes(), torch.device("cpu"):
                self._faults[variant] = self._fault(unknown, function, arguments, precision)
        if self._faults[variant]:
            raise Refused(self._faults[variant])
        self.trusted.add(variant)

    def _fault(
        self,
        unknown: Untrusted,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        precision: str,
    ) -> str:
        """What is wrong with a variant; empty where nothing is."""
        began = time.monotonic()
        first_run = 0.0
        try:
            check = CHECKS[function]
            launches = [v for v in unknown.choices.values() if isinstance(v, Launch)]
            block_p = max(launch.block_p for launch in launches)
            sizes = check.sizes(*arguments)

            def small(device: torch.device, exact: bool) -> tuple[Any, ...]:
                return check.small(Small(device, exact, block_p, **sizes), *arguments)

            mine, theirs = small(self.device, False), small(torch.device("cpu"), True)
            exact = check.torchs(TorchBackend("cpu"), *theirs)
            expected = _tensors((exact, [theirs[i] for i in check.written]))
            run = time.monotonic()
            ours = function(*mine, _Again(unknown, precision))
            found = [t.cpu() for t in _tensors((ours, [mine[i] for i in check.written]))]
            first_run = time.monotonic() - run
            differences = [
                (one.double() - other.double()).abs().max() / other.abs().max().clamp(min=1)
                for one, other in zip(found, expected, strict=True)
            ]
            difference = torch.stack(differences).max().item()
            self.differences[unknown.variant] = difference
            allowed = tolerance(arguments[0].dtype, precision == "tf32")
            # not "difference > allowed": a NaN has to fail
            if difference <= allowed:
                return ""
            return (
                f"differs from torch by {difference:.2g} of the largest value, "
                f"more than {allowed:.2g}"
            )
        except Untrusted:
            return "its variant could not be made of small tensors"
        except Exception as error:
            # whatever a compiler or a driver raises, out of resources among it
            return describe(error)
        finally:
            variants, compiling, seconds = self.cost
            rest = time.monotonic() - began - first_run
            self.cost = Checked(variants + 1, compiling + first_run, seconds + rest)


def _tensors(found: Any) -> list[Tensor]:
    return list(_walk(found))


def _walk(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (tuple, list)):
        for item in found:
            yield from _walk(item)
