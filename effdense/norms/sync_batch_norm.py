"""Synchronised batch norm as a module, over any process group and on any device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..backends.base import Statistics, accumulate_dtype
from ..differentiation import Anchor, first_order
from ..tracing import outside_graphs
from .buffers import batch_of, read_norm, update_running_statistics
from .synchronization import Batch


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """``torch.nn.SyncBatchNorm`` that runs over gloo and on CPUs too.

    torch's refuses tensors that are not on a GPU, and DistributedDataParallel refuses to wrap
    it there. Arguments, state and meaning are torch's. Dense blocks, transitions, the last
    norm and the ImageNet stem run fused with either; alone it keeps its input for backward.

    Raises:
        ValueError: in training, for a single value per channel in all processes together.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        self.process_group = process_group

    @staticmethod
    def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
        """``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, to norms of this class.

        Parameters and buffers stay the same tensors; what it can't replace in place is returned
        anew. ``process_group`` None stands for all processes.
        """
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        for each in module.modules():
            if type(each) is nn.SyncBatchNorm:
                each.__class__ = SyncBatchNorm  # type: ignore[assignment]
        return module

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor) -> Tensor:
        return sync_batch_norm(input, self)


@outside_graphs
def sync_batch_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """What a synchronising norm, torch's or this package's, makes of x (N, C, *spatial)."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    spec, (weight, bias, *_) = read_norm(norm)
    if spec.group is None:
        return nn.modules.batchnorm._BatchNorm.forward(norm, x)
    norm._check_input_dim(x)
    batch = batch_of(x, [spec])
    output, mean, var = _SyncBatchNorm.apply(batch, spec.eps, Anchor(x), x, weight, bias)
    update_running_statistics([norm], [mean], [var], batch.count)
    return output


def refuse_torchs(modules: Iterable[nn.Module], *inputs: Any) -> None:
    """Raise where ``modules`` one by one would end in torch's SyncBatchNorm on a CPU.

    Args:
        modules: what is to be called.
        inputs: what it is called with, tensors or not.

    Raises:
        ValueError: with what to do.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if not any(isinstance(x, Tensor) and x.device.type == "cpu" for x in inputs):
        return
    if any(type(module) is nn.SyncBatchNorm and module.training for module in modules):
        raise ValueError(
            "layer by layer, torch's SyncBatchNorm does not run on a CPU: let blocks run fused "
            '(save other than "all", nothing hooked inside), or convert the norms with '
            "effdense.SyncBatchNorm.convert_sync_batchnorm(model)"
        )


class _SyncBatchNorm(torch.autograd.Function):
    """``apply(batch, eps, anchor, x, weight, bias)``: (output, mean, var), the latter two (C,)."""

    @staticmethod
    def forward(
        ctx: Any,
        batch: Batch,
        eps: float,
        anchor: Anchor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims = [0, *range(2, x.dim())]
        wide = x.to(accumulate_dtype(x.dtype))
        if x.numel():
            var, mean = torch.var_mean(wide, dims, correction=0)
        else:
            mean = wide.new_zeros(x.shape[1])
            var = torch.zeros_like(mean)
        batch.merge(Statistics(mean, var))
        rstd = torch.rsqrt(var + eps)
        output = (wide - _wide(mean, x)) * _wide(rstd, x)
        if weight is not None:
            output *= _wide(weight, x)
        if bias is not None:
            output += _wide(bias, x)
        ctx.batch, ctx.anchor = batch, anchor
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return output.to(x.dtype), mean, var

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 6
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dims = [0, *range(2, x.dim())]
        xhat = (x - _wide(mean, x)) * _wide(rstd, x)
        dy = grad_output.to(mean.dtype)
        s, t = dy.sum(dims), (dy * xhat).sum(dims)
        dx = None
        if ctx.needs_input_grad[3]:
            # See NOTE [ synchronised batch norm ].
            all_s, all_t = ctx.batch.sum(s, t)
            dx = dy - (_wide(all_s, x) + xhat * _wide(all_t, x)) / ctx.batch.count
            dx *= _wide(rstd if weight is None else rstd * weight, x)
            dx = dx.to(x.dtype)
        dweight = None if weight is None else t.to(weight.dtype)
        return None, None, None, dx, dweight, None if bias is None else s.to(bias.dtype)


def _wide(vector: Tensor, x: Tensor) -> Tensor:
    """A vector (C,) as it is multiplied with x (N, C, *spatial)."""
    return vector.view(-1, *[1] * (x.dim() - 2))
