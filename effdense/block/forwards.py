"""Forwards in linear memory, for this package's modules and for converted ones alike.

Each is a mixin over a module class, whose own ``forward`` is the plain path: over the
reference's modules in this file, over anybody's in conversion.py. A dense block and what
reads it run as one stage (see dense_block.py, NOTE [ who owns the gradient buffer ]); each
module also runs alone, for people who hook, slice or rearrange ``model.features``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from .. import reference
from ..backends.layout import channels_last
from ..choices import Save
from ..norms.buffers import differing_groups
from ..norms.sync_batch_norm import refuse_torchs, sync_batch_norm
from ..norms.synchronization import synchronises
from ..recognition.objections import (
    BATCH_NORMS,
    has_hooks,
    norm_objection,
    refuse_replica,
    warn_once,
)
from ..recognition.parts import TransitionParts
from ..recognition.reading import read_block, read_chain, read_transition
from ..tracing import graph_is_recorded, is_traced, outside_graphs, torch_function
from .captured import run_captured
from .dense_block import check_save
from .offloading import offload
from .recomputation import run_chain
from .stage import run_stage
from .stem import run_stem
from .traced import leaf_call, over, sequence_call

_Mixin = TypeVar("_Mixin")


# TorchScript cannot read annotations of what modules hold, so these have none
def _default_save() -> Save:
    return "features"


class BlockForward:
    """A dense block: (N, C0, *spatial) -> (N, C0 + L k, *spatial).

    ``save`` says what a layer keeps for backward: "all" (plain autograd), "bottlenecks",
    "features", "slabs" or "input"; ``backend`` is "auto", "torch", "cpu" or "triton". Both may be
    changed between forwards. ``offload`` keeps it elsewhere: see :func:`effdense.offload`.
    """

    save = _default_save()
    backend = "auto"
    offload = False
    """Whether what is kept for backward is kept elsewhere: see offloading.py."""
    original: ClassVar[type[nn.Module]]
    """Whose forward is the plain path."""
    any_layers: ClassVar[bool] = False
    """Whether layers that are no BN-ReLU-Conv may be recomputed through autograd."""
    fused_layers: ClassVar[bool] = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # See NOTE [ what TorchScript compiles ].
        output = self._in_linear_memory(*args, **kwargs)
        if output is None:
            with self._offloading():
                output = super().forward(*args, **kwargs)  # type: ignore[misc]
        return output

    def _in_linear_memory(self, *args: Any, **kwargs: Any) -> Any:
        """The output, or None where the plain path is to give it."""
        if len(args) == 1 and not kwargs and _may_run(self, args[0]):
            output = run_block(self, args[0])
            if output is not None:
                return output
        traced = leaf_call(self, args, kwargs)
        if traced is not None:
            return traced
        refuse_torchs(self.modules(), *args, *kwargs.values())  # type: ignore[attr-defined]
        return None

    def _offloading(self) -> Any:
        return offload() if self.offload else nullcontext()


class TransitionForward:
    """BN-ReLU-Conv1x1-AvgPool that keeps only its input for backward."""

    save = _default_save()
    """Is "all" where all blocks of the network keep everything: plain autograd throughout."""
    backend = "auto"
    original: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # See NOTE [ what TorchScript compiles ].
        output = self._in_linear_memory(*args, **kwargs)
        return super().forward(*args, **kwargs) if output is None else output  # type: ignore[misc]

    def _in_linear_memory(self, *args: Any, **kwargs: Any) -> Any:
        """The output, or None where the plain path is to give it."""
        if len(args) == 1 and not kwargs and _may_run(self, args[0]):
            output = run_block(None, args[0], self)
            if output is not None:
                return output
        traced = leaf_call(self, args, kwargs)
        if traced is not None:
            return traced
        refuse_torchs(self.modules(), *args, *kwargs.values())  # type: ignore[attr-defined]
        return None


class SequentialForward:
    """Modules one after the other, a block and its transition as one stage."""

    save = _default_save()
    """As a transition's."""
    backend = "auto"
    channels_last: ClassVar[bool] = False
    """Whether inputs are laid out so."""
    original: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # See NOTE [ what TorchScript compiles ].
        output = self._in_linear_memory(*args, **kwargs)
        return super().forward(*args, **kwargs) if output is None else output  # type: ignore[misc]

    def _in_linear_memory(self, input: Any) -> Any:
        """The output, or None where the plain path is to give it."""
        if is_traced(input):
            return sequence_call(self, input, pool=False)
        if not has_global_hooks() and _may_run(self, input):
            return self._by_stages(input, 0, len(self), pool=False)  # type: ignore[arg-type]
        refuse_torchs(self.children(), input)  # type: ignore[attr-defined]
        return None

    def part(self, x: Tensor, start: int, stop: int, pool: bool) -> Tensor:
        """What the modules from ``start`` to ``stop`` make of x; (N, C) with ``pool``.

        With ``pool``, features after ReLU and global average pooling.
        """
        # TorchScript compiles the first alone
        if torch.jit.is_scripting():
            return self._plain_part(x, start, stop, pool)
        else:
            return self._fused_part(x, start, stop, pool)

    def _plain_part(self: Any, x: Tensor, start: int, stop: int, pool: bool) -> Tensor:
        for i, module in enumerate(self):
            if start <= i and i < stop:
                x = module(x)
        return F.relu(x).flatten(2).mean(2) if pool else x

    def _fused_part(self, x: Tensor, start: int, stop: int, pool: bool) -> Tensor:
        if has_global_hooks() or not _may_run(self, x):
            return self._plain_part(x, start, stop, pool)
        return self._by_stages(x, start, stop, pool)

    def _by_stages(self, x: Tensor, start: int, stop: int, pool: bool) -> Tensor:
        # one that stands there twice runs twice
        modules: list[nn.Module] = list(self)  # type: ignore[call-overload]
        i = start
        while i < stop:
            module, following = modules[i], modules[i + 1] if i + 1 < stop else None
            output, used = None, 1
            if is_unchanged(module, BlockForward) and module.save != "all":
                if is_unchanged(following, TransitionForward) and following.save != "all":
                    output, used = run_block(module, x, following), 2
                elif pool and i + 2 == stop and norm_objection("", following) is None:
                    output = run_block(module, x, following)
                    if output is not None:
                        return output
            else:
                save = _saved_behind(modules[i:])
                output, used = run_stem(modules[i : min(i + 4, stop)], x, self.backend, save)
            if output is None:
                # the first convolution's output takes its input's layout, and blocks copy any other
                last = self.channels_last and i == 0
                output, used = _call(module, channels_last(x) if last else x), 1
            x = output
            i += used
        return F.relu(x).mean(dim=tuple(range(2, x.dim()))) if pool else x


class DenseBlock(BlockForward, reference.DenseBlock):
    """A dense block of any layers, in memory linear in their number.

    ``DenseBlock([f1, f2, ...])``: each layer maps the (N, c, *spatial) concatenation of all
    features before it to its new ones; the block returns all features. Layers of
    BN-ReLU-Conv1x1-BN-ReLU-Conv3x3 (or BN-ReLU-Conv3x3) run fused; blocks of other layers
    keep one feature buffer and run each layer again in backward.

    Args:
        layers: modules, in order or by name.

    Attributes:
        save: what a layer keeps for backward: "all" (plain autograd), "bottlenecks",
            "features", "slabs" or "input". Without fused layers "bottlenecks" and "slabs" are
            "features".
        backend: "auto", "torch", "cpu" or "triton", for fused layers.

    Both may be changed between forwards.
    """

    original = reference.DenseBlock
    forward = over(BlockForward, reference.DenseBlock)
    any_layers = True

    def extra_repr(self) -> str:
        return f'save="{self.save}", backend="{self.backend}"'


class Transition(TransitionForward, reference.Transition):
    """BN-ReLU-Conv1x1-AvgPool that keeps only its input for backward."""

    original = reference.Transition
    forward = over(TransitionForward, reference.Transition)


class Features(SequentialForward, nn.Sequential):
    """``features`` of a DenseNet: called, it returns norm5's output."""

    original = nn.Sequential
    forward = over(SequentialForward, nn.Sequential)
    channels_last = True


def dense_blocks(model: nn.Module, kind: Any = BlockForward) -> dict[str, Any]:
    """A model's dense blocks by name, first to last, the outermost of nested ones.

    ``kind``: the class or classes that count as blocks.
    """
    found: dict[str, Any] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, kind) and id(module) not in inside:
            found[name] = module
            inside |= {id(child) for child in module.modules()}
    return found


def set_save(model: nn.Module, save: Save | Sequence[Save]) -> None:
    """Set what a model's dense blocks keep for backward: one mode for all, or one per block.

    Raises:
        ValueError: for an unknown mode, or another number of them than of blocks.
    """
    blocks = dense_blocks(model).values()
    modes = [save] * len(blocks) if isinstance(save, str) else list(save)
    if len(modes) != len(blocks):
        raise ValueError(f"expected a save mode for each of {len(blocks)} blocks, got {modes}")
    for block, mode in zip(blocks, [check_save(mode) for mode in modes], strict=True):
        block.save = mode
    everything = all(mode == "all" for mode in modes)
    for module in model.modules():
        if isinstance(module, (TransitionForward, SequentialForward)):
            module.save = "all" if everything else "features"


def set_offload(model: nn.Module, offload: bool | Sequence[bool]) -> None:
    """Set whether a model's dense blocks keep that elsewhere: one for all, or one per block.

    Raises:
        ValueError: for something else than booleans, or another number of them than of blocks.
    """
    blocks = dense_blocks(model).values()
    flags = [offload] * len(blocks) if isinstance(offload, bool) else list(offload)
    if len(flags) != len(blocks) or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(f"expected True or False for each of {len(blocks)} blocks, got {flags}")
    for block, flag in zip(blocks, flags, strict=True):
        block.offload = flag


def is_unchanged(module: nn.Module | None, mixin: type[_Mixin]) -> TypeGuard[_Mixin]:
    """Whether calling ``module`` means what ``mixin`` says, with nobody watching."""
    if not isinstance(module, mixin):
        return False
    code = getattr(type(module).forward, "__code__", None)  # type: ignore[attr-defined]
    return code is mixin.forward.__code__ and not has_hooks(module)  # type: ignore[attr-defined, arg-type]


def has_global_hooks() -> bool:
    """Whether hooks for all modules are set, which must see every module called."""
    return bool(
        module_globals._global_forward_hooks
        or module_globals._global_forward_pre_hooks
        or module_globals._global_backward_hooks
        or module_globals._global_backward_pre_hooks
    )


def _may_run(module: Any, x: Any) -> bool:
    """Whether anything but the plain path comes into question; else its result is torch's own."""
    if (
        module.save == "all"
        or graph_is_recorded()
        or not isinstance(x, Tensor)
        or not x.is_floating_point()
    ):
        return False
    if has_global_hooks():
        warn_once(module, "hooks for all modules are set, and are to see all that are in it")
        return False
    # a process without images still owes the others its part of their statistics
    return x.numel() > 0 or synchronises(module)


def _saved_behind(modules: Sequence[nn.Module]) -> Save:
    """What the first dense block of ``modules`` keeps; the fastest mode where there is none."""
    for module in modules:
        if isinstance(module, BlockForward):
            return check_save(module.save)
    return "bottlenecks"


def _call(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, and for torch's SyncBatchNorm what it would be on a CPU too.

    A batch norm moves its running statistics once, also where a checkpoint around it computes
    it again in backward.
    """
    if type(module) is nn.SyncBatchNorm and not has_hooks(module):
        return sync_batch_norm(x, module)
    if (
        torch._C._current_graph_task_id() != -1
        and type(module) in BATCH_NORMS
        and module.training
        and not has_hooks(module)
    ):
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        # on copies: a checkpoint counts the tensors that are saved
        mean, var = (
            None if buffer is None else buffer.clone()
            for buffer in (module.running_mean, module.running_var)
        )
        return F.batch_norm(x, mean, var, module.weight, module.bias, True, 0.0, module.eps)
    return module(x)


@torch_function(1)
@outside_graphs
def run_block(block: Any, x: Tensor, tail: Any = None) -> Tensor | None:
    """A dense block and its reader in linear memory, either may be absent; None where it can't be.

    Args:
        block: a :class:`BlockForward`, or None for a tail alone, which then reads x itself.
        x: (N, C0, *spatial), any layout, real floating-point.
        tail: a :class:`TransitionForward`, a batch norm (which stands for BN-ReLU-global
            average pooling), or None to return the features.

    Raises:
        ValueError: for an input whose channels, dtype or device don't fit the parameters,
            or a batch too small for batch statistics.
    """
    owners = [module for module in (block, tail) if module is not None]
    refuse_replica(owners[0])
    return run_captured(owners, x, partial(_run_block, block, tail))


def _run_block(block: Any, tail: Any, x: Tensor) -> Tensor | None:
    tail_parts: Any = tail
    if isinstance(tail, TransitionForward):
        tail_parts = read_transition(tail, tail.original)  # type: ignore[arg-type]
        if isinstance(tail_parts, str):
            warn_once(tail, tail_parts)  # type: ignore[arg-type]
            return None
        if min(x.shape[2:], default=2) < 2:
            raise ValueError(
                f"a transition halves every spatial size and needs at least 2, got input of "
                f"shape {tuple(x.shape)}; use larger inputs or fewer blocks"
            )
    if block is None:
        return run_stage(x, None, tail_parts, "features", tail.backend)
    with offload() if block.offload else nullcontext():
        return _run_with_block(block, x, tail, tail_parts)


def _run_with_block(block: Any, x: Tensor, tail: Any, tail_parts: Any) -> Tensor | None:
    save = check_save(block.save)
    parts = read_block(block, block.original) if block.fused_layers else "not to be fused"
    if not isinstance(parts, str):
        if not parts.layers and tail is None:
            return None
        if parts.new_only and tail is not None:
            # which reads something else than the block's whole buffer
            return None
        norms = [layer.norm1 for layer in parts.layers]
        norms += [layer.norm2 for layer in parts.layers if layer.norm2 is not None]
        last = tail_parts.norm if isinstance(tail_parts, TransitionParts) else tail_parts
        together = norms if last is None else [*norms, last]
        differing = differing_groups(together)
        found = None if differing is None else differing_groups(norms)
        if found is not None:
            names = {module: name for name, module in block.named_modules()}
            one, other = (names[norm] for norm in found)
            warn_once(block, f"{one} and {other} take their statistics over different processes")
            return None
        if differing is not None:
            # each can run fused by itself
            return None
        return run_stage(x, parts, tail_parts, save, block.backend)
    if block.any_layers:
        if tail is not None:
            # its layers may be recomputed, but not with their reader
            return None
        chain = read_chain(block, block.original)
        if not isinstance(chain, str):
            return run_chain(block, chain, x, save)
        parts = chain
    warn_once(block, parts)
    return None
