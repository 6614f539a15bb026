"""Tensors of (N, channels, *spatial) as matrices of positions by channels."""

from __future__ import annotations

from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """(N, c, *spatial) as a (P, c) matrix: a view of a channels-last tensor, else a copy."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def channels_first(matrix: Tensor, images: int, spatial: list[int] | tuple[int, ...]) -> Tensor:
    """A dense (P, c) matrix as an (images, c, *spatial) channels-last view."""
    return matrix.view(images, *spatial, matrix.shape[1]).movedim(-1, 1)
