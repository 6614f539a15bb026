"""What a training step must compute and move, operation by operation, on paper.

The naive net's operations are counted as PyTorch runs them, on meta tensors; effdense's
by the table of its kernels (effdense.kernels.traffic). Both count each
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

from effdense.kernels import traffic

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
            passes = [*traffic.FORWARD, *traffic.BACKWARD]
            passes += traffic.FORWARD if save == "input" else ()
            passes += () if save == "bottlenecks" else (traffic.REBUILD,)
            # as where every layer is cut
            passes += (traffic.REBUILD, traffic.BACKWARD[0]) if save == "slabs" else ()
            for row in passes:
                product = 2 * p * layer.width * b * row.products
                convolution = 2 * taps * p * b * k * row.convolutions
                # the product's weight is as wide as what it reads
                weights = layer.width * b * row.products
                moved = p * row.moved.of(layer.width, b, k) + weights
                add(row.name, product + convolution, moved)
        c, out = block.width, block.output_width
        if out:
            pooled = p / 2**case.spatial_dims
            for row in traffic.transition(case.spatial_dims):
                add(row.name, 0, p * row.moved.of(c, b, k))
            add("transition", 2 * pooled * c * out, pooled * (c + out))
            add("transition backward, input", 2 * pooled * c * out, pooled * (c + out))
            add("transition backward, weight", 2 * pooled * c * out, pooled * (c + out))
        else:
            for row in (traffic.POOL_FORWARD, traffic.POOL_BACKWARD):
                add(row.name, 0, p * row.moved.of(c, b, k))
            classes = images * c * network.get("num_classes", 1000)
            add("classifier", 6 * classes, 0)
        add(traffic.INPUT.name, 0, p * traffic.INPUT.moved.of(block.input_width, b, k))
    state = counts.parameter_count(case) * case.parameter_size
    found.append(Operation("optimizer", 0, _OPTIMIZER_PASSES * state))
    return tuple(found)
