"""What a backend must compute for the dense block.

Everything is a matrix of shape (P, c): P positions (batch x pixels) by c channels,
inner stride 1, any row stride, so a prefix of the feature buffer is a view and never
a copy. Per-channel vectors (means, sums, scales) are dense and of the accumulate
type: float64 for float64 matrices, float32 for everything narrower. Symbols are
those of dense_block.py.

Reductions over P must be reproducible: two runs agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Piece = TypeVar("Piece")

KERNEL_ROW_MULTIPLE = 16
"""The kernels' :attr:`Backend.row_multiple`: what Triton proves of a stride, or nothing."""

KERNEL_STEP_BYTES = 128 << 20
"""Bytes of a step's temporaries up to which the kernels' backend takes all images at once."""


class Normalization:
    """One batch norm as a map of its c input channels.

    The normalised value is ``xhat = (x - mean) * rstd`` and the norm's output is
    ``scale * x + shift``, with ``scale = gamma * rstd``, ``shift = beta - mean * scale``.
    These three are derived when first asked for: kernels make them of the other five by
    themselves.

    Args:
        mean, var: statistics (c,), the variance biased, in the accumulate type.
        gamma, beta: parameters (c,), in any type.
        eps: what is added to the variance.
    """

    __slots__ = ("_derived", "beta", "eps", "gamma", "mean", "var")

    def __init__(self, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> None:
        self.mean, self.var, self.gamma, self.beta, self.eps = mean, var, gamma, beta, eps
        self._derived: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def rstd(self) -> Tensor:
        return self._derive()[0]

    @property
    def scale(self) -> Tensor:
        return self._derive()[1]

    @property
    def shift(self) -> Tensor:
        return self._derive()[2]

    def _derive(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._derived is None:
            rstd = torch.rsqrt(self.var + self.eps)
            scale = rstd * self.gamma
            shift = torch.addcmul(self.beta.to(scale.dtype), self.mean, scale, value=-1)
            self._derived = rstd, scale, shift
        return self._derived


class Statistics(NamedTuple):
    """Where an operation leaves mean and biased variance (c,) of what it wrote."""

    mean: Tensor
    var: Tensor


class Deferred(NamedTuple):
    """The deferred correction of c channels: what every reader of them adds to."""

    s: Tensor
    t: Tensor

    def add(self, norm: Normalization, s: Tensor, t: Tensor) -> None:
        """A reader's sums S and T (c,); t in units of 1/x, for norms may differ in eps."""
        self.s.addcmul_(norm.scale, s)
        self.t.addcmul_(norm.scale * norm.rstd, t)


@dataclass(slots=True)
class Unfinished:
    """The gradient of a layer's k new channels, before its deferred correction and dropout.

    It is ``mask * (d - (s + t * (x - mean)) / count)``.
    """

    d: Tensor
    """What their readers left in the gradient buffer, (P, k)."""
    x: Tensor
    """The channels themselves, (P, k)."""
    mean: Tensor
    s: Tensor
    t: Tensor
    """Of the channels, (k,)."""
    count: float
    mask: Tensor | None
    """Of dropout, (P, k)."""
    scratch: Callable[[], Tensor]
    """Gives (P, k) to backends that finish it in memory; the same for every layer."""

    def finish(self, ops: Backend) -> Tensor:
        """The gradient, (P, k), in the scratch matrix."""
        out = self.scratch()
        ops.finish_gradient(self.d, self.x, self.mean, self.s, self.t, self.count, out)
        return out if self.mask is None else out.mul_(self.mask)


Correction = tuple[Tensor, Tensor, float]
"""Sums S and T (c,) of one norm, and the count of positions that they are over."""


class PendingNorm(NamedTuple):
    """Norm2 of a layer, whose input gradient is made within the pass that reads it.

    With ``dz`` (P, B) the gradient before its ReLU, zero where that is closed,
    ``dy = scale * (dz - (S + T yhat) / count)`` for ``correction`` = (S, T, count), and
    without the bracket's second term for None (a frozen norm).
    """

    y: Tensor
    norm: Normalization
    correction: Correction | None


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
    row_multiple: int
    """Rows of the feature and gradient buffers are a multiple of so many elements apart."""

    def pieces(self, cuts: Iterable[Piece]) -> Iterable[Piece]:
        """The pieces in which work is done, one after the other: all of ``cuts``."""
        ...

    def layers(
        self, indices: Iterable[int], total: int, leave_out: Callable[[int], None]
    ) -> Iterable[int]:
        """The layers of a block of ``total`` that work is done for: all of ``indices``.

        A simulation skips some and calls ``leave_out`` for each of these instead.
        """
        ...

    def dropout_mask(self, key: Tensor, p: float, out: Tensor) -> None:
        """The mask of ``key`` (1,) into ``out`` (rows, k), dense, the same bits in every backend.

        As :func:`effdense.backends.dropout.dropout_mask`.
        """
        ...

    def images_per_step(self, images: int, bytes_per_image: int) -> int:
        """How many images to treat at a time where a step's temporaries grow with them.

        Such work is cut at image boundaries: a CPU stays in its cache, a GPU bounds
        temporaries without starving its cores.
        """
        ...

    def statistics(self, x: Tensor, out: Statistics) -> None:
        """Mean and biased variance over the rows of x (P, c), into ``out``; numerically safe."""
        ...

    def bn_relu(self, x: Tensor, norm: Normalization, out: Tensor) -> None:
        """out = relu(scale * x + shift); x, out (P, c)."""
        ...

    def bn_relu_backward_reduce(
        self,
        x: Tensor,
        norm: Normalization,
        dz: Tensor,
        z: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """S = sum dz [z > 0] and T = sum dz [z > 0] xhat over the rows of x (P, c).

        ``dz`` is the gradient after the ReLU. ``out`` (dz itself by default) receives dz
        for bn_relu_backward_apply, masked already or not: masking twice changes nothing.
        ``z`` is ``bn_relu(x)`` where the caller still has it, to spare rebuilding it.
        """
        ...

    def bn_relu_backward_apply(
        self, x: Tensor, norm: Normalization, dz: Tensor, correction: Correction | None
    ) -> None:
        """Immediate input gradient, in place of ``dz``, after bn_relu_backward_reduce saw it.

        ``dz <- scale * (dz [z > 0] - (S + T xhat) / count)`` for ``correction = (S, T, count)``;
        without the bracket's second term when None (a frozen norm).
        """
        ...

    def bn_relu_conv1x1(
        self,
        x: Tensor,
        norm: Normalization,
        weight: Tensor,
        out: Tensor,
        statistics: Statistics | None,
    ) -> None:
        """out = relu(norm(x)) @ weight^T, and its statistics where there is a place for them.

        x (P, c), weight (B, c) in any type, out (P, B) dense.
        """
        ...

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
        """One pass over x: ``d += scale * dx``, dx = (dy @ weight) [z > 0]; returns dW, S, T.

        x, d (P, c) with the same row stride or not; weight (B, c) in any type; dy (P, B) is
        ``pending``'s of ``dz`` (P, B), dense, which may be overwritten. dW (B, c) in the
        accumulate type, None unless ``need_weight``. S and T are added to ``deferred`` where
        given; with ``rebuild``, another layer's product is made from the same rows of x.
        """
        ...

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
        """out = mask * conv(relu(norm(source))), 3 wide in every spatial dimension, zero-padded.

        ``shape`` = (n, *spatial) with n * prod(spatial) = P; source (P, B), weight
        (k, B, 3, ...) in any type, out and mask (P, k). Statistics of out as in bn_relu_conv1x1.
        """
        ...

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
        """Back through bn_relu_conv3 from its output's ``gradient``; returns dW, S, T.

        The gradient before the ReLU goes to ``dz`` (P, B), for bn_relu_conv1x1_backward, or,
        where that is None, times ``scale`` onto ``d`` (P, B). dW in the accumulate type,
        None unless ``need_weight``.
        """
        ...

    def bn_relu_avg_pool_conv1x1(
        self, x: Tensor, norm: Normalization, weight: Tensor, shape: tuple[int, ...], out: Tensor
    ) -> None:
        """Averages of relu(norm(x)) over windows of 2 in every spatial dimension, @ weight^T.

        ``shape`` = (n, *spatial) with n * prod(spatial) = P; x (P, c), weight (b, c) in any
        type; out is dense, (n * prod(s // 2), b). A last odd line of a dimension belongs to no
        window.
        """
        ...

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
        """``d = scale * dz`` (written, not added; zero outside windows); returns dW, S, T.

        dW (b, c) in the accumulate type, None unless ``need_weight``.
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


class WholeWork:
    """A backend that does all of the work there is."""

    def pieces(self, cuts: Iterable[Piece]) -> Iterable[Piece]:
        return cuts

    def layers(
        self, indices: Iterable[int], total: int, leave_out: Callable[[int], None]
    ) -> Iterable[int]:
        return indices
