"""The dense block's operations on CPUs in compiled loops (loops/).

Where the torch backend makes several passes of torch operations over a row tile, each
split over all threads, here every thread takes its own tiles through all of an
operation's steps: nothing but the tile's own rows moves between memory and cache. Types
narrower than float32 are the torch backend's.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Correction, Deferred, Normalization, PendingNorm, Rebuild, Statistics
from .cpu_library import load
from .dropout import kept_value, threshold
from .norm_sums import ALL_CHANNELS, STABLE_RATIO, Channels
from .sharing import address
from .torch_backend import TorchBackend

# A thread's transformed lines of pixels should stay in its cache.
_TILE_BYTES = 128 << 10
# Rows of a tile of a product; of those a few at a time, and columns in panels of some cache
# lines: at least what loops/ needs on every processor.
_TILE_ROWS = 64
_GROUP_ROWS = 8
_PANEL_LINES = 3
# Rows of a tile where nothing but sums depends on it.
_SUM_ROWS = 256
# What torch aligns an allocation to: a vector register's and a cache line's size.
_ALIGNMENT = 64


_MOST_THREADS = 1024
"""As loops/sums.h has room for."""


def _threads() -> int:
    return min(torch.get_num_threads(), _MOST_THREADS)


class _Norm(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("mean", "rstd", "scale", "shift")]

    def __init__(self, norm: Normalization) -> None:
        vectors = norm.mean, norm.rstd, norm.scale, norm.shift
        super().__init__(*(vector.data_ptr() for vector in vectors))


class _Product(ctypes.Structure):
    _fields_ = [
        ("f", _Norm),
        ("c", ctypes.c_int64),
        ("b", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("panels", ctypes.c_void_p),
    ]

    def __init__(self, norm: Normalization, weight: Tensor, y: Tensor | None, panels: int) -> None:
        b, c = weight.shape
        out = 0 if y is None else y.data_ptr()
        super().__init__(_Norm(norm), c, b, weight.data_ptr(), out, panels)


class _Correction(ctypes.Structure):
    _fields_ = [
        ("f", _Norm),
        *((name, ctypes.c_void_p) for name in ("s", "t")),
        ("count", ctypes.c_double),
        ("vectors", ctypes.c_void_p),
    ]

    def __init__(self, norm: Normalization, correction: Correction | None, vectors: int) -> None:
        if correction is None:
            super().__init__(_Norm(norm))
        else:
            s, t, count = correction
            super().__init__(_Norm(norm), s.data_ptr(), t.data_ptr(), count, vectors)


class _Pending(ctypes.Structure):
    _fields_ = [("y", ctypes.c_void_p), ("n", _Correction)]


class _Convolution(ctypes.Structure):
    _fields_ = [
        ("f", _Norm),
        ("source", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("lds", "b", "k")),
        *((name, ctypes.c_int64) for name in ("images", "depth", "height", "width", "dz", "dy")),
        ("weight", ctypes.c_void_p),
        ("stride", ctypes.c_int64 * 5),
        ("u", ctypes.c_void_p),
    ]

    def __init__(
        self, source: Tensor, norm: Normalization, weight: Tensor, shape: tuple[int, ...], u: int
    ) -> None:
        images, *spatial = shape
        absent = 3 - len(spatial)
        reach = [0] * absent + [1] * len(spatial)
        super().__init__(
            _Norm(norm),
            address(source),
            source.stride(0),
            source.shape[1],
            weight.shape[0],
            images,
            *([1] * absent + spatial),
            *reach[:2],
            weight.data_ptr(),
            _weight_strides(weight),
            u,
        )


class _Pool(ctypes.Structure):
    _fields_ = [
        ("f", _Norm),
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("ldx", "c")),
        *((name, ctypes.c_int64) for name in ("images", "depth", "height", "width")),
        *((name, ctypes.c_int64) for name in ("wz", "wy", "wx")),
    ]

    def __init__(
        self, x: Tensor, norm: Normalization, shape: tuple[int, ...], window: Sequence[int]
    ) -> None:
        absent = [1] * (4 - len(shape))
        sizes = [shape[0], *absent, *shape[1:], *absent, *window]
        super().__init__(_Norm(norm), address(x), x.stride(0), x.shape[1], *sizes)


class _Channels(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int64), ("index", ctypes.c_void_p)]

    def __init__(self, channels: Channels, c: int) -> None:
        if isinstance(channels, Tensor):
            super().__init__(len(channels), channels.data_ptr())
        else:
            super().__init__(0 if channels is None else c, None)


class _Scratch:
    """One allocation in areas of so many float64 and so many values of x's type."""

    def __init__(self, x: Tensor, doubles: Sequence[int], values: Sequence[int]) -> None:
        size, end, starts = x.element_size(), 0, []
        for nbytes in [*[8 * n for n in doubles], *[size * n for n in values]]:
            starts.append(end)
            end += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self._memory = x.new_empty(end, dtype=torch.uint8)
        base = self._memory.data_ptr()
        self.areas = [base + start for start in starts]
        """The areas' addresses."""


class CpuBackend(TorchBackend):
    """The :class:`effdense.backends.base.Backend` of loops/, for matrices of one type.

    Raises:
        CannotLoad: where the loops can't be compiled.
    """

    name = "cpu"

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__("cpu")
        self._library = load(dtype)

    def dropout_mask(self, key: Tensor, p: float, out: Tensor) -> None:
        sizes = _threads(), out.numel()
        self._library.call("dropout_mask", *sizes, key, threshold(p), kept_value(p), out)

    def statistics(self, x: Tensor, out: Statistics) -> None:
        rows, c = x.shape
        threads = _threads()
        scratch = _Scratch(x, [threads * 4 * c], [])
        rest = (x.stride(0), _SUM_ROWS, *scratch.areas, *out)
        self._library.call("statistics", threads, rows, c, address(x), *rest)

    def bn_relu(self, x: Tensor, norm: Normalization, out: Tensor) -> None:
        strides = x.stride(0), out.stride(0)
        self._library.call(
            "bn_relu",
            _threads(),
            *x.shape,
            address(x),
            strides[0],
            _Norm(norm),
            out,
            strides[1],
        )

    def bn_relu_backward_reduce(
        self,
        x: Tensor,
        norm: Normalization,
        dz: Tensor,
        z: Tensor | None = None,
        out: Tensor | None = None,
        channels: Channels = ALL_CHANNELS,
    ) -> tuple[Tensor, Tensor]:
        return self._reduce(x, norm, dz, z, dz if out is None else out, None, channels)

    def bn_relu_backward_accumulate(
        self, x: Tensor, norm: Normalization, dz: Tensor, d: Tensor, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._reduce(x, norm, dz, z, dz, d, ALL_CHANNELS)

    def _reduce(
        self,
        x: Tensor,
        norm: Normalization,
        dz: Tensor,
        z: Tensor | None,
        out: Tensor,
        d: Tensor | None,
        channels: Channels,
    ) -> tuple[Tensor, Tensor]:
        if z is None:
            z = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            self.bn_relu(x, norm, z)
        rows, c = x.shape
        threads = _threads()
        direct, s, t = _sums(x, c, channels)
        scratch = _Scratch(x, [threads * 2 * c], [threads * 2 * c])
        self._library.call(
            "bn_relu_backward_reduce",
            threads,
            rows,
            c,
            address(x),
            x.stride(0),
            _Norm(norm),
            z,
            z.stride(0),
            dz,
            dz.stride(0),
            out,
            out.stride(0),
            d,
            0 if d is None else d.stride(0),
            direct,
            _SUM_ROWS,
            *scratch.areas,
            s,
            t,
        )
        return s, t

    def bn_relu_backward_apply(
        self,
        x: Tensor,
        norm: Normalization,
        dz: Tensor,
        correction: Correction | None,
    ) -> None:
        scratch = _Scratch(x, [], [2 * x.shape[1]])
        self._library.call(
            "bn_relu_backward_apply",
            _threads(),
            *x.shape,
            address(x),
            x.stride(0),
            _Correction(norm, correction, *scratch.areas),
            dz,
            dz.stride(0),
        )

    def bn_relu_conv1x1(
        self,
        x: Tensor,
        norm: Normalization,
        weight: Tensor,
        out: Tensor,
        statistics: Statistics | None,
    ) -> None:
        weight = weight.to(x.dtype)
        (rows, c), b, threads = x.shape, weight.shape[0], _threads()
        scratch = _Scratch(
            x,
            [threads * 4 * b],
            [threads * _GROUP_ROWS * _apart(x, c), c * _whole_lines(x, b)],
        )
        *areas, panels = scratch.areas
        self._library.call(
            "bn_relu_conv1x1",
            threads,
            rows,
            address(x),
            x.stride(0),
            _Product(norm, weight, out, panels),
            _TILE_ROWS,
            *areas,
            *(statistics or (None, None)),
        )

    def bn_relu_conv1x1_backward(
        self,
        x: Tensor,
        norm: Normalization,
        weight: Tensor,
        dz: Tensor,
        d: Tensor,
        need_weight: bool,
        pending: PendingNorm,
        rebuild: Rebuild | None,
        deferred: Deferred | None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        weight = weight.to(x.dtype)
        (rows, c), b, threads = x.shape, weight.shape[0], _threads()
        tile = _TILE_ROWS * _PANEL_LINES * _whole_lines(x, 1)
        earlier, before = 0, torch.empty(0)
        if rebuild is not None:
            before = rebuild.weight.to(x.dtype)
            b_before, c_before = before.shape
            tile += _GROUP_ROWS * _apart(x, c_before)
            earlier = c_before * _whole_lines(x, b_before)
        scratch = _Scratch(
            x,
            [threads * 2 * c, c, c],
            [threads * tile, (threads - 1) * b * c, 2 * b, b * _whole_lines(x, c), earlier],
        )
        *areas, vectors, panels, panels_before = scratch.areas
        dw, s, t = x.new_empty((b, c)), x.new_empty(c), x.new_empty(c)
        correction = _Correction(pending.norm, pending.correction, vectors)
        again = None
        if rebuild is not None:
            again = _Product(rebuild.norm, before, rebuild.out, panels_before)
        self._library.call(
            "bn_relu_conv1x1_backward",
            threads,
            rows,
            address(x),
            x.stride(0),
            _Product(norm, weight, None, panels),
            dz,
            _Pending(pending.y.data_ptr(), correction),
            again,
            d,
            d.stride(0),
            STABLE_RATIO,
            _TILE_ROWS,
            *areas,
            dw,
            s,
            t,
        )
        if deferred is not None:
            deferred.add(norm, s, t)
        return (dw if need_weight else None), s, t

    def convolve(
        self,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        shape: tuple[int, ...],
        out: Tensor,
    ) -> None:
        threads = _threads()
        lines, sizes = self._line_tiles(weight, shape, threads)
        scratch = _Scratch(source, [], sizes)
        u, *areas = scratch.areas
        window = _Convolution(source, norm, weight, shape, u)
        self._library.call("bn_relu_conv3", threads, window, lines, *areas, out, out.stride(0))

    def convolve_backward(
        self,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        dout: Tensor,
        shape: tuple[int, ...],
        need_weight: bool,
        dz: Tensor | None,
        d: Tensor | None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        threads, b = _threads(), weight.shape[1]
        lines, (transformed, *of_threads) = self._line_tiles(weight, shape, threads)
        du = threads * transformed if need_weight else 0
        scratch = _Scratch(
            source,
            [threads * 2 * b, b, b],
            [*of_threads, du, threads * 2 * b, transformed],
        )
        *areas, u = scratch.areas
        gradient = torch.empty_like(weight) if need_weight else None
        s, t = source.new_empty(b), source.new_empty(b)
        self._library.call(
            "bn_relu_conv3_backward",
            threads,
            _Convolution(source, norm, weight, shape, u),
            dout,
            dz,
            d,
            0 if d is None else d.stride(0),
            STABLE_RATIO,
            lines,
            *areas,
            gradient,
            None if gradient is None else _weight_strides(gradient),
            s,
            t,
        )
        return gradient, s, t

    def _line_tiles(
        self, weight: Tensor, shape: tuple[int, ...], threads: int
    ) -> tuple[int, list[int]]:
        """Lines of pixels in a tile, whose transformed values of both kinds take two tiles.

        And values of the transformed weight and of all threads' lines, inputs and outputs.
        """
        k, b, *window = weight.shape
        columns, pairs = k * math.prod(window) // 3, (shape[-1] + 1) // 2
        rows = max(32, _TILE_BYTES // (b + columns) // weight.element_size())
        lines = max(1, min(math.prod(shape[:-1]), rows // shape[-1]))
        tile = threads * 4 * lines * pairs
        row, outputs = _apart(weight, b), _whole_lines(weight, columns)
        transformed = 4 * max(columns * row, b * outputs)
        return lines, [transformed, tile * row, tile * outputs]

    def bn_relu_avg_pool(
        self, x: Tensor, norm: Normalization, shape: tuple[int, ...], out: Tensor
    ) -> None:
        self._pool(x, norm, shape, [2] * (len(shape) - 1), out)

    def bn_relu_avg_pool_backward(
        self,
        x: Tensor,
        norm: Normalization,
        shape: tuple[int, ...],
        dpooled: Tensor,
        d: Tensor,
        pooled: Tensor | None,
        channels: Channels = ALL_CHANNELS,
    ) -> tuple[Tensor, Tensor]:
        window = [2] * (len(shape) - 1)
        return self._pool_backward(x, norm, shape, window, dpooled, d, pooled, channels)

    def bn_relu_global_pool(self, x: Tensor, norm: Normalization, images: int, out: Tensor) -> None:
        positions = x.shape[0] // images
        self._pool(x, norm, (images, positions), [positions], out)

    def bn_relu_global_pool_backward(
        self, x: Tensor, norm: Normalization, images: int, dpooled: Tensor, d: Tensor
    ) -> tuple[Tensor, Tensor]:
        positions = x.shape[0] // images
        shape, window = (images, positions), [positions]
        return self._pool_backward(x, norm, shape, window, dpooled, d, None, ALL_CHANNELS)

    def _pool(
        self,
        x: Tensor,
        norm: Normalization,
        shape: tuple[int, ...],
        window: Sequence[int],
        out: Tensor,
    ) -> None:
        threads, c = _threads(), x.shape[1]
        scratch = _Scratch(x, [threads * c], [threads * c])
        self._library.call(
            "bn_relu_pool", threads, _Pool(x, norm, shape, window), *scratch.areas, out
        )

    def _pool_backward(
        self,
        x: Tensor,
        norm: Normalization,
        shape: tuple[int, ...],
        window: Sequence[int],
        dpooled: Tensor,
        d: Tensor,
        pooled: Tensor | None,
        channels: Channels,
    ) -> tuple[Tensor, Tensor]:
        threads, c = _threads(), x.shape[1]
        direct, s, t = _sums(x, c, channels)
        scratch = _Scratch(x, [threads * 3 * c], [threads * 5 * c])
        self._library.call(
            "bn_relu_pool_backward",
            threads,
            _Pool(x, norm, shape, window),
            dpooled,
            d,
            d.stride(0),
            pooled,
            direct,
            *scratch.areas,
            s,
            t,
        )
        return s, t

    def finish_gradient(
        self,
        d: Tensor,
        x: Tensor,
        mean: Tensor,
        s: Tensor,
        t: Tensor,
        count: float,
        out: Tensor,
    ) -> None:
        scratch = _Scratch(x, [], [2 * x.shape[1]])
        self._library.call(
            "finish_gradient",
            _threads(),
            *x.shape,
            d,
            d.stride(0),
            address(x),
            x.stride(0),
            mean,
            s,
            t,
            count,
            *scratch.areas,
            out,
            out.stride(0),
        )


def _whole_lines(x: Tensor, values: int) -> int:
    """As many values of x's type, or more to fill cache lines."""
    line = _ALIGNMENT // x.element_size()
    return -(-values // line) * line


def _apart(x: Tensor, values: int) -> int:
    """The loops' stride of rows that are read side by side."""
    return _whole_lines(x, values) + _whole_lines(x, 1)


def _weight_strides(weight: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """Strides of a weight (k, b, 3, ...) as if it had three spatial dimensions."""
    outer, inner, *window = weight.stride()
    return (ctypes.c_int64 * 5)(outer, inner, *[0] * (3 - len(window)), *window)


def _sums(x: Tensor, c: int, channels: Channels) -> tuple[_Channels, Tensor, Tensor]:
    """What a sum over rows of x into S (c,) and T of ``channels`` writes: (direct, S, T)."""
    direct = _Channels(channels, c)
    return direct, x.new_empty(c), x.new_empty(direct.count)
