"""Tensors of (N, channels, *spatial) as matrices of positions by channels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

_Piece = TypeVar("_Piece")

# Whether meta tensors are to go through operations of every shape there is, not only of the
# largest: where a library keeps something for each (timeline.py).
every_shape: ContextVar[bool] = ContextVar("every_shape", default=False)


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


def neighbour_stands_for(of: Tensor, layer: int, layers: int) -> bool:
    """Whether the work of a block's layer can be left out, but for what it leaves behind.

    On meta tensors, and in deep blocks, where a layer's temporaries are between those of
    the layers around it, up to the rounding of tiles.
    """
    if not of.is_meta or every_shape.get():
        return False
    return layers >= 32 and 2 <= layer < layers - 2 and layer % (layers // 8) != 0


def pieces(of: Tensor, cuts: Iterable[_Piece]) -> Iterator[_Piece]:
    """The pieces in which work on ``of`` is done, one after the other.

    On meta tensors, which have shapes and no values, the first stands for all: none is
    larger, and each takes its memory after the one before has given it back. The last may
    be smaller.
    """
    if not of.is_meta:
        return iter(cuts)
    if not every_shape.get():
        return islice(cuts, 1)
    first, *rest = cuts
    return iter([first, *rest[-1:]])


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least ``n``."""
    return -(-n // multiple) * multiple
