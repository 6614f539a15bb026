"""The reference's modules with linear-memory forwards: same parameters, same names.

A :class:`DenseBlock` and what reads it run as one stage (see dense_block.py, NOTE
[ who owns the gradient buffer ]); each module also runs alone, for people who hook,
slice or rearrange ``model.features``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .autocast import autocast_dtype
from .backends.select import get_backend
from .dense_block import DenseStage, LayerSpec, Save, StageSpec, check_save
from .eligibility import (
    block_objection,
    graph_is_recorded,
    has_hooks,
    norm_objection,
    outside_graphs,
    refuse_replica,
    transition_objection,
    warn_once,
)
from .norms import count_positions, read_norm, update_running_statistics
from .offloading import offload
from .stem import norm_relu_max_pool, stem_objection

_Module = TypeVar("_Module", bound=nn.Module)


class DenseBlock(reference.DenseBlock):
    """A dense block: (N, C0, *spatial) -> (N, C0 + L k, *spatial).

    ``save`` says what a layer keeps for backward: "all" (plain autograd), "bottlenecks",
    "features" or "input"; ``backend`` is "auto", "torch" or "triton". Both may be
    changed between forwards. ``offload`` keeps it elsewhere: see :func:`effdense.offload`.
    """

    save: Save = "features"
    backend: str = "auto"
    # whether what is kept for backward is kept elsewhere: see offloading.py
    offload: bool = False

    def forward(self, x: Tensor) -> Tensor:
        objection = self.objection(x)
        if objection is None and len(self):
            return run_stage(self, x)
        return self.plain_forward(x)

    def plain_forward(self, x: Tensor) -> Tensor:
        with offload() if self.offload else nullcontext():
            return super().forward(x)

    def objection(self, x: Tensor) -> str | None:
        """Why this forward must take the plain path, or None; warns where that is a surprise."""
        if self.save == "all":
            return 'save="all"'
        check_save(self.save)
        if graph_is_recorded():
            return "the graph is being recorded"
        if x.numel() == 0 or not x.is_floating_point():
            # the plain path's error, or its result, is torch's own
            return "the input is empty or not real floating-point"
        objection = block_objection(list(self.values()))
        if objection is not None:
            warn_once(self, objection)
        return objection


class Transition(reference.Transition):
    """BN-ReLU-Conv1x1-AvgPool that keeps only its input for backward."""

    backend: str = "auto"
    # save="all" of the network: plain autograd throughout
    plain: bool = False

    def forward(self, x: Tensor) -> Tensor:
        if self.objection(x) is None:
            return run_stage(None, x, self)
        return self.plain_forward(x)

    def plain_forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def objection(self, x: Tensor) -> str | None:
        if self.plain:
            return 'save="all"'
        if graph_is_recorded() or x.numel() == 0 or not x.is_floating_point():
            return "the graph is being recorded, or the input empty or not real"
        if min(x.shape[2:], default=2) < 2:
            raise ValueError(
                f"a transition halves every spatial size and needs at least 2, got input of "
                f"shape {tuple(x.shape)}; use larger inputs or fewer blocks"
            )
        objection = transition_objection(self)
        if objection is not None:
            warn_once(self, objection)
        return objection


class Features(nn.Sequential):
    """``features`` of a DenseNet: called, it runs module by module and returns norm5's output."""

    backend: str = "auto"
    plain: bool = False

    def pooled(self, x: Tensor) -> Tensor:
        """Features after norm5, ReLU and global average pooling, (N, C), stage by stage."""
        modules = list(self._modules.values())
        i = 0
        while i < len(modules):
            module = modules[i]
            assert module is not None
            following = modules[i + 1] if i + 1 < len(modules) else None
            if _is_unchanged(module, DenseBlock):
                if _is_unchanged(following, Transition) and self._fits(module, following, x):
                    x = run_stage(module, x, following)
                    i += 2
                    continue
                if i + 2 == len(modules) and self._is_last_norm(following, module, x):
                    return run_stage(module, x, following)
            elif stem_objection(modules[i : i + 3], x, self.plain) is None:
                norm, _, pool = modules[i : i + 3]
                x = norm_relu_max_pool(x, norm, pool, self.backend)
                i += 3
                continue
            x = module(x)
            i += 1
        return F.relu(x).mean(dim=tuple(range(2, x.dim())))

    def _fits(self, block: DenseBlock, transition: Transition, x: Tensor) -> bool:
        return block.objection(x) is None and transition.objection(x) is None

    def _is_last_norm(self, norm: nn.Module | None, block: DenseBlock, x: Tensor) -> bool:
        return norm_objection("norm5", norm) is None and block.objection(x) is None


def _is_unchanged(module: nn.Module | None, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether calling ``module`` means what ``kind`` says, with nobody watching."""
    return (
        isinstance(module, kind) and type(module).forward is kind.forward and not has_hooks(module)
    )


@outside_graphs
def run_stage(block: DenseBlock | None, x: Tensor, tail: nn.Module | None = None) -> Tensor:
    """One dense block and its reader in linear memory; either may be absent.

    Args:
        block: None for a tail alone, which then reads x itself.
        x: (N, C0, *spatial), any layout.
        tail: a :class:`Transition`, a batch norm (which stands for BN-ReLU-global
            average pooling), or None to return the features.

    Raises:
        ValueError: for an input whose channels, dtype or device don't fit the parameters,
            or a batch too small for batch statistics.
    """
    owner: Any = block if block is not None else tail
    refuse_replica(owner)
    layers: Sequence[Any] = [] if block is None else list(block.values())
    tensors: list[Tensor | None] = []
    specs = []
    for layer in layers:
        norm1, norm1_tensors = read_norm(layer.norm1)
        tensors += [*norm1_tensors, layer.conv1.weight]
        norm2 = None
        if hasattr(layer, "norm2"):
            norm2, norm2_tensors = read_norm(layer.norm2)
            tensors += [*norm2_tensors, layer.conv2.weight]
        else:
            tensors += [None] * 5
        specs.append(LayerSpec(norm1, norm2, layer.drop_rate if layer.training else 0.0))

    tail_norm = kind = None
    if isinstance(tail, Transition):
        tail_norm, norm_tensors = read_norm(tail.norm)
        tensors += [*norm_tensors, tail.conv.weight]  # type: ignore[list-item]
        kind = "transition"
    elif tail is not None:
        tail_norm, norm_tensors = read_norm(tail)
        tensors += [*norm_tensors, None]
        kind = "pool"

    first: Any = layers[0].norm1 if layers else getattr(tail, "norm", tail)
    dtype = _check_input(x, first, [t for t in tensors if t is not None])
    used = [spec.norm1 for spec in specs] + [s.norm2 for s in specs if s.norm2 is not None]
    used += [] if tail_norm is None else [tail_norm]
    positions = count_positions(x, used)

    dropping = any(spec.drop_rate > 0 for spec in specs)
    spec = StageSpec(
        backend=get_backend(getattr(owner, "backend", "auto"), x.device, dtype),
        save="features" if block is None else check_save(block.save),
        layers=tuple(specs),
        tail=kind,  # type: ignore[arg-type]
        tail_norm=tail_norm,
        compute_dtype=dtype,
        keep=torch.is_grad_enabled(),
        seed=int(torch.empty((), dtype=torch.int64, device="cpu").random_()) if dropping else 0,
    )
    with offload() if getattr(owner, "offload", False) else nullcontext():
        output, mean, var, mean2, var2 = DenseStage.apply(spec, x, *tensors)
    _move_buffers(layers, tail, tail_norm is not None, positions, (mean, var, mean2, var2))
    return output


def _move_buffers(
    layers: Sequence[Any],
    tail: nn.Module | None,
    tail_has_norm: bool,
    count: int,
    statistics: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    mean, var, mean2, var2 = statistics
    norms: list[nn.Module] = []
    means: list[Tensor] = []
    variances: list[Tensor] = []
    offset = 0
    for layer in layers:
        width = layer.norm1.num_features
        norms.append(layer.norm1)
        means.append(mean[:width])
        variances.append(var[:width])
        if hasattr(layer, "norm2"):
            own = slice(offset, offset + layer.norm2.num_features)
            offset = own.stop
            norms.append(layer.norm2)
            means.append(mean2[own])
            variances.append(var2[own])
    if tail_has_norm:
        norm = getattr(tail, "norm", tail)
        assert isinstance(norm, nn.Module)
        norms.append(norm)
        means.append(mean)
        variances.append(var)
    update_running_statistics(norms, means, variances, count)


def _check_input(x: Tensor, norm: nn.Module, tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype to compute in: autocast's where it is on, else x's, which must be the weights'."""
    weights = [t for t in tensors if t.dim() > 1]
    device = tensors[0].device
    if x.device != device:
        raise ValueError(f"input is on {x.device}, the parameters are on {device}")
    if any(weight.dim() != x.dim() for weight in weights):
        raise ValueError(
            f"expected input (N, C, *spatial) of {weights[0].dim()} dimensions, "
            f"got shape {tuple(x.shape)}"
        )
    if x.shape[1] != norm.num_features:
        raise ValueError(
            f"expected input with {norm.num_features} channels, got shape {tuple(x.shape)}"
        )
    autocast = autocast_dtype(x.device)
    if autocast is not None:
        # As torch's own operations: autocast leaves double alone.
        return x.dtype if x.dtype == torch.float64 else autocast
    for weight in weights:
        if weight.dtype != x.dtype:
            raise ValueError(
                f"input is {x.dtype}, the weights are {weight.dtype}; convert one of them "
                "or use torch.autocast"
            )
    return x.dtype
