"""What a backend must compute for the dense block.

Everything is a matrix of shape (P, c): P positions (batch x pixels) by c channels,
inner stride 1, any row stride, so a prefix of the feature buffer is a view and never
a copy. Per-channel vectors (means, sums, scales) are dense and of the accumulate
type: float64 for float64 matrices, float32 for everything narrower. Symbols are
those of dense_block.py.

Reductions over P must be reproducible: two runs agree bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

KERNEL_STEP_BYTES = 128 << 20
"""Bytes of a step's temporaries up to which the kernels' backend takes all images at once."""


class Normalization(NamedTuple):
    """One batch norm as a map of its c input channels.

    The normalised value is ``xhat = (x - mean) * rstd`` and the norm's output is
    ``scale * x + shift``, with ``scale = gamma * rstd``, ``shift = beta - mean * scale``.
    """

    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor


class PendingNorm(NamedTuple):
    """A gradient after norm2's ReLU, (P, B), that bn_relu_backward_apply has not seen yet."""

    y: Tensor
    norm: Normalization
    correction: tuple[Tensor, Tensor, float] | None


class Rebuild(NamedTuple):
    """A product bn_relu_conv1x1(x[:, :c'], norm, weight, out) to be made in the same pass.

    ``weight`` (B', c') with c' at most the pass's own width; ``out`` (P, B') may be the
    pending norm's y, whose rows are used up before they are overwritten.
    """

    norm: Normalization
    weight: Tensor
    out: Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics and gradient sums for matrices of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Backend(Protocol):
    """The operations the dense block is written in. ``relu'(0)`` is 0 throughout."""

    name: str

    def sums_from_products(self, dtype: torch.dtype) -> bool:
        """Whether T should come from weight gradients (see norm_sums.py) for this dtype."""
        ...

    def images_per_step(self, images: int, bytes_per_image: int) -> int:
        """How many images to treat at a time where a step's temporaries grow with them.

        Such work is cut at image boundaries: a CPU stays in its cache, a GPU bounds
        temporaries without starving its cores.
        """
        ...

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (c,) and biased variance (c,) over the rows of x (P, c); numerically safe."""
        ...

    def bn_relu(self, x: Tensor, norm: Normalization, out: Tensor) -> None:
        """Out = relu(scale * x + shift); x, out (P, c)."""
        ...

    def bn_relu_backward_reduce(
        self,
        x: Tensor,
        norm: Normalization,
        dz: Tensor,
        z: Tensor | None = None,
        out: Tensor | None = None,
        channels: slice | Tensor | None = slice(None),
    ) -> tuple[Tensor, Tensor]:
        """S = sum dz [z > 0] and T = sum dz [z > 0] xhat over the rows of x (P, c).

        ``dz`` is the gradient after the ReLU. ``out`` (dz itself by default) receives dz
        for bn_relu_backward_apply, masked already or not: masking twice changes nothing.
        ``z`` is ``bn_relu(x)`` where the caller still has it, to spare rebuilding it.
        T is needed for ``channels`` only (a slice, an index or, for none, None); a backend
        with :attr:`sums_from_products` returns just these, in their order.
        """
        ...

    def bn_relu_backward_apply(
        self,
        x: Tensor,
        norm: Normalization,
        dz: Tensor,
        correction: tuple[Tensor, Tensor, float] | None,
    ) -> None:
        """Immediate input gradient, in place of ``dz``, after bn_relu_backward_reduce saw it.

        ``dz <- scale * (dz [z > 0] - (S + T xhat) / count)`` for ``correction = (S, T, count)``;
        without the bracket's second term when None (a frozen norm).
        """
        ...

    def bn_relu_backward_accumulate(
        self, x: Tensor, norm: Normalization, dz: Tensor, d: Tensor, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Deferred input gradient: ``d += scale * dz [z > 0]``; returns S, T as in reduce.

        d is a (P, c) prefix of the gradient buffer. ``dz`` may be overwritten.
        """
        ...

    def bn_relu_conv1x1(
        self, x: Tensor, norm: Normalization, weight: Tensor, out: Tensor, statistics: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Out = relu(norm(x)) @ weight^T; x (P, c), weight (B, c), out (P, B) dense.

        Returns out's mean and biased variance, each (B,), when ``statistics``.
        """
        ...

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
        """One pass over x: ``d += scale * dz``, dz = (dy @ weight) [z > 0]; returns dW, S, T.

        x, d (P, c) with the same row stride or not; dy (P, B) dense; weight (B, c).
        dW (B, c) in the accumulate type, None unless ``need_weight``. With ``pending``, dy
        is first put through its bn_relu_backward_apply (and may be overwritten); with
        ``rebuild``, another layer's product is made from the same rows of x.
        """
        ...

    def bn_relu_conv3(
        self,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        shape: tuple[int, ...],
        out: Tensor,
    ) -> None:
        """Out = conv(relu(norm(source))), 3 wide in every spatial dimension, zero-padded.

        ``shape`` = (n, *spatial) with n * prod(spatial) = P; source (P, B), weight
        (k, B, 3, ...), out (P, k).
        """
        ...

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
        """Back through bn_relu_conv3 for dout (P, k) dense; returns dW, S, T.

        The gradient after the ReLU goes to ``dz`` (P, B) for bn_relu_backward_apply, or,
        where that is None, times ``scale`` onto ``d`` (P, B). dW in the accumulate type,
        None unless ``need_weight``.
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
        channels: slice | Tensor | None = slice(None),
    ) -> tuple[Tensor, Tensor]:
        """``d = scale * dz`` (written, not added; zero outside windows); returns S, T.

        T of ``channels`` as in bn_relu_backward_reduce. Rebuilds
        ``bn_relu_avg_pool(x)`` into ``pooled`` where given, in the same pass.
        """
        ...

    def bn_relu_global_pool(self, x: Tensor, norm: Normalization, images: int, out: Tensor) -> None:
        """Mean of relu(norm(x)) over each image's positions; out (images, c)."""
        ...

    def bn_relu_global_pool_backward(
        self, x: Tensor, norm: Normalization, images: int, dpooled: Tensor, d: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``d = scale * dz`` (written, not added); returns S, T."""
        ...

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
        """The deferred correction: ``out = d - (s + t * (x - mean)) / count``; d, x, out (P, c).

        t is in units of 1/x (the block adds ``scale * T * rstd`` per layer), so that norms
        with different eps share one vector.
        """
        ...
