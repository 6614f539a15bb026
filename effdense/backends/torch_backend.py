"""The dense block's arithmetic in torch operations, for any device and dtype.

Everything that is as wide as the concatenation is done in tiles of rows small enough
to stay in a CPU's per-core cache (or to bound temporaries on a GPU): the normalised,
rectified copy of the features exists one tile at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import (
    Correction,
    Deferred,
    Normalization,
    PendingNorm,
    Rebuild,
    Statistics,
    accumulate_dtype,
)
from .dropout import dropout_mask
from .layout import channels_first
from .layout import rows as rows_of
from .norm_sums import ALL_CHANNELS, Channels, second_sum
from .stepwise import Stepwise

# Measured on a 2-core CPU with 1 MiB of L2 per core, whole steps at (100, k12, batch 64):
# 2 and 8 MiB are 5 to 8 % faster than 1 and 4 MiB, half as many tiles 2 % slower to no faster.
_CPU_TILE_BYTES = 2 << 20
_CPU_STEP_BYTES = 8 << 20
# On a GPU a tile only has to amortise kernel launches.
_GPU_TILE_BYTES = 32 << 20
_GPU_STEP_BYTES = 256 << 20

_threshold_backward = torch.ops.aten.threshold_backward.grad_input
_AVG_POOL = (F.avg_pool2d, F.avg_pool3d)


class TorchBackend(Stepwise):
    """Implements :class:`effdense.backends.base.Backend`; its docstrings define each operation."""

    name = "torch"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        cpu = torch.device(device).type == "cpu"
        self._reads_values = cpu
        self._tile_bytes = _CPU_TILE_BYTES if cpu else _GPU_TILE_BYTES
        self._step_bytes = _CPU_STEP_BYTES if cpu else _GPU_STEP_BYTES

    def sums_from_products(self, dtype: torch.dtype) -> bool:
        # 16-bit products are too coarse to divide by gamma; which channels are near zero is a
        # matter of values, for which a GPU would have to be waited
        return self._reads_values and accumulate_dtype(dtype) == dtype

    def dropout_mask(self, key: Tensor, p: float, out: Tensor) -> None:
        dropout_mask(key, p, out, self._tile_bytes // key.element_size())

    def images_per_step(self, images: int, bytes_per_image: int) -> int:
        return max(1, min(images, self._step_bytes // max(1, bytes_per_image)))

    def _tile_rows(self, x: Tensor) -> int:
        """Rows of x (P, c) whose accumulate-type copy takes about one tile."""
        itemsize = 8 if x.dtype == torch.float64 else 4
        # Few rows would make the products thin; few channels would make the tile endless.
        rows = self._tile_bytes // (max(x.shape[1], 32) * itemsize)
        return min(x.shape[0], max(64, rows // 16 * 16))

    def _tiles(self, x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The same row tiles of several matrices, sized for x, the widest."""
        step = self._tile_rows(x)
        return zip(x.split(step), *(other.split(step) for other in others), strict=True)

    def statistics(self, x: Tensor, out: Statistics) -> None:
        partial = _PartialStatistics(self._tile_rows(x), x)
        for (tile,) in self._tiles(x):
            partial.add(tile)
        partial.combine(out)

    def bn_relu(self, x: Tensor, norm: Normalization, out: Tensor) -> None:
        for x_tile, out_tile in self._tiles(x, out):
            _normalize_rectify(x_tile, norm, out_tile)

    def bn_relu_backward_reduce(
        self,
        x: Tensor,
        norm: Normalization,
        dz: Tensor,
        z: Tensor | None = None,
        out: Tensor | None = None,
        channels: Channels = ALL_CHANNELS,
    ) -> tuple[Tensor, Tensor]:
        if z is None:
            z = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            self.bn_relu(x, norm, z)
        out = dz if out is None else out
        step = self._tile_rows(x)
        sums = _GradientSums(norm, step, -(-x.shape[0] // step), channels)
        for x_tile, z_tile, dz_tile, out_tile in self._tiles(x, z, dz, out):
            _threshold_backward(dz_tile, z_tile, 0, grad_input=out_tile)
            sums.add(x_tile, out_tile)
        return sums.result()

    def bn_relu_backward_apply(
        self,
        x: Tensor,
        norm: Normalization,
        dz: Tensor,
        correction: Correction | None,
    ) -> None:
        apply = _ImmediateGradient(norm, correction, self._tile_rows(x))
        for x_tile, dz_tile in self._tiles(x, dz):
            apply(x_tile, dz_tile, dz_tile)

    def bn_relu_backward_accumulate(
        self, x: Tensor, norm: Normalization, dz: Tensor, d: Tensor, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        sums = self.bn_relu_backward_reduce(x, norm, dz, z)
        for dz_tile, d_tile in self._tiles(dz, d):
            _add_scaled(d_tile, dz_tile, norm.scale)
        return sums

    def bn_relu_conv1x1(
        self,
        x: Tensor,
        norm: Normalization,
        weight: Tensor,
        out: Tensor,
        statistics: Statistics | None,
    ) -> None:
        step = self._tile_rows(x)
        partial = None if statistics is None else _PartialStatistics(step, out)
        z = x.new_empty((step, x.shape[1]))
        weight_t = weight.to(x.dtype).t().contiguous()
        for x_tile, y_tile in self._tiles(x, out):
            z_tile = z[: x_tile.shape[0]]
            _normalize_rectify(x_tile, norm, z_tile)
            torch.mm(z_tile, weight_t, out=y_tile)
            if partial is not None:
                partial.add(y_tile)
        if partial is not None and statistics is not None:
            partial.combine(statistics)

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
        step, weight = self._tile_rows(x), weight.to(x.dtype)
        z_full = x.new_empty((step, x.shape[1]))
        dx_full = torch.empty_like(z_full)
        dw_t = weight.new_zeros((x.shape[1], weight.shape[0]), dtype=norm.scale.dtype)
        from_product = self.sums_from_products(x.dtype)
        channels = self.direct_channels(norm) if from_product else ALL_CHANNELS
        sums = _GradientSums(norm, step, -(-x.shape[0] // step), channels)
        apply = _ImmediateGradient(pending.norm, pending.correction, step)
        again = None if rebuild is None else _Rebuilder(rebuild, step, self.pieces)
        for i, (x_tile, d_tile, dy_tile, y_tile) in enumerate(self._tiles(x, d, dz, pending.y)):
            n = x_tile.shape[0]
            z, dx = (z_full, dx_full) if n == step else (z_full[:n], dx_full[:n])
            apply(y_tile, dy_tile, dy_tile)
            _normalize_rectify(x_tile, norm, z)
            if from_product:
                dw_t.addmm_(z.t(), dy_tile)
            elif need_weight:
                dw_t += z.t() @ dy_tile
            torch.mm(dy_tile, weight, out=dx)
            _threshold_backward(dx, z, 0, grad_input=dx)
            _add_scaled(d_tile, dx, norm.scale)
            sums.add(x_tile, dx)
            if again is not None:
                again(i, x_tile)
        s, t = sums.result()
        dw = dw_t.t()
        if from_product:
            t = second_sum(norm, (weight * dw).sum(0), s, t, channels)
        if deferred is not None:
            deferred.add(norm, s, t)
        return (dw if need_weight else None), s, t

    def bn_relu_avg_pool(
        self, x: Tensor, norm: Normalization, shape: tuple[int, ...], out: Tensor
    ) -> None:
        z = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _normalize_rectify(x, norm, z)
        out.copy_(_pool(z, shape))

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
        z = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _normalize_rectify(x, norm, z)
        if pooled is not None:
            pooled.copy_(_pool(z, shape))
        dz = _unpool(dpooled, shape)
        _threshold_backward(dz, z, 0, grad_input=dz)
        _write_scaled(d, dz, norm.scale)
        sums = _GradientSums(norm, x.shape[0], 1, channels)
        sums.add(x, dz)
        return sums.result()

    def bn_relu_global_pool(self, x: Tensor, norm: Normalization, images: int, out: Tensor) -> None:
        positions = x.shape[0] // images
        total = torch.zeros(out.shape, dtype=norm.scale.dtype, device=x.device)
        for group, rows in self.pieces(self._image_tiles(x, images)):
            z = torch.empty(x[rows].shape, dtype=x.dtype, device=x.device)
            _normalize_rectify(x[rows], norm, z)
            n = group.stop - group.start
            total[group] += z.view(n, -1, x.shape[1]).sum(1, dtype=total.dtype)
        out.copy_(total.div_(positions))

    def bn_relu_global_pool_backward(
        self, x: Tensor, norm: Normalization, images: int, dpooled: Tensor, d: Tensor
    ) -> tuple[Tensor, Tensor]:
        positions = x.shape[0] // images
        tiles = list(self._image_tiles(x, images))
        sums = _GradientSums(norm, max(rows.stop - rows.start for _, rows in tiles), len(tiles))
        for group, rows in self.pieces(tiles):
            z = torch.empty(x[rows].shape, dtype=x.dtype, device=x.device)
            _normalize_rectify(x[rows], norm, z)
            n = group.stop - group.start
            share = (dpooled[group] / positions).unsqueeze(1)
            # One image's expansion would stay a view of a single row.
            dz = share.expand(n, z.shape[0] // n, -1).reshape(z.shape).contiguous()
            _threshold_backward(dz, z, 0, grad_input=dz)
            _write_scaled(d[rows], dz, norm.scale)
            sums.add(x[rows], dz)
        return sums.result()

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
        slope = t / -count
        offset = s / -count - slope * mean
        for x_tile, d_tile, out_tile in self._tiles(x, d, out):
            if out.dtype == offset.dtype:
                torch.addcmul(offset, x_tile, slope, out=out_tile)
                out_tile += d_tile
            else:
                affine = torch.addcmul(offset, x_tile.to(offset.dtype), slope)
                out_tile.copy_(affine.add_(d_tile))

    def _image_tiles(self, x: Tensor, images: int) -> Iterator[tuple[slice, slice]]:
        """Tiles of whole images, or of parts of one: (images, rows) for each."""
        positions = x.shape[0] // images
        rows_per_tile = self._tile_rows(x)
        per_tile = max(1, rows_per_tile // positions)
        for first in range(0, images, per_tile):
            group = slice(first, min(images, first + per_tile))
            start, stop = group.start * positions, group.stop * positions
            step = stop - start if per_tile > 1 else rows_per_tile
            for row in range(start, stop, step):
                yield group, slice(row, min(stop, row + step))


class _PartialStatistics:
    """Mean and variance from per-tile means and centred squares (Chan, Golub, LeVeque 1979).

    Centring each tile on its own mean keeps the variance right for channels whose
    mean is much larger than their deviation.
    """

    def __init__(self, tile_rows: int, x: Tensor) -> None:
        self.rows = x.shape[0]
        self.dtype = accumulate_dtype(x.dtype)
        tiles = -(-self.rows // tile_rows)
        self.counts: list[int] = []
        self.means = torch.empty((tiles, x.shape[1]), dtype=self.dtype, device=x.device)
        self.squares = torch.empty_like(self.means)
        self.scratch = self.means.new_empty((tile_rows, x.shape[1]))

    def add(self, tile: Tensor) -> None:
        i, n = len(self.counts), tile.shape[0]
        self.counts.append(n)
        mean = torch.mean(tile, 0, dtype=self.dtype, out=self.means[i])
        centred = torch.sub(tile, mean, out=self.scratch[:n])
        torch.sum(centred.square_(), 0, out=self.squares[i])

    def combine(self, out: Statistics) -> None:
        if len(self.counts) == 1:
            out.mean.copy_(self.means[0])
            torch.div(self.squares[0], self.rows, out=out.var)
            return
        # a simulation leaves tiles out
        means = self.means[: len(self.counts)]
        # filled there: a tensor of these numbers would be copied from the host, which waits
        counts = means.new_full((len(means), 1), self.counts[0])
        counts[-1:].fill_(self.counts[-1])
        mean = (means * counts).sum(0) / self.rows
        between = (means - mean).square_().mul_(counts).sum(0)
        out.mean.copy_(mean)
        torch.div(self.squares.sum(0).add_(between), self.rows, out=out.var)


class _ImmediateGradient:
    """``out <- scale * (dz - (S + T xhat) / count)`` tile by tile; plain scaling if frozen."""

    def __init__(
        self,
        norm: Normalization,
        correction: Correction | None,
        tile_rows: int,
    ) -> None:
        self.scale, self.slope = norm.scale, None
        if correction is not None:
            s, t, count = correction
            # = scale * dz + (slope * x + offset)
            self.slope = norm.scale * norm.rstd * t / -count
            self.offset = norm.scale * s / -count - self.slope * norm.mean
            self.affine = norm.scale.new_empty((tile_rows, norm.scale.shape[0]))

    def __call__(self, x: Tensor, dz: Tensor, out: Tensor) -> None:
        if self.slope is None:
            _write_scaled(out, dz, self.scale)
            return
        affine = self.affine[: x.shape[0]]
        torch.addcmul(self.offset, x.to(self.slope.dtype), self.slope, out=affine)
        if out.dtype == affine.dtype:
            torch.addcmul(affine, dz, self.scale, out=out)
        else:
            out.copy_(affine.addcmul_(dz.to(affine.dtype), self.scale))


class _Rebuilder:
    """Another layer's product from the row tiles of this one's pass."""

    def __init__(
        self, rebuild: Rebuild, tile_rows: int, pieces: Callable[[range], Iterable[int]]
    ) -> None:
        self.norm, weight, out = rebuild
        self.width = weight.shape[1]
        self.weight_t = weight.to(out.dtype).t().contiguous()
        firsts = pieces(range(0, out.shape[0], tile_rows))
        self.out = [out[first : first + tile_rows] for first in firsts]
        self.z = out.new_empty((tile_rows, self.width))

    def __call__(self, i: int, x: Tensor) -> None:
        z = self.z[: x.shape[0]]
        _normalize_rectify(x[:, : self.width], self.norm, z)
        torch.mm(z, self.weight_t, out=self.out[i])


class _GradientSums:
    """S = sum dz and T = sum dz xhat over row tiles of x, dz already masked.

    T is taken for ``channels`` only: a slice, an index, or None for no T at all.
    """

    def __init__(
        self,
        norm: Normalization,
        tile_rows: int,
        tiles: int,
        channels: Channels = ALL_CHANNELS,
    ) -> None:
        self.tiles, self.channels = 0, channels
        self.s = norm.mean.new_empty((tiles, norm.mean.shape[0]))
        if channels is not None:
            self.mean, self.rstd = norm.mean[channels], norm.rstd[channels]
            self.t = self.s.new_empty((self.s.shape[0], self.mean.shape[0]))
            self.scratch = self.s.new_empty((tile_rows, self.mean.shape[0]))

    def add(self, x: Tensor, dz: Tensor) -> None:
        torch.sum(dz, 0, dtype=self.s.dtype, out=self.s[self.tiles])
        if self.channels is not None:
            # Centred before the product: no cancellation where the mean is large.
            centred = self.scratch[: x.shape[0]]
            torch.sub(x[:, self.channels], self.mean, out=centred).mul_(dz[:, self.channels])
            torch.sum(centred, 0, out=self.t[self.tiles])
        self.tiles += 1

    def result(self) -> tuple[Tensor, Tensor]:
        s = self.s.sum(0)
        return s, s.new_empty(0) if self.channels is None else self.t.sum(0) * self.rstd


def _normalize_rectify(x: Tensor, norm: Normalization, out: Tensor) -> None:
    if x.dtype == norm.scale.dtype:
        torch.addcmul(norm.shift, x, norm.scale, out=out).relu_()
    else:
        out.copy_(torch.addcmul(norm.shift, x.to(norm.scale.dtype), norm.scale).relu_())


def _add_scaled(d: Tensor, dz: Tensor, scale: Tensor) -> None:
    if d.dtype == scale.dtype:
        d.addcmul_(dz, scale)
    else:
        d += dz.to(scale.dtype).mul_(scale)


def _write_scaled(d: Tensor, dz: Tensor, scale: Tensor) -> None:
    if d.dtype == scale.dtype:
        torch.mul(dz, scale, out=d)
    else:
        d.copy_(dz.to(scale.dtype).mul_(scale))


def _pool(z: Tensor, shape: tuple[int, ...]) -> Tensor:
    n, *spatial = shape
    # 1-D pools as 2-D of height 1: that has a channels-last layout.
    spatial, window = (
        ([1, *spatial], (1, 2)) if len(spatial) == 1 else (spatial, (2,) * len(spatial))
    )
    if len(window) == 3 and z.dtype.itemsize == 2:
        z = z.float()  # on a CPU there is no avg_pool3d in 16 bits
    return rows_of(_AVG_POOL[len(window) - 2](channels_first(z, n, spatial), window, window))


def _unpool(dpooled: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Each window's gradient, shared out evenly over its positions; zero outside windows."""
    n, *spatial = shape
    channels = dpooled.shape[1]
    share = dpooled / (1 << len(spatial))
    # (n, s1/2, 1, s2/2, 1, ..., c) -> every 1 becomes 2
    inner: list[int] = []
    for size in spatial:
        inner += [size // 2, 1]
    windows = share.view(n, *inner, channels)
    doubled = [2 if i % 2 else size for i, size in enumerate(inner)]
    windows = windows.expand(n, *doubled, channels)
    even = [size // 2 * 2 for size in spatial]
    if even == spatial:
        # A single window's expansion would stay a view of one row.
        return windows.reshape(-1, channels).contiguous()
    full = dpooled.new_zeros((n, *spatial, channels))
    region = full[(slice(None), *(slice(0, size) for size in even))]
    # The region is strided, so it can't be viewed as windows; copy the dense form.
    region.copy_(windows.reshape(n, *even, channels))
    return full.view(-1, channels)
