"""A layer's 3-wide convolution and a block's transition from simpler operations.

The convolution is torch's own. Both go a few images at a time: what they make on the way is
as wide as the bottleneck or the whole block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from .base import Backend, Normalization, Statistics, Unfinished, WholeWork
from .layout import channels_first, round_up
from .layout import rows as rows_of
from .norm_sums import ALL_CHANNELS, Channels, direct_channels, second_sum


class Pieces(Backend, Protocol):
    """What :class:`Stepwise` asks of a backend beside its protocol.

    A backend that takes T from weight gradients (see norm_sums.py) returns T of ``channels``
    alone where an operation has the argument: a slice, an index or, for none, None.
    """

    def sums_from_products(self, dtype: torch.dtype) -> bool:
        """Whether T should come from weight gradients for this dtype."""
        ...

    def direct_channels(self, norm: Normalization) -> Channels:
        """The channels for which it should not."""
        ...

    def bn_relu_backward_reduce(
        self,
        x: Tensor,
        norm: Normalization,
        dz: Tensor,
        z: Tensor | None = None,
        out: Tensor | None = None,
        channels: Channels = ALL_CHANNELS,
    ) -> tuple[Tensor, Tensor]: ...

    def bn_relu_backward_accumulate(
        self, x: Tensor, norm: Normalization, dz: Tensor, d: Tensor, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Deferred input gradient: ``d += scale * dz [z > 0]``; returns S, T as in reduce.

        d is a (P, c) prefix of the gradient buffer. ``dz`` may be overwritten.
        """
        ...

    def bn_relu_avg_pool(
        self, x: Tensor, norm: Normalization, shape: tuple[int, ...], out: Tensor
    ) -> None:
        """Average of relu(norm(x)) over windows of 2 in every spatial dimension.

        ``shape`` = (n, *spatial) with n * prod(spatial) = P; out is dense,
        (n * prod(s // 2), c). A last odd line of a dimension belongs to no window.
        """
        ...

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
        """``d = scale * dz`` (written, not added; zero outside windows); returns S, T.

        Rebuilds ``bn_relu_avg_pool(x)`` into ``pooled`` where given, in the same pass.
        """
        ...

    def convolve(
        self,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        shape: tuple[int, ...],
        out: Tensor,
    ) -> None:
        """bn_relu_conv3 without mask and statistics."""
        ...

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
        """bn_relu_conv3_backward for a gradient (P, k) that is finished and dense."""
        ...


class Stepwise(WholeWork):
    """The protocol's composite operations; a mixin for backends that have the simple ones."""

    row_multiple = 1

    def direct_channels(self, norm: Normalization) -> Channels:
        return direct_channels(norm)

    def bn_relu_conv3(
        self: Pieces,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        shape: tuple[int, ...],
        out: Tensor,
        mask: Tensor | None,
        statistics: Statistics | None,
    ) -> None:
        self.convolve(source, norm, weight.to(source.dtype), shape, out)
        if mask is not None:
            out *= mask
        if statistics is not None:
            self.statistics(out, statistics)

    def bn_relu_conv3_backward(
        self: Pieces,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        gradient: Unfinished,
        shape: tuple[int, ...],
        need_weight: bool,
        dz: Tensor | None,
        d: Tensor | None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        weight, dout = weight.to(source.dtype), gradient.finish(self)
        return self.convolve_backward(source, norm, weight, dout, shape, need_weight, dz, d)

    def convolve(
        self: Pieces,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        shape: tuple[int, ...],
        out: Tensor,
    ) -> None:
        for images, rows in _image_steps(self, source, shape):
            h = source.new_empty((rows.stop - rows.start, source.shape[1]))
            self.bn_relu(source[rows], norm, h)
            new = rows_of(_convolution(channels_first(h, images, shape[1:]), weight))
            out[rows] = new
            del h, new  # before the next step's are made

    def convolve_backward(
        self: Pieces,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        dout: Tensor,
        shape: tuple[int, ...],
        need_weight: bool,
        dz: Tensor | None,
        d: Tensor | None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        from_product = need_weight and dz is not None and self.sums_from_products(source.dtype)
        channels = self.direct_channels(norm) if from_product else ALL_CHANNELS
        total = Total(norm.mean.dtype)
        for images, rows in _image_steps(self, source, shape):
            h = source.new_empty((rows.stop - rows.start, source.shape[1]))
            self.bn_relu(source[rows], norm, h)
            dh, dw = _convolution_backward(
                channels_first(dout[rows], images, shape[1:]),
                channels_first(h, images, shape[1:]),
                weight,
                need_weight,
            )
            if dz is not None:
                sums = self.bn_relu_backward_reduce(
                    source[rows], norm, rows_of(dh), h, dz[rows], channels
                )
            else:
                assert d is not None
                sums = self.bn_relu_backward_accumulate(source[rows], norm, rows_of(dh), d[rows], h)
            del h, dh  # before the next step's are made
            total.add(dw, *sums)
            del dw
        dw, s, t = total.result()
        if from_product and dw is not None:
            product = (weight * dw).transpose(0, 1).flatten(1).sum(1)
            t = second_sum(norm, product, s, t, channels)
        return dw, s, t

    def bn_relu_avg_pool_conv1x1(
        self: Pieces,
        x: Tensor,
        norm: Normalization,
        weight: Tensor,
        shape: tuple[int, ...],
        out: Tensor,
    ) -> None:
        weight = weight.to(x.dtype)
        for rows, pooled_rows, part in _window_steps(self, x, shape):
            # A 1x1 convolution commutes with average pooling: pool first, a quarter of the product.
            pooled = _room(self, x, pooled_rows)
            self.bn_relu_avg_pool(x[rows], norm, part, pooled)
            torch.mm(pooled, weight.t(), out=out[pooled_rows])
            del pooled  # before the next step's is made

    def bn_relu_avg_pool_conv1x1_backward(
        self: Pieces,
        x: Tensor,
        norm: Normalization,
        weight: Tensor,
        shape: tuple[int, ...],
        dout: Tensor,
        d: Tensor,
        need_weight: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        weight = weight.to(x.dtype)
        from_product = need_weight and self.sums_from_products(x.dtype)
        channels = self.direct_channels(norm) if from_product else ALL_CHANNELS
        total = Total(norm.mean.dtype)
        dw: Tensor | None = None
        for rows, pooled_rows, part in _window_steps(self, x, shape):
            dpooled = torch.mm(dout[pooled_rows], weight, out=_room(self, x, pooled_rows))
            pooled = _room(self, x, pooled_rows) if need_weight else None
            sums = self.bn_relu_avg_pool_backward(
                x[rows], norm, part, dpooled, d[rows], pooled, channels
            )
            total.add(None, *sums)
            if pooled is not None:
                dw = _with_product(dw, dout[pooled_rows].t(), pooled, norm.mean.dtype)
            del dpooled, pooled  # before the next step's are made
        _, s, t = total.result()
        if from_product and dw is not None:
            t = second_sum(norm, _sum_of_products(weight, dw), s, t, channels)
        return dw, s, t


class Total:
    """A weight gradient and S and T over steps, added up in place in what the first one made."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._parts: list[Tensor | None] = []

    def add(self, *parts: Tensor | None) -> None:
        if not self._parts:
            self._parts = [None if part is None else part.to(self._dtype) for part in parts]
            return
        for total, part in zip(self._parts, parts, strict=True):
            if total is not None and part is not None:
                total += part

    def result(self) -> tuple[Tensor | None, Tensor, Tensor]:
        dw, s, t = self._parts
        assert s is not None
        assert t is not None
        return dw, s, t


def _with_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b in ``dtype``, in place: without a second matrix of that size where possible."""
    if total is None:
        return (a @ b).to(dtype)
    return total.addmm_(a, b) if b.dtype == dtype else total.add_(a @ b)


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """(columns,), over the rows of a * b, of which no more than a MiB is made at once."""
    step = max(1, (1 << 18) // max(1, a.shape[1]))
    total = (a[:step] * b[:step]).sum(0)
    for first in range(step, a.shape[0], step):
        total += (a[first : first + step] * b[first : first + step]).sum(0)
    return total


def _room(backend: Backend, x: Tensor, rows: slice) -> Tensor:
    """For ``rows`` of x's columns, as far apart as the backend wants them."""
    columns = round_up(x.shape[1], backend.row_multiple)
    return x.new_empty((rows.stop - rows.start, columns))[:, : x.shape[1]]


def _image_steps(
    backend: Backend, source: Tensor, shape: tuple[int, ...]
) -> Iterator[tuple[int, slice]]:
    """(number of images, their rows): (P, B)-wide work is cut at image boundaries."""
    images, per_image = shape[0], source.shape[0] // shape[0]
    step = backend.images_per_step(images, per_image * source.shape[1] * source.element_size())
    for first in backend.pieces(range(0, images, step)):
        n = min(step, images - first)
        yield n, slice(first * per_image, (first + n) * per_image)


def _window_steps(
    backend: Backend, x: Tensor, shape: tuple[int, ...]
) -> Iterator[tuple[slice, slice, tuple[int, ...]]]:
    """Slabs of whole images, or of pairs of an image's lines where images are large.

    Yields (rows, pooled rows, (n, *spatial) of the slab). Windows never cross a slab; an
    image's last odd line goes with its last slab.
    """
    images, lines, *rest = shape
    line, pooled_line = math.prod(rest), math.prod(size // 2 for size in rest)
    pairs = lines // 2
    pair_bytes = 2 * line * x.shape[1] * x.element_size()
    # x, z, dz and d of a slab are in use together
    step = backend.images_per_step(images * pairs, 4 * pair_bytes)
    if step >= pairs:
        n = step // pairs
        for first in backend.pieces(range(0, images, n)):
            last = min(images, first + n)
            yield (
                slice(first * lines * line, last * lines * line),
                slice(first * pairs * pooled_line, last * pairs * pooled_line),
                (last - first, *shape[1:]),
            )
        return
    for image in backend.pieces(range(images)):
        for pair in backend.pieces(range(0, pairs, step)):
            stop = min(pairs, pair + step)
            top, bottom = 2 * pair, lines if stop == pairs else 2 * stop
            yield (
                slice((image * lines + top) * line, (image * lines + bottom) * line),
                slice((image * pairs + pair) * pooled_line, (image * pairs + stop) * pooled_line),
                (1, bottom - top, *rest),
            )


def _convolution(h: Tensor, weight: Tensor) -> Tensor:
    """(n, c, *spatial) to (n, k, *spatial); weight (k, c, 3, ...), stride 1, padding 1, no bias."""
    h, weight, lifted = _lift(h, weight)
    new = torch.ops.aten.convolution(h, weight, None, *_geometry(weight, lifted))
    return new.squeeze(2) if lifted else new


def _convolution_backward(
    grad: Tensor, h: Tensor, weight: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of h and, if needed, of weight for the output gradient (n, k, *spatial)."""
    shape = weight.shape
    h, weight, lifted = _lift(h, weight)
    grad = grad.unsqueeze(2) if lifted else grad
    dh, dw, _ = torch.ops.aten.convolution_backward(
        grad, h, weight, None, *_geometry(weight, lifted), [True, need_weight, False]
    )
    return dh.squeeze(2) if lifted else dh, None if dw is None else dw.view(shape)


def _lift(h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, bool]:
    """1-D convolutions run as 2-D ones of height 1: those have a channels-last layout."""
    if h.dim() == 3:
        return h.unsqueeze(2), weight.unsqueeze(2), True
    return h, weight, False


def _geometry(weight: Tensor, lifted: bool) -> tuple[Any, ...]:
    """Stride, padding, dilation, transposed, output padding, groups."""
    dims = weight.dim() - 2
    padding = [0, 1] if lifted else [1] * dims
    return [1] * dims, padding, [1] * dims, False, [0] * dims, 1
