"""One fused stage: from modules that were read to tensors and scalars, and their buffers moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import autocast_dtype
from ..backends.dropout import draw_seed
from ..backends.empty import EmptyBackend
from ..backends.layout import channels, readable
from ..backends.select import get_backend
from ..choices import Save
from ..differentiation import Anchor
from ..errors import spelled_shape
from ..norms.buffers import batch_of, read_norm, refuse_wider, update_running_statistics
from ..recognition.parts import BlockParts, TransitionParts
from .captured import recorder
from .dense_block import DenseStage, LayerSpec, LayerTensors, StageSpec, TailTensors
from .stepping import steps_of


def run_stage(
    x: Tensor,
    block: BlockParts | None,
    tail: TransitionParts | nn.Module | None,
    save: Save,
    backend: str,
) -> Tensor:
    """The fused stage of what was read: (N, C0, *spatial) to the tail's output or all features."""
    layers = () if block is None else block.layers
    tensors: list[Tensor | None] = []
    specs = []
    for layer in layers:
        layer_spec, own = _read_layer(layer)
        specs.append(layer_spec)
        tensors += own

    tail_norm = kind = last = None
    if tail is not None:
        kind = "transition" if isinstance(tail, TransitionParts) else "pool"
        last = tail.norm if isinstance(tail, TransitionParts) else tail
        tail_norm, (gamma, beta, frozen_mean, frozen_var) = read_norm(last)
        tensors += TailTensors(
            gamma=gamma,
            beta=beta,
            weight=tail.conv.weight if isinstance(tail, TransitionParts) else None,
            frozen_mean=frozen_mean,
            frozen_var=frozen_var,
        )

    first: Any = layers[0].norm1 if layers else last
    dtype = _check_input(x, first, [t for t in tensors if t is not None])
    refuse_wider(tensors, dtype)
    used = [spec.norm1 for spec in specs] + [s.norm2 for s in specs if s.norm2 is not None]
    used += [] if tail_norm is None else [tail_norm]
    batch = batch_of(x, used)

    # a recorded stage gives its gradients away, to be used up behind it
    by_itself = torch.is_grad_enabled() and recorder.get() is None
    steps = steps_of(tensors) if by_itself else None
    if steps is not None and dtype == torch.float16:
        raise ValueError(
            "float16 wants its loss scaled (torch.amp.GradScaler), and gradients checked before "
            "a step: steps in backward are for other types, such as bfloat16"
        )
    dropping = any(spec.drop_rate > 0 for spec in specs)
    newest_first = block is not None and block.newest_first
    new_only = block is not None and block.new_only
    spec = StageSpec(
        backend=get_backend(backend, x.device, dtype) if x.numel() else EmptyBackend(),
        save=save,
        layers=tuple(specs),
        tail=kind,  # type: ignore[arg-type]
        tail_norm=tail_norm,
        compute_dtype=dtype,
        batch=batch,
        keep=torch.is_grad_enabled(),
        anchor=Anchor(x),
        newest_first=newest_first,
        new_only=new_only,
        steps=steps,
    )
    seed = draw_seed(x.device) if dropping else None
    # hundreds, nearly all of which are: a call for each would cost the host
    given = [t if t is None or t.is_contiguous() else readable(t) for t in tensors]
    output, mean, var, mean2, var2 = DenseStage.apply(spec, x, seed, *given)
    _move_buffers(layers, last, newest_first, batch.count, (mean, var, mean2, var2))
    return output


def _read_layer(layer: Any) -> tuple[LayerSpec, LayerTensors]:
    norm1, (gamma, beta, frozen_mean, frozen_var) = read_norm(layer.norm1)
    tensors = LayerTensors(
        gamma1=gamma,
        beta1=beta,
        weight1=layer.conv1.weight,
        frozen_mean1=frozen_mean,
        frozen_var1=frozen_var,
        bias=(layer.conv1 if layer.conv2 is None else layer.conv2).bias,
    )
    norm2 = None
    if layer.norm2 is not None:
        norm2, (gamma, beta, frozen_mean, frozen_var) = read_norm(layer.norm2)
        tensors = tensors._replace(
            gamma2=gamma,
            beta2=beta,
            weight2=layer.conv2.weight,
            frozen_mean2=frozen_mean,
            frozen_var2=frozen_var,
        )
    return LayerSpec(norm1, norm2, layer.drop_rate, layer.drop_channels), tensors


def _move_buffers(
    layers: Sequence[Any],
    last: Any,
    newest_first: bool,
    count: int,
    statistics: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    mean, var, mean2, var2 = statistics
    width = len(mean)
    norms: list[nn.Module] = []
    means: list[Tensor] = []
    variances: list[Tensor] = []
    for layer in layers:
        count1 = layer.norm1.num_features
        first = channels(0, count1, width, newest_first).start
        norms.append(layer.norm1)
        means.append(mean.narrow(0, first, count1))
        variances.append(var.narrow(0, first, count1))
    second = [layer.norm2 for layer in layers if layer.norm2 is not None]
    norms += second
    sizes = [norm.num_features for norm in second]
    means += mean2.split_with_sizes(sizes)
    variances += var2.split_with_sizes(sizes)
    if last is not None:
        norms.append(last)
        means.append(mean)
        variances.append(var)
    update_running_statistics(norms, means, variances, count)


def _check_input(x: Tensor, norm: Any, tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype to compute in: autocast's where it is on, else x's, which must be the weights'."""
    weights = [t for t in tensors if t.dim() > 1]
    device = tensors[0].device
    if x.device != device:
        raise ValueError(f"input is on {x.device}, the parameters are on {device}")
    if any(weight.dim() != x.dim() for weight in weights):
        expected = spelled_shape(norm.num_features, weights[0].dim())
        raise ValueError(f"expected input of shape {expected}, got {tuple(x.shape)}")
    if x.shape[1] != norm.num_features:
        expected = spelled_shape(norm.num_features, x.dim())
        raise ValueError(f"expected input of shape {expected}, got {tuple(x.shape)}")
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
