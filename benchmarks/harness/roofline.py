"""What a training step must compute and move, operation by operation, on paper.

The naive net's operations are counted as PyTorch runs them, on meta tensors; effdense's
by the formulas of its kernels (shapes as in effdense/block/dense_block.py). Both count each
tensor an operation reads or writes once per pass over it, and nothing that a cache may
keep between operations: a roofline time is a lower bound, without launch overheads.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from . import counts, providers
from .case import Case


class Operation(NamedTuple):
    """One pass: what it is, floating-point operations, bytes read plus written."""

    name: str
    flops: float
    nbytes: float


def seconds(operations: tuple[Operation, ...], flops: float, memory: float) -> float:
    """Roofline time: each operation takes the longer of computing and moving."""
    return sum(max(op.flops / flops, op.nbytes / memory) for op in operations)


def operations(provider: str, case: Case) -> tuple[Operation, ...]:
    """One training step of a provider.

    Raises:
        ValueError: for a compiled provider, whose operations are the compiler's choice.
    """
    name = provider.partition(":")[0]
    if providers.find(provider)[0].compiled:
        raise ValueError(f"{name}: the compiler chooses its operations, they are not counted")
    if name.startswith("effdense-") and name != "effdense-all":
        return effdense_operations(name.removeprefix("effdense-"), case)
    return counted_operations("naive" if name == "effdense-all" else name, case)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = _storages((args, kwargs))
        outputs = _storages(out)
        if name.startswith(("empty", "new_empty")):
            return out
        if not func._schema.is_mutable and outputs.keys() <= inputs.keys():
            # a view moves nothing
            return out
        moved = sum(inputs.values()) + sum(outputs.values())
        if "batch_norm" in name:
            # statistics first, then the output; likewise sums first, then the gradient
            again = tree_leaves(args)[: 2 if "backward" in name else 1]
            moved += sum(_storages(again).values())
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        self.operations.append(Operation(name, flops, moved))
        return out


def _storages(tree: Any) -> dict[int, int]:
    """Bytes looked at in each storage, by its address."""
    found: dict[int, int] = {}
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            key = leaf.untyped_storage()._cdata
            found[key] = max(found.get(key, 0), leaf.numel() * leaf.element_size())
    return found


@lru_cache(maxsize=64)
def counted_operations(provider: str, case: Case) -> tuple[Operation, ...]:
    """A step of plain torch operations, counted on meta tensors."""
    job = providers.setup(provider, dataclasses.replace(case, device="meta"))
    job.make_optimizer_state()
    with _Counter() as counter:
        job.step()
    return tuple(counter.operations)


# SGD with momentum: buf *= m; buf += grad; p -= lr * buf
_OPTIMIZER_PASSES = 8


@lru_cache(maxsize=64)
def effdense_operations(save: str, case: Case) -> tuple[Operation, ...]:
    """A step of effdense, by formula: symbols of dense_block.py, e bytes an element."""
    e, found = case.element_size, []

    def add(name: str, flops: float, elements: float) -> None:
        found.append(Operation(name, flops, elements * e))

    network, images = case.network(), case.batch_size
    stem, width0 = counts.stem_positions(case), network["num_init_features"]
    taps, stem_taps = counts.taps(case), counts.stem_taps(case)
    pixels = math.prod(case.shape)
    add("conv0", 2 * stem * width0 * stem_taps, pixels + stem * width0)
    add("conv0 backward", 2 * stem * width0 * stem_taps, pixels + stem * width0)
    blocks = counts.blocks(case)
    if not case.is_cifar:
        pooled = blocks[0].positions * width0
        # statistics, then the pooled maxima; backward rebuilds, masks and applies
        add("stem norm", 0, 2 * stem * width0 + pooled)
        add("stem norm backward", 0, 5 * stem * width0 + pooled)

    for block in blocks:
        p, b, k = block.positions, block.bottleneck, block.growth_rate
        add("input to buffer", 0, 3 * p * block.input_width)
        for layer in block.layers():
            c = layer.width
            product = 2 * p * c * b
            convolution = 2 * taps * p * b * k

            for _ in range(2 if save == "input" else 1):
                add("bn_relu_conv1x1", product, p * (c + b) + c * b)
                add("bn_relu", 0, 2 * p * b)
                add("conv3x3", convolution, p * (b + k))
                add("new features and their statistics", 0, 3 * p * k)
            if save != "bottlenecks":
                add("bn_relu_conv1x1 again", product, p * (c + b) + c * b)
            add("finish_gradient", 0, 3 * p * k)
            add("bn_relu again", 0, 2 * p * b)
            add("conv3x3 backward, input", convolution, p * (b + k))
            add("conv3x3 backward, weight", convolution, p * (b + k))
            add("norm2 backward sums", 0, 3 * p * b)
            add("norm2 backward", 0, 3 * p * b)
            add("bn_relu_conv1x1 backward", 2 * product, p * (3 * c + b) + 2 * c * b)
        c, out = block.width, block.output_width
        if out:
            pooled = p / 2**case.spatial_dims
            add("bn_relu_avg_pool", 0, (p + pooled) * c)
            add("transition", 2 * pooled * c * out, pooled * (c + out))
            add("transition backward, input", 2 * pooled * c * out, pooled * (c + out))
            add("bn_relu_avg_pool backward", 0, (2 * p + 2 * pooled) * c)
            add("transition backward, weight", 2 * pooled * c * out, pooled * (c + out))
        else:
            add("bn_relu_global_pool", 0, p * c)
            add("bn_relu_global_pool backward", 0, 2 * p * c)
            classes = images * c * network.get("num_classes", 1000)
            add("classifier", 6 * classes, 0)
        add("finish_gradient, input", 0, 3 * p * block.input_width)
    state = counts.parameter_count(case) * case.parameter_size
    found.append(Operation("optimizer", 0, _OPTIMIZER_PASSES * state))
    return tuple(found)
