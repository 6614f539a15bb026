"""Choosing what each block saves, so that a training step fits a budget of memory.

NOTE [ how a mixture is predicted ]
A block's own memory depends on its own mode; of other blocks it only sees what they keep,
and in backward later blocks keep nothing any more. So one timeline on meta tensors per mode,
for the whole network, gives the peak of every mixture: in block b's forward or backward it
is the peak measured there in the run of b's mode, with what the blocks before it kept in
that run replaced by what they keep in theirs. The one that is chosen is then measured on
meta tensors itself.

NOTE [ the search ]
is exact. From the first block to the last, of all choices for the blocks so far only the sum
of what they keep and their cost matter to what follows; one that keeps no less than another
and costs no less is dropped, and so is one whose peak is over the limit already.

NOTE [ predicted time ]
In arithmetic: a product's forward counts one, its backward two, and what a mode computes
again as often as it does. "all" is a candidate only where what is kept goes elsewhere: plain
autograd keeps more than "bottlenecks" does and is slower, for it moves a concatenation per
layer. What goes elsewhere takes a time that nobody can tell beforehand (a disk's, a bus's):
of two choices the one that moves fewer bytes counts as faster, whatever the arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..block.forwards import dense_blocks, set_offload, set_save
from ..choices import Save
from ..machine.memory import available_bytes
from ..machine.sizes import parse_size, show_size
from ..machine.tables import columns
from ..models import densenet_bc
from ..recognition.reading import read_block
from .estimation import Estimate, Rehearsal, as_estimate, block_names, estimate, shape_of
from .timeline import Peak

CANDIDATES: tuple[Save, ...] = ("bottlenecks", "features", "slabs", "input")

# What "auto" leaves to the rest of the process: libraries' workspaces, the allocator's slack.
_AUTO_SHARE = 0.9


class _Mode(NamedTuple):
    """What a block keeps, and where."""

    save: Save
    offload: bool | None = None
    """Whether elsewhere; None: as the model has it."""


_AS_IT_IS = tuple(_Mode(save) for save in CANDIDATES)
_STAYING = tuple(_Mode(save, False) for save in CANDIDATES)
_EITHER = _STAYING + tuple(_Mode(save, True) for save in ("all", *CANDIDATES))
_NAIVE = _Mode("all", False)


class BudgetError(ValueError):
    """No choice fits the budget; ``least`` is the number of bytes that would do."""

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True)
class Plan:
    """What each dense block is to save, and whether to keep it elsewhere until backward."""

    save: tuple[Save, ...]
    offload: tuple[bool, ...]
    names: tuple[str, ...]
    """Of the blocks."""
    budget: int
    """Bytes."""
    peak: int
    """Predicted, bytes."""
    slowdown: float
    """Predicted time of a step over that of the fastest plan, by arithmetic."""
    moved: int
    """Bytes out of the device and back in a step, by offloading."""
    naive: int
    """Bytes that the naive network needs."""
    estimate: Estimate

    def apply(self, model: nn.Module) -> nn.Module:
        """Set each block's mode; returns the model.

        Raises:
            ValueError: for a model of another number of blocks.
        """
        set_save(model, self.save)
        set_offload(model, self.offload)
        return model

    def __str__(self) -> str:
        kept = {block.name: block.kept for block in self.estimate.blocks}
        chosen = [
            f"{save}, offloaded" if away else save
            for save, away in zip(self.save, self.offload, strict=True)
        ]
        rows = [["block", "save", "keeps"]]
        for name, save in zip(self.names, chosen, strict=True):
            rows.append([name, save, show_size(kept[name])])
        lines = [columns(rows, right={2})]
        lines.append(
            f"predicted peak {show_size(self.peak)} of a budget of {show_size(self.budget)} "
            f"({self.estimate.moment})"
        )
        lines.append(f"predicted time {self.slowdown:.2f} x the fastest plan's (by arithmetic)")
        if self.moved:
            lines[-1] += f", and that of moving {show_size(self.moved)} out and back"
        lines.append(f"the naive network needs {show_size(self.naive)}")
        return "\n".join(lines)

    __repr__ = __str__


def plan(
    model: nn.Module,
    input_shape: Sequence[int] | Tensor,
    budget: int | str = "auto",
    *,
    objective: Literal["time"] = "time",
    offload: bool = False,
    **options: Any,
) -> Plan:
    """The fastest choice of save modes whose predicted peak fits ``budget``.

    Args:
        model: an effdense network or a converted model; it is not changed (see
            :meth:`Plan.apply`).
        input_shape: as of :func:`effdense.estimate`.
        budget: bytes, a size such as "8GiB", or "auto": nine tenths of what the device has
            free, control groups respected.
        objective: "time".
        offload: whether blocks may keep what they keep outside the device
            (:func:`effdense.offload`) where nothing else fits. If False, each block's own
            ``offload`` stays as it is.
        options: as of :func:`effdense.estimate`.

    Raises:
        BudgetError: (a ValueError) where no choice fits; it says what would.
        ValueError: for an argument outside its range, or an input that the model refuses.
    """
    if objective != "time":
        raise ValueError(f'objective must be "time", got {objective!r}')
    search = _Search(model, input_shape, budget, options)
    found = search.best(_STAYING if offload else _AS_IT_IS)
    if found is None and offload:
        found = search.best(_EITHER)
    return search.refuse(offload) if found is None else found


class _Search:
    """The rehearsals of a model, one per mode, and what fits its budget."""

    def __init__(
        self,
        model: nn.Module,
        input_shape: Sequence[int] | Tensor,
        budget: int | str,
        options: dict[str, Any],
    ) -> None:
        self._rehearse = Rehearsal(model, **options)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        self.model, self.shape = model, shape_of(input_shape)
        self.device = options.get("device", "cpu")
        self.blocks = dense_blocks(model)
        if not self.blocks:
            raise ValueError(
                f"no dense block to plan for in this {type(model).__name__}: pass an effdense "
                "network, or effdense.convert the model first"
            )
        self.names = block_names(model)
        self.limit = budget_bytes(budget, self.device)
        self.buckets = self._rehearse.bucket_bytes
        self._runs: dict[_Mode, Peak] = {}

    def run(self, mode: _Mode) -> Peak:
        """The whole network in one mode."""
        if mode not in self._runs:
            self._runs[mode] = self._rehearse(self.shape, *self._whole([mode] * len(self.blocks)))
        return self._runs[mode]

    def _whole(self, modes: Sequence[_Mode]) -> tuple[tuple[Save, ...], tuple[bool, ...]]:
        pairs = list(zip(modes, self.blocks.values(), strict=True))
        away = [block.offload if m.offload is None else m.offload for m, block in pairs]
        return tuple(mode.save for mode in modes), tuple(away)

    def best(self, modes: Sequence[_Mode]) -> Plan | None:
        """The plan of the least cost that fits, of mixtures of ``modes``; None where none does."""
        costs = _Costs(self, modes)
        limit = self.limit - self.buckets
        while (mixture := costs.cheapest(limit)) is not None:
            found = self._rehearsed(mixture)
            if found.needed <= self.limit:
                break
            # composed less exactly than it is rehearsed
            limit = costs.peak(mixture) - 1
        else:
            return None
        moved, work = costs.cost(mixture)
        save, away = self._whole(mixture)
        return Plan(
            save=save,
            offload=away,
            names=self.names,
            budget=self.limit,
            peak=found.needed,
            slowdown=work / costs.fastest(),
            moved=moved,
            naive=self._rehearsed([_NAIVE] * len(self.blocks)).needed,
            estimate=found,
        )

    def _rehearsed(self, mixture: Sequence[_Mode]) -> Estimate:
        save, away = self._whole(mixture)
        found = self._rehearse(self.shape, save, away)
        return as_estimate(self.model, found, self.buckets, self.device, save)

    def refuse(self, offload: bool) -> Plan:
        """Say what would do, by an exception."""
        least, away = (
            self._rehearsed(_Costs(self, modes).smallest()).needed for modes in (_AS_IT_IS, _EITHER)
        )
        advice = "Raise the budget, reduce the batch (see effdense.largest_batch), compute in 16 "
        advice += "bits (dtype)"
        if away < least:
            if offload:
                least = away
            else:
                advice += f", or keep tensors outside the device (offload: {show_size(away)})"
        raise BudgetError(
            f"no choice of save modes fits a budget of {show_size(self.limit)}: a batch of "
            f"{self.shape[0]} needs at least {show_size(least)}. {advice}",
            least,
        )


class _Costs:
    """What each block costs in each mode; see NOTE [ how a mixture is predicted ]."""

    def __init__(self, search: _Search, modes: Sequence[_Mode]) -> None:
        self.modes = modes
        self._kept: list[dict[_Mode, int]] = []
        # the highest moment in a block, without what the blocks before it keep
        self._own: list[dict[_Mode, int]] = []
        # bytes moved, and multiplications
        self._cost: list[dict[_Mode, tuple[int, int]]] = []
        runs = {mode: search.run(mode) for mode in modes}
        for i, (name, block) in enumerate(search.blocks.items()):
            # the stem keeps what the first block's mode says: see stem.py
            here = {name, "stem"} if i == 0 else {name}
            kept_here = {m: sum(run.kept.get(p, 0) for p in here) for m, run in runs.items()}
            self._kept.append(kept_here)
            before = {mode: sum(kept[mode] for kept in self._kept[:i]) for mode in modes}
            self._own.append(
                {mode: _highest(run, here, i == 0) - before[mode] for mode, run in runs.items()}
            )
            cost = {}
            for mode, run in runs.items():
                moved = 0
                if mode.offload:
                    moved = search.run(_Mode(mode.save, False)).kept.get(name, 0)
                    moved -= run.kept.get(name, 0)
                cost[mode] = moved, _work(block, mode.save) * _positions(runs.values(), name)
            self._cost.append(cost)

    def peak(self, mixture: Sequence[_Mode]) -> int:
        peak = before = 0
        for own, kept, mode in zip(self._own, self._kept, mixture, strict=True):
            peak = max(peak, own[mode] + before)
            before += kept[mode]
        return peak

    def cost(self, mixture: Sequence[_Mode]) -> tuple[int, int]:
        """Bytes moved and multiplications of a step in the dense blocks."""
        costs = [cost[mode] for cost, mode in zip(self._cost, mixture, strict=True)]
        return sum(moved for moved, _ in costs), sum(work for _, work in costs)

    def fastest(self) -> int:
        """The fewest multiplications of any choice."""
        return max(1, sum(min(work for _, work in cost.values()) for cost in self._cost))

    def cheapest(self, limit: int) -> tuple[_Mode, ...] | None:
        """The choice of least cost with a peak within ``limit``; see NOTE [ the search ]."""
        found: list[tuple[int, tuple[int, int], tuple[_Mode, ...]]] = [(0, (0, 0), ())]
        for own, kept, cost in zip(self._own, self._kept, self._cost, strict=True):
            longer = [
                (before + kept[mode], (moved + cost[mode][0], work + cost[mode][1]), (*ms, mode))
                for before, (moved, work), ms in found
                for mode in self.modes
                if own[mode] + before <= limit
            ]
            found = []
            for each in sorted(longer):
                if not found or each[1] < found[-1][1]:
                    found.append(each)
        return found[-1][2] if found else None

    def smallest(self) -> Sequence[_Mode]:
        """The choice of the smallest peak."""
        smallest: Sequence[_Mode] = [self.modes[0]] * len(self._own)
        low, high = 0, self.peak(smallest)
        while high - low > 1:
            middle = (low + high) // 2
            mixture = self.cheapest(middle)
            if mixture is None:
                low = middle
            else:
                smallest, high = mixture, self.peak(mixture)
        return smallest


def _highest(run: Peak, places: set[str], with_update: bool) -> int:
    return max(
        high
        for (phase, place), high in [*run.highs.items(), (("", ""), 0)]
        if (phase in ("forward", "backward") and place in places)
        or (phase == "update" and with_update)
        or not phase
    )


def _positions(runs: Any, name: str) -> int:
    """Batch times pixels of a block; 1 where it ran layer by layer in every run."""
    return next((run.positions[name] for run in runs if name in run.positions), 1)


def _work(block: Any, save: Save) -> int:
    """Multiplications per position of a block's step; see NOTE [ predicted time ]."""
    products = sum(p.numel() for p in block.parameters() if p.dim() > 1)
    parts = read_block(block, block.original) if block.fused_layers else "recomputed"
    if isinstance(parts, str):
        # every layer is run again in backward
        again = {"all": 0, "input": 2 * products}.get(save, products)
    else:
        rebuilt = sum(x.conv1.weight.numel() for x in parts.layers if x.conv2 is not None)
        convolved = sum(x.conv2.weight.numel() for x in parts.layers if x.conv2 is not None)
        again = {
            "features": rebuilt,
            "slabs": 2 * rebuilt + convolved,
            "input": products + rebuilt,
        }.get(save, 0)
    return 3 * products + again


class Choice(NamedTuple):
    """A save mode per block."""

    save: tuple[Save, ...]
    peak: int
    """Predicted, bytes."""
    slowdown: float
    """Predicted time over that of the fastest choice."""


def choices(model: nn.Module, input_shape: Sequence[int] | Tensor, **options: Any) -> list[Choice]:
    """Every mixture of save modes, fastest first; options as of :func:`effdense.estimate`.

    Raises:
        ValueError: for an argument outside its range, or an input that the model refuses.
    """
    search = _Search(model, input_shape, 1, options)
    costs = _Costs(search, _AS_IT_IS)
    mixtures = itertools.product(_AS_IT_IS, repeat=len(search.names))
    found = [
        Choice(tuple(mode.save for mode in m), costs.peak(m), costs.cost(m)[1] / costs.fastest())
        for m in mixtures
    ]
    return sorted(found, key=lambda choice: (choice.slowdown, choice.peak))


def largest_batch(
    model: nn.Module,
    input_shape: Sequence[int] | Tensor,
    budget: int | str = "auto",
    **options: Any,
) -> int:
    """The largest batch whose predicted peak fits ``budget``, with the model's save modes.

    Args:
        model: as of :func:`plan`.
        input_shape: likewise; its N does not matter.
        budget: likewise.
        options: likewise.

    Raises:
        BudgetError: (a ValueError) where not even two images fit.
    """
    device = options.get("device", "cpu")
    limit = budget_bytes(budget, device)
    image_shape = shape_of(input_shape)[1:]
    rehearse = Rehearsal(model, **options)
    buckets = rehearse.bucket_bytes

    def peak(images: int) -> int:
        found = rehearse((images, *image_shape))
        return as_estimate(model, found, buckets, device).needed

    # the fewest that batch statistics can always be taken of
    return _largest(peak, 2, limit, "a batch of 2")


def deepest(
    growth_rate: int,
    batch_size: int,
    budget: int | str = "auto",
    *,
    image_size: int = 32,
    save: Save = "features",
    **options: Any,
) -> int:
    """The depth of the deepest DenseNet-BC (CIFAR family) that trains within ``budget``.

    Args:
        growth_rate: channels per layer.
        batch_size: images per step.
        budget: as of :func:`plan`.
        image_size: height and width, pixels.
        save: what every block saves.
        options: as of :func:`effdense.estimate`.

    Raises:
        BudgetError: (a ValueError) where not even depth 10 fits.
    """
    limit = budget_bytes(budget, options.get("device", "cpu"))

    def peak(layers: int) -> int:
        with torch.device("meta"):
            model = densenet_bc(6 * layers + 4, growth_rate, save=save)
        return estimate(model, (batch_size, 3, image_size, image_size), **options).needed

    return 6 * _largest(peak, 1, limit, "depth 10") + 4


def budget_bytes(budget: int | str, device: str) -> int:
    """A budget in bytes.

    Raises:
        ValueError: where it is not a positive size.
    """
    if budget == "auto":
        return int(available_bytes(device) * _AUTO_SHARE)
    if isinstance(budget, str):
        try:
            return parse_size(budget)
        except ValueError as error:
            raise ValueError(f'budget {error}; or give "auto"') from None
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f'budget must be bytes, a size such as "8GiB" or "auto", got {budget!r}')
    return budget


def _largest(peak: Callable[[int], int], first: int, limit: int, what: str) -> int:
    """The largest n >= ``first`` with peak(n) <= ``limit``; peak grows with n."""
    least = peak(first)
    if least > limit:
        raise BudgetError(
            f"{what} needs {show_size(least)}, more than the budget of {show_size(limit)}", least
        )
    return largest(lambda n: peak(n) <= limit, first)


def largest(fits: Callable[[int], bool], first: int) -> int:
    """The largest n for which ``fits``; it does for ``first``, and for all n up to the largest."""
    low, high = first, 2 * first
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
