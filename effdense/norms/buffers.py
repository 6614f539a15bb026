"""Batch norm modules as the dense block sees them: which statistics, and how buffers move.

NOTE [ running statistics ]
Running statistics change exactly once per training forward, with the unbiased
variance, whatever backward recomputes later. The block's own recomputation never
comes here. An outer ``torch.utils.checkpoint`` around a block does: it runs the
module's forward again while a backward pass is executing, so an update is skipped
whenever autograd is inside a graph task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .synchronization import Batch, SharedBatch, process_group


class NormSpec(NamedTuple):
    """The scalars of one batch norm for one forward; tensors travel separately."""

    eps: float
    batch_statistics: bool
    """Else they come from the running buffers, and backward makes no correction."""
    group: Any = None
    """The process group whose batch it is, None for this process's own."""


def _takes_batch_statistics(norm: nn.Module) -> bool:
    # from where a module keeps them: its attributes are found the slow way, for every norm
    return norm.training or norm._buffers["running_mean"] is None


def read_norm(norm: nn.Module) -> tuple[NormSpec, tuple[Tensor | None, ...]]:
    """Spec and (gamma, beta, frozen mean, frozen variance) of an affine batch norm.

    The frozen pair is None where the norm uses the batch's statistics: in training, or
    always when it tracks none.
    """
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    parameters, buffers = norm._parameters, norm._buffers
    weight, bias = parameters["weight"], parameters["bias"]
    if _takes_batch_statistics(norm):
        return NormSpec(norm.eps, True, process_group(norm)), (weight, bias, None, None)
    frozen = buffers["running_mean"], buffers["running_var"]
    return NormSpec(norm.eps, False), (weight, bias, *frozen)


def refuse_wider(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> None:
    """Raise ValueError where parameters are float64 and what is computed in ``dtype`` isn't."""
    if dtype == torch.float64:
        return
    if torch.float64 in {None if tensor is None else tensor.dtype for tensor in tensors}:
        raise ValueError(
            f"norms or biases are torch.float64 where {dtype} is computed in; convert them, as "
            "by model.float(), or the input and all weights, by model.double()"
        )


def batch_of(x: Tensor, norms: Sequence[NormSpec]) -> Batch:
    """The positions of x (N, C, *spatial), with those of the other processes if norms share them.

    A collective for norms that do; all that take batch statistics must share them with the same.

    Raises:
        ValueError: for a single position where a norm takes batch statistics, in all processes.
    """
    per_image = math.prod(x.shape[2:])
    own = x.shape[0] * per_image
    taking = [norm for norm in norms if norm.batch_statistics]
    if taking and taking[0].group is not None:
        shared = SharedBatch.of(taking[0].group, x.shape[0], per_image, x.device)
        if shared.count < 2:
            raise ValueError(
                f"batch statistics need more than one value per channel, got {shared.count} in "
                "all processes together; use a larger batch, or eval mode"
            )
        return shared
    if own == 1 and taking:
        raise ValueError(
            f"batch statistics need more than one value per channel, got input of shape "
            f"{tuple(x.shape)}; use a larger batch, or eval mode"
        )
    return Batch(own)


def differing_groups(norms: Sequence[nn.Module]) -> tuple[nn.Module, nn.Module] | None:
    """Two of ``norms`` that take batch statistics over different processes, if there are."""
    first = None
    for norm in norms:
        if _takes_batch_statistics(norm):
            found = norm, process_group(norm)
            first = first or found
            if found[1] is not first[1]:
                return first[0], norm
    return None


def update_running_statistics(
    norms: Sequence[nn.Module], means: Sequence[Tensor], variances: Sequence[Tensor], count: int
) -> None:
    """Move each training norm's buffers towards its batch statistics, all norms at once.

    Args:
        norms: batch norm modules, in any mode; only training ones that track are changed.
        means: per norm, (c,), in the accumulate type.
        variances: per norm, biased, (c,).
        count: positions per channel in the batch, all processes' that share it.
    """
    # See NOTE [ running statistics ].
    if torch._C._current_graph_task_id() != -1:
        return
    counters: list[Tensor] = []
    # by factor: running means and variances, and what they move towards
    by_factor: dict[float, tuple[list[Tensor], ...]] = {}
    for norm, mean, var in zip(norms, means, variances, strict=True):
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        buffers = norm._buffers
        running_mean, running_var = buffers["running_mean"], buffers["running_var"]
        if running_mean is None or not (norm.training and norm.track_running_stats):
            continue
        assert running_var is not None
        factor = 0.0 if norm.momentum is None else norm.momentum
        tracked = buffers["num_batches_tracked"]
        if tracked is not None:
            if norm.momentum is None:
                factor = 1.0 / float(tracked.add_(1))
            else:
                counters.append(tracked)
        if count:
            lists = by_factor.setdefault(factor, ([], [], [], []))
            own = running_mean, running_var, mean, var
            if running_mean.dtype != mean.dtype:
                own = *own[:2], mean.to(running_mean.dtype), var.to(running_var.dtype)
            for found, tensor in zip(lists, own, strict=True):
                found.append(tensor)
    unbias = count / (count - 1) if count > 1 else float("nan")
    # a few launches for all norms of a block
    with torch.no_grad():
        if counters:
            torch._foreach_add_(counters, 1)
        for factor, (running_means, running_vars, own_means, own_vars) in by_factor.items():
            torch._foreach_mul_(running_means + running_vars, 1 - factor)
            torch._foreach_add_(running_means, own_means, alpha=factor)
            torch._foreach_add_(running_vars, own_vars, alpha=factor * unbias)
