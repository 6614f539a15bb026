"""Choosing what each block saves, so that a training step fits a budget of memory.

NOTE [ how a mixture is predicted ]
A block's own memory depends on its own mode; of other blocks it only sees what they keep,
and in backward later blocks keep nothing any more. So three timelines on meta tensors, one
per mode for the whole network, give the peak of every mixture: in block b's forward or
backward it is the peak measured there in the run of b's mode, with what the blocks before
it kept in that run replaced by what they keep in theirs. All mixtures are tried; the one
that is chosen is then measured on meta tensors itself.

NOTE [ predicted time ]
In arithmetic: a product's forward counts one, its backward two, and what a mode computes
again as often as it does. "all" is not a candidate: plain autograd keeps more than
"bottlenecks" does and is slower, for it moves a concatenation per layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from .dense_block import Save
from .estimation import (
    Estimate,
    Rehearsal,
    as_estimate,
    block_names,
    bucket_bytes,
    estimate,
)
from .memory_sizes import available_bytes, parse_size, show_size
from .models import DenseNet, densenet_bc
from .timeline import Peak

CANDIDATES: tuple[Save, ...] = ("bottlenecks", "features", "input")

# What "auto" leaves to the rest of the process: libraries' workspaces, the allocator's slack.
_AUTO_SHARE = 0.9


class BudgetError(ValueError):
    """No choice fits the budget; ``least`` is the number of bytes that would do."""

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True)
class Plan:
    """What each dense block is to save.

    Bytes: ``budget``, ``peak`` (predicted), ``naive`` (what the naive
    network needs). ``slowdown`` is the predicted time of a step over that of the
    fastest plan, by arithmetic.
    """

    save: tuple[Save, ...]
    names: tuple[str, ...]
    budget: int
    peak: int
    slowdown: float
    naive: int
    estimate: Estimate

    def apply(self, model: DenseNet) -> DenseNet:
        """Set each block's mode; returns the model."""
        model.save = self.save
        return model

    def __str__(self) -> str:
        kept = {block.name: block.kept for block in self.estimate.blocks}
        width = max(map(len, ("block", *self.names)))
        lines = [f"{'block':<{width}}  {'save':<11}  {'keeps':>10}"]
        for name, save in zip(self.names, self.save, strict=True):
            lines.append(f"{name:<{width}}  {save:<11}  {show_size(kept[name]):>10}")
        lines.append(
            f"predicted peak {show_size(self.peak)} of a budget of {show_size(self.budget)} "
            f"({self.estimate.moment})"
        )
        lines.append(f"predicted time {self.slowdown:.2f} x the fastest plan's (by arithmetic)")
        lines.append(f"the naive network needs {show_size(self.naive)}")
        return "\n".join(lines)


def plan(
    model: DenseNet,
    input_shape: Sequence[int],
    budget: int | str = "auto",
    *,
    objective: Literal["time"] = "time",
    **options: Any,
) -> Plan:
    """The fastest choice of save modes whose predicted peak fits ``budget``.

    Args:
        model: any effdense network; it is not changed (see :meth:`Plan.apply`).
        input_shape: of a batch, (N, channels, *spatial).
        budget: bytes, a size such as "8GiB", or "auto": nine tenths of what the device has
            free, control groups respected.
        objective: "time".
        options: as of :func:`effdense.estimate`.

    Raises:
        BudgetError: (a ValueError) where no choice fits; it says what would.
        ValueError: for an argument outside its range, or an input that the model refuses.
    """
    if not isinstance(model, DenseNet):
        raise ValueError(f"plan needs an effdense.DenseNet, got {type(model).__name__}")
    if objective != "time":
        raise ValueError(f'objective must be "time", got {objective!r}')
    device = options.get("device", "cpu")
    limit = budget_bytes(budget, device)
    ddp = options.pop("ddp", False)
    rehearse = Rehearsal(model, **options)
    names = block_names(model)
    buckets = bucket_bytes(model, options.get("dtype")) if ddp else 0
    choices = _choices(model, rehearse, input_shape)
    for save, peak, slowdown in choices:
        if peak + buckets > limit:
            continue
        found = rehearse(input_shape, save)
        chosen = as_estimate(model, found, buckets, device, save)
        if chosen.peak <= limit:
            naive = rehearse(input_shape, "all").total + buckets
            return Plan(save, names, limit, chosen.peak, slowdown, naive, chosen)
    least = min(choice.peak for choice in choices) + buckets
    offloaded = ""
    if not all(model.offload):
        everywhere: tuple[Save, ...] = ("all", *CANDIDATES)
        away = {mode: rehearse(input_shape, mode, True).total + buckets for mode in everywhere}
        mode = min(everywhere, key=lambda mode: away[mode])
        if away[mode] < least:
            offloaded = (
                f', or keep tensors outside the device (model.save = "{mode}", model.offload = '
                f"True: {show_size(away[mode])})"
            )
    raise BudgetError(
        f"no choice of save modes fits a budget of {show_size(limit)}: a batch of "
        f"{input_shape[0]} needs at least {show_size(least)}. Raise the budget, reduce the batch "
        f"(see effdense.largest_batch), compute in 16 bits (amp){offloaded}",
        least,
    )


class Choice(NamedTuple):
    """A save mode per block, its predicted peak in bytes, and its time over the fastest's."""

    save: tuple[Save, ...]
    peak: int
    slowdown: float


def choices(model: DenseNet, input_shape: Sequence[int], **options: Any) -> list[Choice]:
    """Every choice that :func:`plan` has, fastest first; options as of :func:`effdense.estimate`.

    Raises:
        ValueError: for an argument outside its range, or an input that the model refuses.
    """
    return _choices(model, Rehearsal(model, **options), input_shape)


def _choices(model: DenseNet, rehearse: Rehearsal, input_shape: Sequence[int]) -> list[Choice]:
    # See NOTE [ how a mixture is predicted ].
    runs = {mode: rehearse(input_shape, mode) for mode in CANDIDATES}
    names = block_names(model)
    mixtures = sorted(
        (_work(model, names, mixture, runs), _peak(names, mixture, runs), mixture)
        for mixture in itertools.product(*[CANDIDATES] * len(names))
    )
    fastest = mixtures[0][0]
    return [Choice(mixture, peak, work / fastest) for work, peak, mixture in mixtures]


def largest_batch(
    model: DenseNet, input_shape: Sequence[int], budget: int | str = "auto", **options: Any
) -> int:
    """The largest batch whose predicted peak fits ``budget``, with the model's save modes.

    Args:
        model: as of :func:`plan`.
        input_shape: likewise; ``input_shape[0]`` does not matter.
        budget: likewise.
        options: likewise.

    Raises:
        BudgetError: (a ValueError) where not even two images fit.
    """
    limit = budget_bytes(budget, options.get("device", "cpu"))
    buckets = bucket_bytes(model, options.get("dtype")) if options.pop("ddp", False) else 0
    rehearse = Rehearsal(model, **options)

    def peak(images: int) -> int:
        return rehearse((images, *input_shape[1:])).total + buckets

    # the fewest that batch statistics can always be taken of
    return _largest(peak, 2, limit, "a batch of 2")


def deepest(
    growth_rate: int,
    batch: int,
    budget: int | str = "auto",
    *,
    image_size: int = 32,
    save: Save = "features",
    **options: Any,
) -> int:
    """The depth of the deepest DenseNet-BC (CIFAR family) that trains within ``budget``.

    Args:
        growth_rate: channels per layer.
        batch: images per step.
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
        return estimate(model, (batch, 3, image_size, image_size), **options).peak

    return 6 * _largest(peak, 1, limit, "depth 10") + 4


def budget_bytes(budget: int | str, device: str) -> int:
    """A budget in bytes.

    Raises:
        ValueError: where it is not a positive size.
    """
    if budget == "auto":
        return int(available_bytes(device) * _AUTO_SHARE)
    if isinstance(budget, str):
        return parse_size(budget)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f'budget must be bytes, a size such as "8GiB" or "auto", got {budget!r}')
    return budget


def _peak(names: Sequence[str], mixture: Sequence[Save], runs: dict[Save, Peak]) -> int:
    """Peak of a mixture of modes; see NOTE [ how a mixture is predicted ]."""
    peak = 0
    for i, place in enumerate(("stem", *names)):
        run = runs[mixture[max(0, i - 1)]]
        earlier = list(zip(names, mixture, strict=True))[: max(0, i - 1)]
        replaced = sum(runs[mode].kept[name] - run.kept[name] for name, mode in earlier)
        highs = (run.highs.get((phase, place), 0) for phase in ("forward", "backward"))
        peak = max(peak, max(highs) + replaced)
    rest = (high for (phase, _), high in runs[mixture[0]].highs.items() if phase == "update")
    return max([peak, *rest])


def _work(
    model: DenseNet, names: Sequence[str], mixture: Sequence[Save], runs: dict[Save, Peak]
) -> int:
    """Multiplications of a step in the dense blocks; see NOTE [ predicted time ]."""
    total = 0
    for name, mode in zip(names, mixture, strict=True):
        layers: list[Any] = list(model.get_submodule(name).children())
        rebuilt = sum(x.conv1.weight.numel() for x in layers if hasattr(x, "conv2"))
        products = sum(p.numel() for x in layers for p in x.parameters() if p.dim() > 1)
        again = {"bottlenecks": 0, "features": rebuilt, "input": products + rebuilt}[mode]
        total += runs["features"].positions[name] * (3 * products + again)
    return total


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
