"""The layer's 3-wide convolution by torch's own, a few images at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .base import Backend, Normalization
from .layout import channels_first, pieces
from .layout import rows as rows_of
from .norm_sums import ALL_CHANNELS, direct_channels, second_sum, zero_sums


class StepwiseConvolution:
    """The protocol's bn_relu_conv3 and its backward from the backend's other operations."""

    def bn_relu_conv3(
        self: Backend,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        shape: tuple[int, ...],
        out: Tensor,
    ) -> None:
        for images, rows in _image_steps(self, source, shape):
            h = source.new_empty((rows.stop - rows.start, source.shape[1]))
            self.bn_relu(source[rows], norm, h)
            new = rows_of(convolve(channels_first(h, images, shape[1:]), weight))
            out[rows] = new
            del h, new  # before the next step's are made

    def bn_relu_conv3_backward(
        self: Backend,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        dout: Tensor,
        shape: tuple[int, ...],
        need_weight: bool,
        dz: Tensor | None,
        d: Tensor | None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        dw = torch.zeros_like(weight, dtype=norm.scale.dtype) if need_weight else None
        from_product = need_weight and dz is not None and self.sums_from_products(source.dtype)
        channels = direct_channels(norm) if from_product else ALL_CHANNELS
        s, t = zero_sums(norm, channels)
        for images, rows in _image_steps(self, source, shape):
            h = source.new_empty((rows.stop - rows.start, source.shape[1]))
            self.bn_relu(source[rows], norm, h)
            dh, dw_step = convolve_backward(
                channels_first(dout[rows], images, shape[1:]),
                channels_first(h, images, shape[1:]),
                weight,
                need_weight,
            )
            if dw is not None and dw_step is not None:
                dw += dw_step
            del dw_step
            if dz is not None:
                sums = self.bn_relu_backward_reduce(
                    source[rows], norm, rows_of(dh), h, dz[rows], channels
                )
            else:
                assert d is not None
                sums = self.bn_relu_backward_accumulate(source[rows], norm, rows_of(dh), d[rows], h)
            del h, dh  # before the next step's are made
            s += sums[0]
            t += sums[1]
        if dw is not None:
            product = (weight * dw).transpose(0, 1).flatten(1).sum(1)
            t = second_sum(norm, product, s, t, channels)
        return dw, s, t


def _image_steps(
    backend: Backend, source: Tensor, shape: tuple[int, ...]
) -> Iterator[tuple[int, slice]]:
    """(number of images, their rows): (P, B)-wide work is cut at image boundaries."""
    images, per_image = shape[0], source.shape[0] // shape[0]
    step = backend.images_per_step(images, per_image * source.shape[1] * source.element_size())
    for first in pieces(source, range(0, images, step)):
        n = min(step, images - first)
        yield n, slice(first * per_image, (first + n) * per_image)


def convolve(h: Tensor, weight: Tensor) -> Tensor:
    """(n, c, *spatial) to (n, k, *spatial); weight (k, c, 3, ...), stride 1, padding 1, no bias."""
    h, weight, lifted = _lift(h, weight)
    new = torch.ops.aten.convolution(h, weight, None, *_geometry(weight, lifted))
    return new.squeeze(2) if lifted else new


def convolve_backward(
    grad: Tensor, h: Tensor, weight: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of h and, if needed, of weight for the output gradient (n, k, *spatial)."""
    shape = weight.shape
    h, weight, lifted = _lift(h, weight)
    grad = grad.unsqueeze(2) if lifted else grad
    dh, dw, _ = torch.ops.aten.convolution_backward(
        grad, h, weight, None, *_geometry(weight, lifted), [True, need_weight, False]
    )
    if h.is_meta:
        # torch's rule of shapes forgets the layout, which would cost a copy that no device makes
        del dh
        dh = torch.empty_like(h)
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
