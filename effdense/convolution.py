"""The layer's 3-wide convolution and its backward as plain operations, any spatial dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
