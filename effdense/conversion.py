"""One line for the DenseNet people already have: ``effdense.convert(model)``.

NOTE [ what conversion changes ]
The class of a dense block, of a transition and of the nn.Sequential that holds them, and two
attributes (save and backend); nothing else. The new class is a subclass of the old
one with the same name, so hooks, ``isinstance``, state-dict keys and every reference to the
module or its parameters go on working, and ``revert`` is exact: the old class back, the
attributes gone. Layers, norms and convolutions are never touched.

Which modules: recognition/reading.py, by what they are made of and what they compute, not by name.
"""

from __future__ import annotations

import copyreg
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from .backends.select import check_backend
from .block.dense_block import check_save
from .block.forwards import BlockForward, SequentialForward, TransitionForward, over, set_save
from .choices import Save
from .machine.tables import columns
from .recognition.graphs import group
from .recognition.objections import BATCH_NORMS
from .recognition.parts import input_width, layers_of
from .recognition.reading import read_block, read_chain, read_transition

Kind = Literal["dense block", "dense block, recomputed", "transition", "sequence"]


class _Converted:
    """Marks a class made here; copies and pickles name the class that it was made from."""

    original: ClassVar[type[nn.Module]]
    kind: ClassVar[Kind]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_blank, (self.kind, self.original), *reduced[2:])
        return reduced

    def extra_repr(self) -> str:
        said = super().extra_repr()  # type: ignore[misc]
        own = (
            f'effdense, save="{self.save}", backend="{self.backend}"'
            if isinstance(self, BlockForward)
            else "effdense"
        )
        return f"{said}, {own}" if said else own


class _FusedBlock(_Converted, BlockForward):
    # what is changed later (another norm, another activation) is recomputed where it can be
    any_layers = True


class _RecomputedBlock(_Converted, BlockForward):
    any_layers = True
    fused_layers = False


class _Transition(_Converted, TransitionForward):
    pass


class _Sequence(_Converted, SequentialForward):
    pass


_MIXINS: dict[Kind, type[Any]] = {
    "dense block": _FusedBlock,
    "dense block, recomputed": _RecomputedBlock,
    "transition": _Transition,
    "sequence": _Sequence,
}


_classes: dict[tuple[Kind, type[Any]], type[Any]] = {}


def _class_for(kind: Kind, original: type[Any]) -> type[Any]:
    """The subclass of ``original``, always the same one: types are compared by identity."""
    if (kind, original) in _classes:
        return _classes[kind, original]
    # what torch.export of torch 2.7 finds in torch.nn it runs without looking into it
    of_torch = original.__module__.startswith("torch.nn.")
    names = {
        "original": original,
        "kind": kind,
        "__module__": __name__ if of_torch else original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "forward": over(_MIXINS[kind], original),
    }
    metaclass: Any = type(original)
    made: type[Any] = metaclass(original.__name__, (_MIXINS[kind], original), names)
    return _classes.setdefault((kind, original), made)


def _blank(kind: Kind, original: type[nn.Module]) -> nn.Module:
    """An instance without state, for copies and pickles to fill."""
    made: nn.Module = nn.Module.__new__(_class_for(kind, original))
    return made


@dataclass
class ConversionReport:
    """What :func:`convert` would do to a model.

    ``converted`` and ``left`` are (name in the model, what it is or why it is left) pairs. As a
    string, a table.
    """

    converted: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("converted", name or "(the model)", what) for name, what in self.converted]
        rows += [("left", name or "(the model)", why) for name, why in self.left]
        if not rows:
            return "no dense block found"
        return columns(rows)

    __repr__ = __str__


def convert(
    model: nn.Module, save: Save | Sequence[Save] = "features", backend: str = "auto"
) -> nn.Module:
    """Make a model's dense blocks and transitions run in linear memory, in place.

    Outputs, gradients and buffers stay those of the original; parameters, state-dict keys,
    hooks on blocks and around them, and the modules' identities too. Recognised are blocks of
    BN-ReLU-Conv1x1-BN-ReLU-Conv3x3 or BN-ReLU-Conv3x3 layers however they are spelled
    (torchvision, timm, MONAI, torchxrayvision, segmentation-models-pytorch and the usual
    repositories), which run fused, and chains of other layers, each computed again in
    backward. A layer with ``memory_efficient=True`` is treated as without.

    Args:
        model: any module tree; wrapped models (DDP, Lightning) too.
        save: what each layer keeps for backward, as of :class:`effdense.DenseNet`; one mode,
            or one per dense block in the order of ``model.modules()``.
        backend: "auto", "torch", "cpu" or "triton".

    Returns:
        The model.

    Warns:
        UserWarning: where nothing was converted, or a dense block was left as it is, and why.

    Raises:
        ValueError: for an unknown ``save`` or ``backend``, or an nn.DataParallel.
    """
    for mode in [save] if isinstance(save, str) else save:
        check_save(mode)
    check_backend(backend)
    _check_model(model)
    report, undo = _change_classes(model)
    try:
        set_save(model, save)
    except ValueError:
        undo()
        raise
    for module in model.modules():
        if isinstance(module, (BlockForward, TransitionForward, SequentialForward)):
            module.backend = backend
    _warn(model, report)
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """What :func:`convert` would do to a model, which stays as it is; print it for a table.

    Raises:
        ValueError: for an nn.DataParallel.
    """
    _check_model(model)
    report, undo = _change_classes(model)
    undo()
    return report


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert` exactly, in place; returns the model.

    Networks built by this package stay what they are.
    """
    for module in model.modules():
        if isinstance(module, _Converted):
            for name in ("save", "offload", "backend"):
                vars(module).pop(name, None)
            module.__class__ = module.original  # type: ignore[assignment]
    return model


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            raise ValueError(
                f"{name or 'the model'} is an nn.DataParallel, which effdense does not run under; "
                "use one process per device with torch.nn.parallel.DistributedDataParallel (DDP)"
            )


def _change_classes(model: nn.Module) -> tuple[ConversionReport, Callable[[], None]]:
    """What was found in a model, and what puts everything back that was changed for it."""
    ungroup, left = group(model)
    before = {module: type(module) for module in model.modules()}
    report = ConversionReport()
    if _convert_blocks(model, report):
        _convert_readers(model, report)
    report.left += left.items()

    def undo() -> None:
        for module, kind in before.items():
            if type(module) is not kind:
                module.__class__ = kind
        ungroup()

    return report, undo


def _convert_blocks(model: nn.Module, found: ConversionReport) -> list[Any]:
    """All dense blocks, converted now or before, the outermost of nested ones."""
    blocks: list[Any] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if not isinstance(module, BlockForward):
            if not _looks_dense(module):
                continue
            kind = _block_kind(module)
            if kind not in ("dense block", "dense block, recomputed"):
                found.left.append((name, kind))
                continue
            _change_class(module, kind)  # type: ignore[arg-type]
        blocks.append(module)
        found.converted.append((name, _describe(module)))
        inside |= {id(child) for child in module.modules()}
    # a wrapper that was left says nothing where what it holds was converted
    done = [name for name, _ in found.converted]
    found.left = [
        (name, why)
        for name, why in found.left
        if not any(other.startswith(f"{name}.") or not name for other in done)
    ]
    return blocks


def _block_kind(block: nn.Module) -> str:
    """What a block can be converted to, or why it can't."""
    objection = _class_objection(block, ("save", "offload", "backend"))
    if objection is not None:
        return objection
    parts = read_block(block, type(block))
    if not isinstance(parts, str):
        return "dense block"
    chain = read_chain(block, type(block))
    if not isinstance(chain, str):
        return "dense block, recomputed"
    return parts if parts == chain else f"{parts}; {chain}"


def _looks_dense(module: nn.Module) -> bool:
    """Whether what a module holds reads ever more channels, each time by the same number."""
    layers = layers_of(module)
    if not layers or any(not layer._modules for layer in layers):
        return False
    widths = [input_width(layer) for layer in layers]
    if len(layers) == 1:
        return not isinstance(read_block(module, type(module)), str)
    known = [width for width in widths if width is not None]
    steps = {after - before for before, after in itertools.pairwise(known)}
    if len(known) < len(layers) or len(steps) != 1 or min(steps) <= 0:
        return False
    return all(_output_width(layer) in (None, *steps) for layer in layers)


def _output_width(layer: nn.Module) -> int | None:
    """Channels that the last convolution or linear map in a layer makes."""
    widths = [
        width
        for module in layer.modules()
        for attribute in ("out_channels", "out_features")
        if isinstance(width := getattr(module, attribute, None), int)
    ]
    return widths[-1] if widths else None


def _describe(block: Any) -> str:
    layers = layers_of(block)
    if not block.fused_layers:
        return f"dense block, {len(layers)} layers, each recomputed in backward"
    parts = read_block(block, block.original)
    if isinstance(parts, str) or not parts.layers:
        return f"dense block, {len(layers)} layers"
    first = parts.layers[0]
    growth = (first.conv1 if first.conv2 is None else first.conv2).out_channels
    return f"dense block, {len(layers)} layers of {growth} features"


def _convert_readers(model: nn.Module, found: ConversionReport) -> None:
    """Transitions, and the sequences in which they follow blocks."""
    inside = {
        id(child)
        for module in model.modules()
        if isinstance(module, BlockForward)
        for child in module.modules()
        if child is not module
    }
    for name, module in list(model.named_modules()):
        if id(module) in inside or isinstance(module, BlockForward):
            continue
        converted = isinstance(module, TransitionForward)
        if converted or _looks_like_transition(module):
            objection = None if converted else _class_objection(module, ("save", "backend"))
            original = module.original if converted else type(module)
            parts = read_transition(module, original) if objection is None else objection
            if isinstance(parts, str):
                if any("pool" in child for child in module._modules):
                    found.left.append((name, parts))
                continue
            if not converted:
                _change_class(module, "transition")
            growth = f"{parts.conv.in_channels} to {parts.conv.out_channels} channels"
            found.converted.append((name, f"transition, {growth}"))
    for name, module in list(model.named_modules()):
        converted = isinstance(module, SequentialForward)
        if converted or (
            type(module).forward is nn.Sequential.forward
            and any(
                isinstance(child, BlockForward) and child.fused_layers
                for child in module.children()
            )
            and _class_objection(module, ("save", "backend")) is None
        ):
            if not converted:
                _change_class(module, "sequence")
            found.converted.append((name, "sequence: blocks and transitions run together"))


def _looks_like_transition(module: nn.Module) -> bool:
    """One norm and one convolution of as many channels, directly inside."""
    children = [child for child in module._modules.values() if child is not None]
    norms = [child for child in children if isinstance(child, BATCH_NORMS)]
    convs = [child for child in children if isinstance(child, nn.modules.conv._ConvNd)]
    if len(norms) != 1 or len(convs) != 1 or len(children) > 5:
        return False
    conv = convs[0]
    return norms[0].num_features == conv.in_channels and set(conv.kernel_size) == {1}


def _class_objection(module: nn.Module, attributes: Sequence[str]) -> str | None:
    """Why a module's class can't be changed, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule; convert before scripting"
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    if getattr(module, "_is_replica", False):
        return "it is a replica of nn.DataParallel; use DistributedDataParallel (DDP)"
    for name in attributes:
        if hasattr(module, name):
            return f"it has an attribute {name!r} of its own"
    return None


def _change_class(module: nn.Module, kind: Kind) -> None:
    module.__class__ = _class_for(kind, type(module))


def _warn(model: nn.Module, found: ConversionReport) -> None:
    blocks = [what for _, what in found.converted if what.startswith("dense block")]
    if not blocks and not found.left:
        warnings.warn(
            f"effdense: no dense block found in this {type(model).__name__}; it is unchanged",
            stacklevel=3,
        )
    elif found.left:
        left = "; ".join(f"{name}: {why}" for name, why in found.left)
        warnings.warn(f"effdense: left as they are: {left}", stacklevel=3)
