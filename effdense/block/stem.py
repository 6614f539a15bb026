"""The ImageNet stem: Conv-BN-ReLU-MaxPool, or what of it can be run as one.

NOTE [ what the stem keeps ]
The convolution's output is as large as the first block's features, and would be alive in
that block's backward, the peak of a step. It is made from three channels, by a hundredth of
a step's arithmetic. So where the first block would rather compute again than keep
("features", "input") the stem keeps its images and convolves them again; else it keeps the
convolution's output. There is no whole gradient of that output: batch norm's sums are over
the maxima of the pooling, where alone its gradient isn't zero, so that each few images'
gradient can be finished when it is made, and go through the convolution at once. A
convolution that can't be run without calling it is called, and BN-ReLU-MaxPool keeps its output.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autocast import autocast_dtype, without_autocast
from ..backends.base import Backend, Normalization, Statistics, accumulate_dtype
from ..backends.empty import EmptyBackend
from ..backends.layout import channels_first, channels_last, like_parameter
from ..backends.layout import rows as rows_of
from ..backends.select import get_backend
from ..choices import Save
from ..differentiation import Anchor, first_order
from ..norms.buffers import NormSpec, batch_of, read_norm, update_running_statistics
from ..norms.synchronization import Batch
from ..recognition.objections import BATCH_NORMS, CONVOLUTIONS, has_hooks, module_objection
from ..recognition.reading import read_norm_relu
from ..tracing import outside_graphs, torch_function
from .captured import run_captured

_MAX_POOL: dict[type[nn.Module], Any] = {
    nn.MaxPool1d: F.max_pool1d,
    nn.MaxPool2d: F.max_pool2d,
    nn.MaxPool3d: F.max_pool3d,
}
_MAX_POOL_BACKWARD = (
    torch.ops.aten.max_pool2d_with_indices_backward,
    torch.ops.aten.max_pool3d_with_indices_backward,
)


def run_stem(
    modules: Sequence[nn.Module], x: Tensor, backend: str, save: Save
) -> tuple[Tensor | None, int]:
    """[Conv-]BN-ReLU-MaxPool at the head of ``modules``, and how many they are; else (None, 1).

    ``save`` is what the dense block behind them keeps; see NOTE [ what the stem keeps ].
    """
    at = 1 if type(modules[0]) in CONVOLUTIONS else 0
    norm = modules[at] if len(modules) > at else None
    if not isinstance(norm, BATCH_NORMS) or has_hooks(norm):
        return None, 1
    return _run_stem(x, modules[:at], modules[at:], backend, save)


@torch_function(0)
@outside_graphs
def _run_stem(
    x: Tensor,
    convolution: Sequence[Any],
    modules: Sequence[nn.Module],
    backend: str,
    save: Save,
) -> tuple[Tensor | None, int]:
    found = read_norm_relu(modules)
    if isinstance(found, str) or len(modules) <= found[1]:
        return None, 1
    norm, used = found
    pool = modules[used]
    if type(pool) not in _MAX_POOL or has_hooks(pool) or pool.return_indices:
        return None, 1
    channels = convolution[0].in_channels if convolution else norm.num_features
    if x.dim() != 3 + list(_MAX_POOL).index(type(pool)) or x.shape[1] != channels:
        # torch's own error
        return None, 1
    if not convolution:
        run = partial(_norm_relu_max_pool, norm=norm, pool=pool, backend=backend)
        return run_captured(modules[: used + 1], x, run), used + 1
    (conv,) = convolution
    if not torch.is_grad_enabled() or _objection(conv, x) is not None:
        # called as it is; what follows it may still be run as one
        return None, 1
    run = partial(
        _conv_norm_relu_max_pool, conv=conv, norm=norm, pool=pool, backend=backend, save=save
    )
    return run_captured([conv, *modules[: used + 1]], x, run), used + 2


def _objection(conv: Any, x: Tensor) -> str | None:
    """Why a convolution can't be run without calling it, or None."""
    objection = module_objection("the convolution", conv)
    if objection is not None:
        return objection
    if conv.bias is not None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return "it does more than multiply zero-padded windows"
    weight = conv.weight
    if x.dim() != weight.dim() or x.shape[1] != conv.in_channels or x.device != weight.device:
        return "its input doesn't fit"
    if _compute_dtype(x, weight) is None:
        return "its input is of another type"
    if x.numel() == 0 or min(_output_size(conv, x)) < 1:
        return "it has no output"
    return None


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """What a convolution of x computes in; None for types that torch wouldn't convolve."""
    autocast, double = autocast_dtype(x.device), torch.float64 in (x.dtype, weight.dtype)
    if autocast is not None and not double:
        # as torch's own operations: autocast leaves double alone
        return autocast if x.is_floating_point() else None
    return x.dtype if x.dtype == weight.dtype else None


def _output_size(conv: Any, x: Tensor) -> list[int]:
    sizes = zip(
        x.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True
    )
    return [(n + 2 * pad - gap * (k - 1) - 1) // step + 1 for n, k, step, pad, gap in sizes]


def _norm_relu_max_pool(x: Tensor, norm: nn.Module, pool: Any, backend: str) -> Tensor:
    """MaxPool(relu(norm(x))) for x (N, C, *spatial); moves the norm's running statistics."""
    spec, tensors = read_norm(norm)
    batch = batch_of(x, [spec])
    ops = get_backend(backend, x.device, x.dtype) if x.numel() else EmptyBackend()
    if not spec.batch_statistics and not torch.is_grad_enabled():
        # nothing is kept and no statistics are taken: no second copy of x as a matrix either
        # its rows, z and what pooling takes are in use together, twice each in 3-D
        image_bytes = x.shape[1:].numel() * x.element_size()
        step = ops.images_per_step(x.shape[0], 4 * image_bytes)
        parts = [
            _Stem.apply(ops, batch, spec, pool, None, Anchor(part), part, None, None, *tensors)
            for part in x.split(step)
        ]
        return parts[0][0] if len(parts) == 1 else torch.cat([part[0] for part in parts])
    output, mean, var = _Stem.apply(
        ops, batch, spec, pool, None, Anchor(x), x, None, None, *tensors
    )
    update_running_statistics([norm], [mean], [var], batch.count)
    return output


def _conv_norm_relu_max_pool(
    image: Tensor, conv: Any, norm: nn.Module, pool: Any, backend: str, save: Save
) -> Tensor:
    """MaxPool(relu(norm(conv(image)))) likewise, for a convolution without objection."""
    dtype = _compute_dtype(image, conv.weight)
    assert dtype is not None
    ops = get_backend(backend, image.device, dtype)
    geometry = conv.stride, conv.padding, conv.dilation, False, [0] * len(conv.stride), conv.groups
    convolution = _Convolution(geometry, save in ("features", "input"))
    with torch.no_grad(), without_autocast(image.device):
        x = convolution.forward(image, conv.weight, dtype)
    spec, tensors = read_norm(norm)
    batch = batch_of(x, [spec])
    output, mean, var = _Stem.apply(
        ops, batch, spec, pool, convolution, Anchor(image), x, image, conv.weight, *tensors
    )
    update_running_statistics([norm], [mean], [var], batch.count)
    return output


class _Stem(torch.autograd.Function):
    """BN-ReLU-MaxPool of x, or of what ``convolution`` made of ``image`` and ``weight``."""

    @staticmethod
    def forward(
        ctx: Any,
        ops: Backend,
        batch: Batch,
        spec: NormSpec,
        pool: Any,
        convolution: _Convolution | None,
        anchor: Anchor,
        x: Tensor,
        image: Tensor | None,
        weight: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        frozen_mean: Tensor | None,
        frozen_var: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(x.device):
            rows = rows_of(x)
            dtype = accumulate_dtype(x.dtype)
            if frozen_mean is None or frozen_var is None:
                mean, var = (rows.new_empty(rows.shape[1], dtype=dtype) for _ in range(2))
                ops.statistics(rows, Statistics(mean, var))
                batch.merge(Statistics(mean, var))
            else:
                # copies: the buffers may be changed before backward
                mean, var = frozen_mean.to(dtype, copy=True), frozen_var.to(dtype, copy=True)
            pooling = _Pooling(ops, spec, pool, rows, x.shape, gamma, beta, mean, var)
            output = pooling.forward()
        ctx.ops, ctx.batch, ctx.spec, ctx.pool = ops, batch, spec, pool
        ctx.anchor = anchor
        ctx.convolution, ctx.shape, ctx.dtype = convolution, x.shape, x.dtype
        # See NOTE [ what the stem keeps ].
        again = convolution is not None and convolution.again
        kept = None if again else rows
        kept_image = image if again or any(ctx.needs_input_grad[7:9]) else None
        ctx.save_for_backward(kept, kept_image, weight, gamma, beta, mean, var)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return output, mean, var

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 13
        rows, image, weight, gamma, beta, mean, var = ctx.saved_tensors
        need_x, need_image, need_weight = ctx.needs_input_grad[6:9]
        convolution, dimage, dweight = ctx.convolution, None, None
        with without_autocast(gamma.device):
            if rows is None:
                rows = rows_of(convolution.forward(image, weight, ctx.dtype))
            constants = ctx.ops, ctx.spec, ctx.pool
            pooling = _Pooling(*constants, rows, ctx.shape, gamma, beta, mean, var)
            s, t, pixels, masked = pooling.reduce(grad_output)
            correction = None
            if ctx.spec.batch_statistics:
                correction = (*ctx.batch.sum(s, t), float(ctx.batch.count))
            dx = torch.empty_like(rows) if need_x else None
            if need_x or need_image or need_weight:
                parts = pooling.backward(pixels, masked, correction, dx)
                if convolution is None:
                    deque(parts, maxlen=0)
                else:
                    needs = need_image, need_weight
                    dimage, dweight = convolution.backward(image, weight, parts, needs)
        if dx is not None:
            dx = channels_first(dx, ctx.shape[0], ctx.shape[2:])
        gradients = dx, dimage, dweight, t.to(gamma.dtype), s.to(beta.dtype)
        return *(None,) * 6, *gradients, None, None


class _Convolution(NamedTuple):
    """A convolution without bias."""

    geometry: tuple[Any, ...]
    """Stride, padding, dilation, transposed, output padding, groups."""
    again: bool
    """Instead of keeping its output."""

    def forward(self, image: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, c, *spatial) to (N, C, *spatial), in ``dtype``."""
        # its output takes its input's layout
        image, weight = channels_last(image.to(dtype)), weight.to(dtype)
        return torch.ops.aten.convolution(image, weight, None, *self.geometry)

    def backward(
        self,
        image: Tensor,
        weight: Tensor,
        gradients: Iterable[tuple[slice, Tensor]],
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of image and weight where needed, from those of some images at a time."""
        dimage = torch.empty_like(image) if needs[0] else None
        dweight = None
        for images, dx in gradients:
            part = channels_last(image[images].to(dx.dtype))
            found = torch.ops.aten.convolution_backward(
                dx, part, weight.to(dx.dtype), None, *self.geometry, [*needs, False]
            )
            if dimage is not None:
                dimage[images] = found[0]
            if needs[1]:
                new = found[1].to(accumulate_dtype(dx.dtype))
                dweight = new if dweight is None else dweight.add_(new)
            del part, found
        return dimage, None if dweight is None else like_parameter(dweight, weight)


class _Pooling:
    """One forward or backward, a few images at a time."""

    def __init__(
        self,
        ops: Backend,
        spec: NormSpec,
        pool: Any,
        rows: Tensor,
        shape: torch.Size,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        var: Tensor,
    ) -> None:
        self.ops, self.pool, self.rows = ops, pool, rows
        self.images, self.channels, *self.spatial = shape
        self.norm = Normalization(mean, var, gamma, beta, spec.eps)

    def _steps(self) -> Iterator[tuple[slice, slice]]:
        per_image = math.prod(self.spatial)
        image_bytes = per_image * self.channels * self.rows.element_size()
        step = self.ops.images_per_step(self.images, image_bytes)
        # without images, one step of none: pooling knows the output's shape
        for first in self.ops.pieces(range(0, max(1, self.images), step)):
            last = min(self.images, first + step)
            yield slice(first, last), slice(first * per_image, last * per_image)

    def _rectified(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Relu(norm(x)) of some images, as a matrix and as the (n, C, *spatial) view of it."""
        x = self.rows[rows]
        z = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self.ops.bn_relu(x, self.norm, z)
        return z, channels_first(z, len(z) // math.prod(self.spatial), self.spatial)

    def _max_pool(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Maxima of some images (n, C, *spatial), and the pixels that they are at."""
        pool = self.pool
        return _MAX_POOL[type(pool)](
            z,
            pool.kernel_size,
            pool.stride,
            pool.padding,
            pool.dilation,
            pool.ceil_mode,
            return_indices=True,
        )

    def _max_pool_backward(self, grad: Tensor, x: Tensor, pixels: Tensor) -> Tensor:
        """The gradient of pooling's input, of the shape and layout of x (n, C, *spatial)."""
        pool = self.pool
        window = [pool.kernel_size, pool.stride, pool.padding, pool.dilation]
        if x.dim() > 3:
            backward = _MAX_POOL_BACKWARD[x.dim() - 4]
            return backward(grad, x, *window, pool.ceil_mode, pixels)
        # as on images one pixel high
        high = (1, 1, 0, 1)
        window = [[h, *nn.modules.utils._single(n)] for h, n in zip(high, window, strict=True)]
        grad, x, pixels = grad.unsqueeze(2), x.unsqueeze(2), pixels.unsqueeze(2)
        return _MAX_POOL_BACKWARD[0](grad, x, *window, pool.ceil_mode, pixels).squeeze(2)

    def forward(self) -> Tensor:
        output: Tensor | None = None
        for images, rows in self._steps():
            pooled = self._max_pool(self._rectified(rows)[1])[0].movedim(1, -1)
            if output is None:
                output = pooled.new_empty((self.images, *pooled.shape[1:]))
            output[images] = pooled
        assert output is not None
        return output.movedim(-1, 1)

    def reduce(self, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """S and T; the pixel of each maximum, and its gradient before the ReLU, (N, *pooled, C).

        Pooling's gradient is zero but at the maxima, so sums over these are the whole sums.
        """
        s, t = torch.zeros_like(self.norm.mean), torch.zeros_like(self.norm.mean)
        pixels = masked = None
        for images, rows in self._steps():
            pooled, found = self._max_pool(self._rectified(rows)[1])
            found = found.movedim(1, -1)
            if pixels is None or masked is None:
                size = self.images, *found.shape[1:]
                # no image has 2^31 of them
                pixels = found.new_empty(size, dtype=torch.int32)
                masked = pooled.new_empty(size)
            pixels[images] = found
            by_image = self.rows[rows].view(len(found), math.prod(self.spatial), self.channels)
            maxima = by_image.gather(1, found.flatten(1, -2)).flatten(0, 1)
            grad, z, out = rows_of(grad_output[images]), rows_of(pooled), masked[images]
            sums = self.ops.bn_relu_backward_reduce(maxima, self.norm, grad, z, out.flatten(0, -2))
            del pooled, found, maxima, grad, z  # before the next step's are made
            s += sums[0]
            t += sums[1]
        assert pixels is not None
        assert masked is not None
        return s, t, pixels, masked

    def backward(
        self,
        pixels: Tensor,
        masked: Tensor,
        correction: tuple[Tensor, Tensor, float] | None,
        out: Tensor | None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """The gradient of x, of some images at a time; in ``out`` (P, C) where given."""
        for images, rows in self._steps():
            x, found = self.rows[rows], pixels[images].movedim(-1, 1).to(torch.int64)
            shaped = channels_first(x, len(found), self.spatial)
            dx = rows_of(self._max_pool_backward(masked[images].movedim(-1, 1), shaped, found))
            if out is not None:
                dx = out[rows].copy_(dx)
            self.ops.bn_relu_backward_apply(x, self.norm, dx, correction)
            yield images, channels_first(dx, len(found), self.spatial)
            del dx, found  # before the next step's are made
