"""The ImageNet stem's BN-ReLU-MaxPool, keeping only its input for backward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import without_autocast
from .backends.base import Backend, accumulate_dtype
from .backends.empty import EmptyBackend
from .backends.select import get_backend
from .eligibility import BATCH_NORMS, has_hooks
from .layout import channels_first, pieces
from .layout import rows as rows_of
from .norms import NormSpec, batch_of, normalization, read_norm, update_running_statistics
from .recognition import read_norm_relu
from .synchronization import Batch
from .tracing import outside_graphs

_MAX_POOL = {nn.MaxPool1d: F.max_pool1d, nn.MaxPool2d: F.max_pool2d, nn.MaxPool3d: F.max_pool3d}


def run_stem(modules: Sequence[nn.Module], x: Tensor, backend: str) -> tuple[Tensor | None, int]:
    """BN-ReLU-MaxPool at the head of ``modules``, and how many they are; (None, 1) for others."""
    if not isinstance(modules[0], BATCH_NORMS) or has_hooks(modules[0]):
        return None, 1
    return _run_stem(modules, x, backend)


@outside_graphs
def _run_stem(modules: Sequence[nn.Module], x: Tensor, backend: str) -> tuple[Tensor | None, int]:
    found = read_norm_relu(modules)
    if isinstance(found, str) or len(modules) <= found[1]:
        return None, 1
    norm, used = found
    pool = modules[used]
    if type(pool) not in _MAX_POOL or has_hooks(pool) or pool.return_indices:
        return None, 1
    return norm_relu_max_pool(x, norm, pool, backend), used + 1


def norm_relu_max_pool(x: Tensor, norm: nn.Module, pool: Any, backend: str) -> Tensor:
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
            _NormReluMaxPool.apply(ops, batch, spec, pool, part, *tensors) for part in x.split(step)
        ]
        return parts[0][0] if len(parts) == 1 else torch.cat([part[0] for part in parts])
    output, mean, var = _NormReluMaxPool.apply(ops, batch, spec, pool, x, *tensors)
    update_running_statistics([norm], [mean], [var], batch.count)
    return output


class _NormReluMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: Backend,
        batch: Batch,
        spec: NormSpec,
        pool: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        frozen_mean: Tensor | None,
        frozen_var: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(x.device):
            rows = rows_of(x)
            dtype = accumulate_dtype(x.dtype)
            if frozen_mean is None or frozen_var is None:
                mean, var = batch.merge(*ops.statistics(rows))
            else:
                # copies: the buffers may be changed before backward
                mean, var = frozen_mean.to(dtype, copy=True), frozen_var.to(dtype, copy=True)
            stage = _Stem(ops, batch, spec, pool, rows, x.shape, gamma, beta, mean, var)
            output = stage.forward()
        ctx.ops, ctx.batch, ctx.spec, ctx.pool, ctx.shape = ops, batch, spec, pool, x.shape
        ctx.save_for_backward(rows, gamma, beta, mean, var)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return output, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 9
        rows, gamma, beta, mean, var = ctx.saved_tensors
        with without_autocast(rows.device):
            constants = ctx.ops, ctx.batch, ctx.spec, ctx.pool
            stem = _Stem(*constants, rows, ctx.shape, gamma, beta, mean, var)
            dx, dgamma, dbeta = stem.backward(grad_output)
        return *(None,) * 4, dx, dgamma.to(gamma.dtype), dbeta.to(beta.dtype), None, None


class _Stem:
    """One forward or backward, a few images at a time."""

    def __init__(
        self,
        ops: Backend,
        batch: Batch,
        spec: NormSpec,
        pool: Any,
        rows: Tensor,
        shape: torch.Size,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        var: Tensor,
    ) -> None:
        self.ops, self.batch, self.spec, self.pool, self.rows = ops, batch, spec, pool, rows
        self.images, self.channels, *self.spatial = shape
        self.norm = normalization(spec.eps, gamma, beta, mean, var)

    def _steps(self) -> Iterator[tuple[slice, slice]]:
        per_image = math.prod(self.spatial)
        image_bytes = per_image * self.channels * self.rows.element_size()
        step = self.ops.images_per_step(self.images, image_bytes)
        # without images, one step of none: pooling knows the output's shape
        for first in pieces(self.rows, range(0, max(1, self.images), step)):
            last = min(self.images, first + step)
            yield slice(first, last), slice(first * per_image, last * per_image)

    def _rectified(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Relu(norm(x)) of some images, as a matrix and as the (n, C, *spatial) view of it."""
        x = self.rows[rows]
        z = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self.ops.bn_relu(x, self.norm, z)
        return z, channels_first(z, len(z) // math.prod(self.spatial), self.spatial)

    def _max_pool(self, z: Tensor) -> Tensor:
        pool = self.pool
        return _MAX_POOL[type(pool)](
            z, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
        )

    def forward(self) -> Tensor:
        output: Tensor | None = None
        for images, rows in self._steps():
            pooled = self._max_pool(self._rectified(rows)[1]).movedim(1, -1)
            if output is None:
                output = pooled.new_empty((self.images, *pooled.shape[1:]))
            output[images] = pooled
        assert output is not None
        return output.movedim(-1, 1)

    def backward(self, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dx = torch.empty_like(self.rows)
        s, t = torch.zeros_like(self.norm.mean), torch.zeros_like(self.norm.mean)
        for images, rows in self._steps():
            z, z_view = self._rectified(rows)
            with torch.enable_grad():
                z_leaf = z_view.detach().requires_grad_()
                pooled = self._max_pool(z_leaf)
            (dz,) = torch.autograd.grad(pooled, z_leaf, grad_output[images])
            dx[rows] = rows_of(dz)
            sums = self.ops.bn_relu_backward_reduce(self.rows[rows], self.norm, dx[rows], z)
            s += sums[0]
            t += sums[1]
        correction = None
        if self.spec.batch_statistics:
            correction = (*self.batch.sum(s, t), float(self.batch.count))
        self.ops.bn_relu_backward_apply(self.rows, self.norm, dx, correction)
        return channels_first(dx, self.images, self.spatial), t, s
