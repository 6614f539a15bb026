"""Tensors of (N, channels, *spatial) as matrices of positions by channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """(N, c, *spatial) as a (P, c) matrix: a view of a channels-last tensor, else a copy."""
    # not -1, which has no meaning without images
    positions = x.shape[0] * math.prod(x.shape[2:])
    matrix = x.movedim(1, -1).reshape(positions, x.shape[1])
    # One image's pixels can be viewed as columns, which no backend expects.
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """(N, c, *spatial) in the layout whose :func:`rows` is a view, in 2-D and 3-D."""
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last_3d) if x.dim() == 5 else x


def channels_first(matrix: Tensor, images: int, spatial: list[int] | tuple[int, ...]) -> Tensor:
    """A dense (P, c) matrix as an (images, c, *spatial) channels-last view."""
    return matrix.view(images, *spatial, matrix.shape[1]).movedim(-1, 1)


def room(
    like: Tensor, size: tuple[int, ...] | torch.Size, dtype: torch.dtype | None = None
) -> Tensor:
    """Uninitialised memory for (N, c, *spatial) in channels-last order, beside ``like``."""
    images, channels, *spatial = size
    return like.new_empty((images, *spatial, channels), dtype=dtype).movedim(-1, 1)


def channels(start: int, stop: int, width: int, newest_first: bool) -> slice:
    """Features ``start`` to ``stop``, in the order in which they were made, of ``width``.

    ``newest_first``: each layer's stand before those it read, as after ``cat([new, x])``.
    """
    return slice(width - stop, width - start) if newest_first else slice(start, stop)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least ``n``."""
    return -(-n // multiple) * multiple


def readable(parameter: Tensor) -> Tensor:
    """A parameter or buffer as backends read it, by its address: its numbers one after the other.

    Those of a weight wider than 1 may lie in any order. Itself where it is so; a copy, through
    which autograd returns its gradient, of a slice or of a file's transposed matrix.
    """
    if parameter.is_contiguous() or (parameter.dim() > 1 and parameter.shape[-1] > 1):
        return parameter
    return parameter.contiguous()


def like_parameter(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient in its parameter's shape, type and strides, which DDP's buckets have too.

    In the usual strides where the parameter's leave gaps, or overlap.
    """
    if gradient.dtype != parameter.dtype:
        gradient = gradient.to(parameter.dtype)
    if gradient.shape != parameter.shape:
        gradient = gradient.view(parameter.shape)
    if gradient.stride() == parameter.stride():
        return gradient
    if gradient.is_contiguous() and parameter.is_contiguous():
        # the same order of elements: only strides along sizes of 1 differ
        return gradient.as_strided(parameter.shape, parameter.stride())
    found = torch.empty_like(parameter)
    if found.stride() != parameter.stride():
        # parts of something wider: autograd wants their gradients in the usual order
        found = torch.empty_like(parameter, memory_format=torch.contiguous_format)
    return found.copy_(gradient)
