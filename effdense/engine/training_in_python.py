"""Training from Python: what ``effdense train`` does, on any model and any data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .options import TrainConfig
from .scores import Score
from .training import Epoch, run


@dataclass(frozen=True)
class TrainResult:
    """What a run has come to."""

    work_dir: Path
    """Of its files; ``effdense.load(result.work_dir)`` gives the best epoch's network."""
    best_epoch: int
    """Counted from 1."""
    tests: Mapping[int, Score]
    """By epoch: loss, error in per cent, samples."""


def train(
    config: TrainConfig | None = None,
    *,
    model: nn.Module | None = None,
    data: tuple[Any, Any] | None = None,
    on_epoch: Callable[[Epoch], object] | None = None,
) -> TrainResult:
    """Train as the command line does: with checkpoints, exact resumption and a report.

    Under torchrun, or in processes that have RANK, WORLD_SIZE and the like, every process calls it.

    Args:
        config: the options, named as on the command line; :class:`TrainConfig()` where None.
        model: what learns, instead of ``arch``: any module that maps (N, channels, *spatial) to
            (N, classes). Its dense blocks are made linear, in place, and it is trained in place.
        data: a training and a test set, instead of ``config.data``: each of torch's protocol, with
            a length and items of (image, label). Images are float tensors (channels, *spatial) of
            one shape, used as they are; labels numbers of classes, or, of labels that don't exclude
            each other, float tensors (classes,) of 1, 0 and NaN for what is not known.
        on_epoch: called on rank 0 after each epoch's test: the place for other loggers.

    Returns:
        Where it all is, and how good it became.

    Raises:
        ValueError: for what can be mended; says how.
        RuntimeError: for a loss that is not finite, and for a run that was told to stop, which the
            same call with the same ``work_dir`` goes on with.
    """
    standings, work_dir = run(config or TrainConfig(), model=model, data=data, on_epoch=on_epoch)
    return TrainResult(work_dir, standings.best, standings.tests)
