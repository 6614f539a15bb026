"""How much memory a training step will take, before anything runs.

NOTE [ how it is known ]
A copy of the model whose tensors are on the meta device, which have shapes and no
storage, takes one training step while every tensor it makes is recorded (timeline.py).
Nothing is modelled a second time: the step runs the code that the real one will run,
but for what leaves no trace (meta.py, NOTE [ what a simulation leaves out ]).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import AUTOCAST_DTYPES
from ..backends.layout import round_up
from ..block.captured import Run, recorder
from ..block.forwards import BlockForward, dense_blocks, set_offload, set_save
from ..block.stepping import StepInBackward, step_in_backward
from ..choices import OptimizerName
from ..errors import first_line
from ..machine.tables import columns
from ..norms.synchronization import process_groups
from ..reference import DenseBlock
from .meta import DeviceType, simulation
from .optimizers import check_optimizer, make_optimizer
from .timeline import Peak, Training, record_step
from .workspaces import is_compiled_for


@dataclass(frozen=True)
class BlockEstimate:
    """One dense block of a network."""

    name: str
    save: str
    """Its mode."""
    kept: int
    """Bytes that it keeps for backward."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one training step at the moment of its peak."""

    peak: int
    parts: dict[str, int]
    """Of the peak: parameters (with buffers), gradients, optimizer, input, features, bottlenecks,
    gradient buffer, temporaries, and "ddp buckets" and "CUDA graphs" where there are."""
    moment: str
    """When the peak is."""
    blocks: tuple[BlockEstimate, ...]
    reserved: int | None = None
    """What CUDA's caching allocator takes from the device for them, on "cuda" only: not in it are
    the CUDA context and the libraries' workspaces (some hundred MiB, by driver and device)."""
    resident: int | None = None
    """What the process grows by on a CPU: more than the peak where torch's convolutions have to lay
    out their windows (float64, 16 bits on processors without them, volumes in those), and where
    code compiled for products in 16 bits is kept."""

    @property
    def needed(self) -> int:
        """Bytes that the device must have for it: reserved on "cuda", else resident."""
        return max(self.peak, self.reserved or 0, self.resident or 0)

    def __str__(self) -> str:
        rows = [(name, size, "") for name, size in self.parts.items() if size]
        rows.append(("peak", self.peak, f"({self.moment})"))
        if self.resident is not None and self.resident > self.peak:
            rows.append(
                ("resident", self.resident, "(with what operations on this type take inside)")
            )
        if self.reserved is not None:
            note = "(by the caching allocator; CUDA context and library workspaces not counted)"
            rows.append(("reserved", self.reserved, note))
        rows += [(f"{b.name} keeps", b.kept, f'(save="{b.save}")') for b in self.blocks]
        cells = [(name, f"{size / 2**20:,.1f} MiB", note) for name, size, note in rows]
        return columns(cells, right={1})

    __repr__ = __str__


def estimate(
    model: nn.Module,
    input_shape: Sequence[int] | Tensor,
    *,
    optimizer: OptimizerName = "sgd",
    momentum: float = 0.9,
    dtype: torch.dtype | None = None,
    ddp: bool = False,
    gradient_as_bucket_view: bool = False,
    step_in_backward: bool = False,
    cuda_graphs: bool = False,
    device: DeviceType = "cpu",
) -> Estimate:
    """Predict the peak memory of a training step; allocates none of it.

    The step is forward in training mode, cross-entropy, backward and the optimizer's
    update, with optimizer state in place, as in every step but a training's first.

    Args:
        model: effdense's or a converted one, in any mixture of save modes, or a naive one; on
            any device.
        input_shape: of a batch, (N, channels, *spatial); or a batch, whose shape it is.
        optimizer: "sgd", "adam", "adamw" or "rmsprop".
        momentum: of sgd.
        dtype: what is computed in: torch.float64 or torch.float32, of parameters and input
            too; torch.bfloat16 or torch.float16, by autocast over float32 parameters. None for
            the parameters' own type, whatever that is.
        ddp: whether DistributedDataParallel's buckets hold the gradients, once more.
        gradient_as_bucket_view: whether gradients are views of its buckets, as with that option
            of DistributedDataParallel and in ``train_ddp.py``: there from the beginning, and once.
        step_in_backward: whether :func:`effdense.step_in_backward` is used.
        cuda_graphs: whether :func:`effdense.cuda_graphs` is, on "cuda" only: what the graphs keep
            for good comes on top. A prediction that was never measured.
        device: "cpu" or "cuda": which backend's temporaries are counted; on "cpu" those of as many
            threads as torch has here.

    Raises:
        ValueError: for an argument outside its range, or an input that the model refuses.
    """
    rehearse = Rehearsal(
        model,
        optimizer=optimizer,
        momentum=momentum,
        dtype=dtype,
        ddp=ddp,
        gradient_as_bucket_view=gradient_as_bucket_view,
        step_in_backward=step_in_backward,
        cuda_graphs=cuda_graphs,
        device=device,
    )
    found = rehearse(input_shape)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return as_estimate(model, found, rehearse.bucket_bytes, device)


class Rehearsal:
    """Takes training steps of a copy of a model on meta tensors, for their peaks.

    Arguments and errors as of :func:`estimate`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerName = "sgd",
        momentum: float = 0.9,
        dtype: torch.dtype | None = None,
        ddp: bool = False,
        gradient_as_bucket_view: bool = False,
        step_in_backward: bool = False,
        cuda_graphs: bool = False,
        device: DeviceType = "cpu",
    ) -> None:
        check_optimizer(optimizer)
        if device not in ("cpu", "cuda"):
            raise ValueError(f'device must be "cpu" or "cuda", got {device!r}')
        if cuda_graphs and device != "cuda":
            raise ValueError(f'CUDA graphs need device="cuda", got {device!r}')
        if dtype not in (None, torch.float64, torch.float32, *AUTOCAST_DTYPES.values()):
            raise ValueError(
                "dtype must be torch.float64, torch.float32, torch.bfloat16, torch.float16 or "
                f"None, got {dtype!r}"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            ddp, gradient_as_bucket_view = True, model.gradient_as_bucket_view
            model = model.module
        self._gradients_stay = ddp and gradient_as_bucket_view
        self._optimizer, self._momentum, self._device = optimizer, momentum, device
        self._step_in_backward, self._cuda_graphs = step_in_backward, cuda_graphs
        self._steps: StepInBackward | None = None
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self._amp = dtype if dtype in AUTOCAST_DTYPES.values() and dtype != own else None
        self._dtype = (dtype or own) if self._amp is None else torch.float32
        # tensors that are made in inference mode have no gradients ever after
        with torch.inference_mode(False):
            self._twin: Any = meta_copy(model).to(self._dtype)
        if not model.training:
            self._twin.train()
        self._counting = _with_momentum(self._twin)
        twice = ddp and not gradient_as_bucket_view
        self.bucket_bytes = bucket_bytes(self._twin) if twice else 0
        """What DistributedDataParallel holds besides."""

    def __call__(
        self, input_shape: Sequence[int] | Tensor, save: Any = None, offload: Any = None
    ) -> Peak:
        """The peak of a step; ``save`` and ``offload`` are set in the copy where given."""
        shape = shape_of(input_shape)
        if save is not None:
            set_save(self._twin, save)
        if offload is not None:
            set_offload(self._twin, offload)
        computes_in = self._amp or self._dtype
        every_shape = self._device == "cpu" and is_compiled_for(computes_in)
        try:
            # a training step, whatever the caller is in the middle of
            with (
                simulation(self._device, every_shape),
                torch.inference_mode(False),
                torch.enable_grad(),
            ):
                if self._cuda_graphs:
                    return self._by_graphs(shape)
                return record_step(lambda: self._training(shape), places=places)
        except (RuntimeError, IndexError, NotImplementedError) as error:
            line = first_line(error)
            raise ValueError(f"the model refuses input of shape {shape}: {line}") from error
        finally:
            if self._steps is not None:
                self._steps.remove()

    def _by_graphs(self, shape: tuple[int, ...]) -> Peak:
        """Their pool keeps a step's peak, while all gradients come to be outside of it."""
        graphs = _Graphs(self._counting)
        token = recorder.set(graphs)
        try:
            found = record_step(lambda: self._training(shape), places=places)
        finally:
            recorder.reset(token)
        parts = found.parts | {"CUDA graphs": graphs.nbytes}
        missing = 0
        if not self._step_in_backward:
            missing = max(0, bucket_bytes(self._twin) - parts["gradients"])
        parts["gradients"] += missing
        more = graphs.nbytes + missing
        return replace(
            found,
            parts=parts,
            total=found.total + more,
            sizes=(*found.sizes, graphs.nbytes, missing),
            highs={moment: high + more for moment, high in found.highs.items()},
            resident=found.resident + more,
        )

    def _training(self, shape: tuple[int, ...]) -> Training:
        optimizer = make_optimizer(
            self._optimizer, self._twin.parameters(), momentum=self._momentum
        )
        if self._step_in_backward:
            self._steps = step_in_backward(self._twin, optimizer)
        return Training(
            self._twin,
            optimizer,
            torch.empty(shape, dtype=self._dtype, device="meta"),
            None,
            self._amp,
            self._gradients_stay,
        )


def shape_of(batch: Sequence[int] | Tensor) -> tuple[int, ...]:
    """The shape that a batch has, or that is given in its place.

    Raises:
        ValueError: where it is no batch's.
    """
    given = getattr(batch, "shape", batch)
    try:
        shape = tuple(map(operator.index, given))
    except TypeError:
        shape = ()
    if len(shape) < 3 or min(shape) < 1:
        raise ValueError(
            f"input_shape must be (N, channels, *spatial) of positive integers, got {given!r}"
        )
    return shape


class _Graphs:
    """Runs stages as ever, and adds up what graphs of them would keep between steps.

    A stage's input and output and their gradients, in the graphs' own copies, and its parameters'
    gradients beside those that leave the graph: see captured.py, ``Stage``.
    """

    def __init__(self, counting: Set[nn.Module]) -> None:
        self.nbytes = 0
        self._counting = counting
        """Norms whose stages can't be recorded."""

    def stage(self, owners: Sequence[nn.Module], x: Tensor, run: Run) -> Tensor | None:
        token = recorder.set(None)
        try:
            y = run(x)
        finally:
            recorder.reset(token)
        inside = chain.from_iterable(owner.modules() for owner in owners)
        if y is not None and y.requires_grad and self._counting.isdisjoint(inside):
            parameters = [p for owner in owners for p in owner.parameters() if p.requires_grad]
            kept = [x, y, y, *([x] if x.requires_grad else []), *parameters]
            self.nbytes += sum(t.nbytes for t in kept)
        return y


def _with_momentum(model: nn.Module) -> set[nn.Module]:
    """Give norms without momentum one, and say which: memory is the same, and theirs is of values.

    How many batches they have seen is read in every forward.
    """
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
            module.momentum = 0.1
            found.add(module)
    return found


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model without its values: same modules, parameters and buffers on meta."""
    memo = process_groups(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


def places(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter with the dense block that it is in or behind; "stem" before the first.

    A block and what reads it compute together: see dense_block.py.
    """
    blocks = block_names(model)
    place = "stem"
    for name, parameter in model.named_parameters():
        place = next((block for block in blocks if name.startswith(f"{block}.")), place)
        yield place, parameter


def block_names(model: nn.Module) -> tuple[str, ...]:
    """The dense blocks' names, first to last."""
    return tuple(dense_blocks(model, (BlockForward, DenseBlock)))


def as_estimate(
    model: nn.Module,
    found: Peak,
    buckets: int,
    device: DeviceType,
    save: Sequence[str] | None = None,
) -> Estimate:
    """What :class:`Rehearsal` found, with so many bytes of DDP's buckets.

    ``save`` are the blocks' modes where they aren't the model's own.
    """
    parts, sizes = dict(found.parts), list(found.sizes)
    if buckets:
        parts["ddp buckets"] = buckets
        sizes.append(buckets)
    names = block_names(model)
    if save is None:
        save = [getattr(model.get_submodule(name), "save", "all") for name in names]
    blocks = tuple(
        BlockEstimate(name, mode, found.kept.get(name, 0))
        for name, mode in zip(names, save, strict=True)
    )
    moment = found.phase if found.phase in ("setup", "update") else f"{found.phase}, {found.place}"
    reserved = reserved_bytes(sizes) if device == "cuda" else None
    resident = found.resident + buckets if device == "cpu" else None
    return Estimate(sum(parts.values()), parts, moment, blocks, reserved, resident)


def bucket_bytes(model: nn.Module) -> int:
    """DDP's buckets, which hold every gradient a second time."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def reserved_bytes(sizes: Sequence[int]) -> int:
    """What CUDA's caching allocator takes from the device for tensors of these sizes.

    Its rules: up to 1 MiB in multiples of 512 bytes out of segments of 2 MiB; up to 10 MiB
    out of segments of 20 MiB; larger ones in multiples of 2 MiB. Fragmentation, which
    depends on the order of events, is not in it.
    """
    mib = 1 << 20
    small = sum(round_up(size, 512) for size in sizes if size <= mib)
    middle = sum(round_up(size, 512) for size in sizes if mib < size < 10 * mib)
    large = sum(round_up(size, 2 * mib) for size in sizes if size >= 10 * mib)
    return round_up(small, 2 * mib) + round_up(middle, 20 * mib) + large
