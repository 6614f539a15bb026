"""What a network computes inside, ours and the naive one's side by side.

NOTE [ how hidden states are seen ]
Hooks inside a dense block would put it on the plain path, so nobody can watch a layer's
output there. But what a block keeps for backward is everything it computed: its buffer
holds the block's input and every layer's new features, and with save="bottlenecks" the
bottlenecks stand beside it. They are read out of autograd's graph and compared with what
hooks see in the naive twin. Blocks that are recomputed have no such buffer and never run
together with their reader: those are hooked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..backends.layout import channels, rows
from ..block.forwards import BlockForward
from ..memory.timeline import stages
from ..recognition.reading import read_block

INPUT, RECOMPUTED = "input of dense blocks", "output of recomputed dense blocks"


def first_tensor(output: Any) -> Tensor:
    """A model's output, or the first tensor in the structure that it returns."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def hidden_states(
    naive: nn.Module, ours: nn.Module, x: Tensor
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(kind, name, ours, naive) of every hidden state; see NOTE [ how hidden states are seen ]."""
    blocks = {n: m for n, m in ours.named_modules() if isinstance(m, BlockForward)}
    fused = {name: block for name, block in blocks.items() if block.fused_layers}
    outputs: dict[str, Tensor] = {}
    convolved: dict[nn.Module, Tensor] = {}
    hooked: dict[str, Tensor] = {}

    def keep(into: dict[Any, Tensor], key: Any) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            into[key] = rows(output.detach()).clone()

        return hook

    parts = {}
    for name in blocks:
        block = naive.get_submodule(name)
        block.register_forward_hook(keep(outputs, name))
        read = read_block(block, type(block)) if name in fused else "recomputed"
        parts[name] = read
        for layer in () if isinstance(read, str) else read.layers:
            layer.conv1.register_forward_hook(keep(convolved, layer.conv1))
    for name in blocks.keys() - fused.keys():
        module: Any = blocks[name]
        module.register_forward_hook(keep(hooked, name))

    with torch.no_grad():
        naive(x)
    places = {
        p.untyped_storage()._cdata: name
        for name in blocks
        for p in ours.get_submodule(name).parameters()
    }
    for stage in stages(first_tensor(ours(x))):
        here = (places.get(t.untyped_storage()._cdata) for t in stage.parameters)
        name = next((place for place in here if place is not None), "")
        read = parts.get(name, "")
        if isinstance(read, str) or not read.layers:
            continue
        expected, layers = outputs[name], read.layers
        width, first = expected.shape[1], layers[0].norm1.num_features
        growth = (width - first) // len(layers)
        # the first layer reads the block's input
        starts = [0] + [first + i * growth for i in range(len(layers) + 1)]
        for i, (start, stop) in enumerate(itertools.pairwise(starts)):
            own = channels(start, stop, width, read.newest_first)
            kind = "new features of dense layers" if i else INPUT
            where = f"{name}, layer {i}" if i else name
            yield kind, where, stage.features[:, own], expected[:, own]
        for i, (y, layer) in enumerate(zip(stage.bottlenecks, layers, strict=False)):
            yield "bottlenecks of dense layers", f"{name}, layer {i + 1}", y, convolved[layer.conv1]
    for name, output in hooked.items():
        yield RECOMPUTED, name, output, outputs[name]


def block_inputs(model: nn.Module, names: Iterable[str], x: Tensor) -> dict[str, torch.Size]:
    """The shapes that the modules of these names are called with."""
    found: dict[str, torch.Size] = {}
    handles = []
    for name in names:

        def look(module: nn.Module, inputs: Any, name: str = name) -> None:
            found[name] = first_tensor(inputs).shape

        handles.append(model.get_submodule(name).register_forward_pre_hook(look))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found
