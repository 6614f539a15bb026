"""The block's operations for matrices without rows, the share of a process without images.

It takes part in every collective of synchronised norms (see synchronization.py) with sums
and statistics of zero, so that the block's algorithm needs no second form for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Normalization, PendingNorm, Rebuild, accumulate_dtype


class EmptyBackend:
    """Implements :class:`effdense.backends.base.Backend` where P = 0."""

    name = "empty"

    def sums_from_products(self, dtype: torch.dtype) -> bool:
        return False

    def images_per_step(self, images: int, bytes_per_image: int) -> int:
        return 1

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.new_zeros(x.shape[1], dtype=accumulate_dtype(x.dtype))
        return mean, torch.zeros_like(mean)

    def bn_relu(self, x: Tensor, norm: Normalization, out: Tensor) -> None:
        pass

    def bn_relu_backward_reduce(
        self,
        x: Tensor,
        norm: Normalization,
        dz: Tensor,
        z: Tensor | None = None,
        out: Tensor | None = None,
        channels: slice | Tensor | None = slice(None),
    ) -> tuple[Tensor, Tensor]:
        return _zero_sums(norm)

    def bn_relu_backward_apply(
        self,
        x: Tensor,
        norm: Normalization,
        dz: Tensor,
        correction: tuple[Tensor, Tensor, float] | None,
    ) -> None:
        pass

    def bn_relu_backward_accumulate(
        self, x: Tensor, norm: Normalization, dz: Tensor, d: Tensor, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return _zero_sums(norm)

    def bn_relu_conv1x1(
        self, x: Tensor, norm: Normalization, weight: Tensor, out: Tensor, statistics: bool
    ) -> tuple[Tensor, Tensor] | None:
        return self.statistics(out) if statistics else None

    def bn_relu_conv1x1_backward(
        self,
        x: Tensor,
        norm: Normalization,
        weight: Tensor,
        dy: Tensor,
        d: Tensor,
        need_weight: bool,
        pending: PendingNorm | None = None,
        rebuild: Rebuild | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        return _zero_gradient(weight, norm, need_weight), *_zero_sums(norm)

    def bn_relu_conv3(
        self,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        shape: tuple[int, ...],
        out: Tensor,
    ) -> None:
        pass

    def bn_relu_conv3_backward(
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
        return _zero_gradient(weight, norm, need_weight), *_zero_sums(norm)

    def bn_relu_avg_pool(
        self, x: Tensor, norm: Normalization, shape: tuple[int, ...], out: Tensor
    ) -> None:
        pass

    def bn_relu_avg_pool_backward(
        self,
        x: Tensor,
        norm: Normalization,
        shape: tuple[int, ...],
        dpooled: Tensor,
        d: Tensor,
        pooled: Tensor | None,
        channels: slice | Tensor | None = slice(None),
    ) -> tuple[Tensor, Tensor]:
        return _zero_sums(norm)

    def bn_relu_global_pool(self, x: Tensor, norm: Normalization, images: int, out: Tensor) -> None:
        pass

    def bn_relu_global_pool_backward(
        self, x: Tensor, norm: Normalization, images: int, dpooled: Tensor, d: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _zero_sums(norm)

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
        pass


def _zero_sums(norm: Normalization) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(norm.mean), torch.zeros_like(norm.mean)


def _zero_gradient(weight: Tensor, norm: Normalization, needed: bool) -> Tensor | None:
    return torch.zeros_like(weight, dtype=norm.mean.dtype) if needed else None
