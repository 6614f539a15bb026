"""The block's operations for matrices without rows, the share of a process without images.

It takes part in every collective of synchronised norms (see synchronization.py) with sums
and statistics of zero, so that the block's algorithm needs no second form for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import (
    Correction,
    Deferred,
    Normalization,
    PendingNorm,
    Rebuild,
    Statistics,
    Unfinished,
    WholeWork,
)


class EmptyBackend(WholeWork):
    """Implements :class:`effdense.backends.base.Backend` where P = 0."""

    name = "empty"
    row_multiple = 1

    def dropout_mask(self, key: Tensor, p: float, out: Tensor) -> None:
        pass

    def images_per_step(self, images: int, bytes_per_image: int) -> int:
        return 1

    def statistics(self, x: Tensor, out: Statistics) -> None:
        out.mean.zero_()
        out.var.zero_()

    def bn_relu(self, x: Tensor, norm: Normalization, out: Tensor) -> None:
        pass

    def bn_relu_backward_reduce(
        self,
        x: Tensor,
        norm: Normalization,
        dz: Tensor,
        z: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return _zero_sums(norm)

    def bn_relu_backward_apply(
        self, x: Tensor, norm: Normalization, dz: Tensor, correction: Correction | None
    ) -> None:
        pass

    def bn_relu_conv1x1(
        self,
        x: Tensor,
        norm: Normalization,
        weight: Tensor,
        out: Tensor,
        statistics: Statistics | None,
    ) -> None:
        if statistics is not None:
            self.statistics(out, statistics)

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
        return _zero_gradient(weight, norm, need_weight), *_zero_sums(norm)

    def bn_relu_conv3(
        self,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        shape: tuple[int, ...],
        out: Tensor,
        mask: Tensor | None,
        statistics: Statistics | None,
    ) -> None:
        if statistics is not None:
            self.statistics(out, statistics)

    def bn_relu_conv3_backward(
        self,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        gradient: Unfinished,
        shape: tuple[int, ...],
        need_weight: bool,
        dz: Tensor | None,
        d: Tensor | None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        return _zero_gradient(weight, norm, need_weight), *_zero_sums(norm)

    def bn_relu_avg_pool_conv1x1(
        self, x: Tensor, norm: Normalization, weight: Tensor, shape: tuple[int, ...], out: Tensor
    ) -> None:
        pass

    def bn_relu_avg_pool_conv1x1_backward(
        self,
        x: Tensor,
        norm: Normalization,
        weight: Tensor,
        shape: tuple[int, ...],
        dout: Tensor,
        d: Tensor,
        need_weight: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        return _zero_gradient(weight, norm, need_weight), *_zero_sums(norm)

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
