"""What a checkpoint of a run holds, when one is taken, and how a run goes on from it.

Rank 0 alone reads and writes; what is another process's own goes through it. A run that goes on
with as many processes as before ends with the same bits as one that was never interrupted. That
rests on five things, each with a test:

- the order of an epoch and what augmentation does to a sample are functions of the seed, the
  epoch and the sample (see :mod:`effdense.engine.data.order`);
- every process's random state, which dropout draws from, is kept;
- so are every process's buffers, as batch norm's running statistics differ between processes
  until an evaluation averages them;
- the scores summed so far in the epoch are kept, and the CSV files are put back to what they
  were at the checkpoint;
- gradients are summed in the same order from the first step on (see
  :meth:`effdense.engine.trainer.Trainer.settle_buckets`).
"""

from __future__ import annotations

import io
import json
import signal
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effdense.machine.environment import versions

from ..errors import Interrupted, UserError
from .checkpoint import Checkpoint, CheckpointStore, Position
from .data.order import random_key
from .distributed import (
    LateLargest,
    World,
    all_or_none,
    from_main,
    gathered_on_main,
    largest,
)
from .options import ROUNDING, ResolvedConfig, renamed
from .records import CsvLog, saved
from .signals import StopSignals
from .trainer import Trainer

_OTHER_SHARES = (
    "; batch norm sees other shares of a batch and starts from the mean of the processes' running "
    "statistics"
)


class Keeper:
    """Takes a run's checkpoints and stops it when it is told to; the same on every process.

    Args:
        trainer: what is kept.
        config: the run's options.
        world: this process's place.
        store: where checkpoints go; None on every process but rank 0.
        logs: file name to the CSV files that are put back when the run goes on; likewise.
        signals: what this process has been told.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: ResolvedConfig,
        world: World,
        store: CheckpointStore | None,
        logs: Mapping[str, CsvLog],
        signals: StopSignals,
    ) -> None:
        self._trainer, self._config, self._world = trainer, config, world
        self._store, self._logs, self._signals = store, logs, signals
        self._saved_at = time.monotonic()
        self._agreed = LateLargest()

    def after_step(self, steps_left: int) -> None:
        """Save if it is time to, and stop if any process has been told to; a collective.

        Args:
            steps_left: in this epoch; after its last step its end is saved anyway.

        Raises:
            Interrupted: on every process, once the run can be gone on with.
        """
        minutes = self._config.checkpoint_minutes
        is_old = minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes
        # of the step before: to agree on this one now would wait for every process
        stop, old = self._agreed([self._signals.received, is_old], last=not steps_left)
        every = self._config.checkpoint_steps
        due = bool(old) or (every > 0 and self._trainer.position.step % every == 0)
        if stop or (due and steps_left):
            self.save()
        if stop:
            self._stop(round(stop))

    def after_epoch(self, badness: float) -> None:
        """Save the end of an epoch, and stop if any process has been told to; a collective.

        Raises:
            Interrupted: on every process.
        """
        self.save(badness)
        (stop,) = largest([self._signals.received])
        if stop:
            self._stop(round(stop))

    def save(self, badness: float | None = None) -> None:
        """Publish a checkpoint of this moment; a collective.

        Raises:
            UserError: where the disk refuses, on every process.
            TrainingError: where the weights are not finite, on every process.
        """
        trainer = self._trainer
        trainer.check()
        own = gathered_on_main(saved(trainer.own_state()))
        with all_or_none():
            if self._store is not None:
                run = {
                    "position": {"epoch": trainer.position.epoch, "step": trainer.position.step},
                    "options": self._config.options(),
                    "surroundings": surroundings(self._config, self._world),
                    "logs": {name: log.text() for name, log in self._logs.items()},
                }
                files = {
                    "run.json": json.dumps(run, indent=1).encode(),
                    "state.pt": saved(trainer.shared_state()),
                    **{f"rank-{rank}.pt": state for rank, state in enumerate(own)},
                }
                self._store.publish(trainer.position, files, badness)
        self._saved_at = time.monotonic()

    def _stop(self, number: int) -> None:
        place = self._trainer.position
        stopped = Interrupted(
            f"stopped by {signal.Signals(number).name} before step {place.step + 1} of epoch "
            f"{place.epoch}"
        )
        if self._store is not None:
            stopped.work_dir = str(self._store.folder.parent)
        raise stopped


def surroundings(config: ResolvedConfig, world: World) -> dict[str, Any]:
    """What the last bits of a result may depend on besides the options."""
    return {
        "processes": world.world_size,
        "device": world.device.type,
        "threads": config.threads,
        "torch": versions()["torch"],
    }


def go_on(
    trainer: Trainer, checkpoint: Checkpoint | None, config: ResolvedConfig, world: World
) -> tuple[dict[str, str], list[str]]:
    """Bring ``trainer`` to where a checkpoint was taken; a collective.

    Args:
        trainer: new.
        checkpoint: on rank 0 what was found, elsewhere None.
        config: the run's options.
        world: this process's place.

    Returns:
        The CSV files as they were, and what is to be said; empty where there is no checkpoint.
    """
    files = from_main(dict(checkpoint.files) if checkpoint is not None else None)
    if files is None:
        return {}, []
    run = json.loads(files["run.json"])
    position = Position(**run["position"])
    if position.epoch > config.epochs + 1 or (position.epoch > config.epochs and position.step):
        raise UserError(
            f"--epochs must be at least {position.epoch - (not position.step)}, which the run in "
            f"{config.work_dir} has come to, got {config.epochs}"
        )
    before, now = run["surroundings"], surroundings(config, world)
    own = [_loaded(files[f"rank-{rank}.pt"]) for rank in range(before["processes"])]
    trainer.restore(position, _loaded(files["state.pt"]))
    if before["processes"] == world.world_size:
        trainer.restore_own(own[world.rank])
    else:
        trainer.restore_own(_redistributed(own, world, config, position))
    said = [
        f"going on from epoch {position.epoch} of {config.epochs}, step {position.step + 1}"
        if position.epoch <= config.epochs
        else "going on from the end of the training"
    ]
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key]]
    held, wanted = renamed(run["options"]), config.options()
    changed += [
        f"--{key} {held[key]} -> {wanted[key]}"
        for key in sorted(ROUNDING - before.keys())
        if key in held and held[key] != wanted[key]
    ]
    if held["epochs"] != config.epochs and position.epoch <= config.epochs:
        said.append(
            f"--epochs {held['epochs']} -> {config.epochs}: from here on the learning rate is that "
            f"of a run of {config.epochs} epochs"
        )
    if changed:
        said.append(
            f"not bit-exact from here on: {', '.join(changed)}. The samples and their order are "
            f"the same"
            + (
                ("" if config.sync_batch_norm else _OTHER_SHARES)
                + "; dropout draws anew, and gradients are summed in another order"
                if before["processes"] != world.world_size
                else "; sums may round differently"
            )
        )
    return run["logs"], said


def _redistributed(
    own: list[dict[str, Any]], world: World, config: ResolvedConfig, position: Position
) -> dict[str, Any]:
    """The states of other than ``world.world_size`` processes as this process's."""

    def mean(kind: str) -> dict[str, Any]:
        return {
            name: torch.stack([state[kind][name] for state in own]).mean(0)
            if first.is_floating_point()
            else first
            for name, first in own[0][kind].items()
        }

    sums = torch.stack([state["tally"] for state in own]).sum(0)
    key = random_key("resumed", config.seed, position.epoch, position.step, world.rank)
    return {
        "buffers": mean("buffers"),
        "average": mean("average"),
        "tally": sums if world.is_main else torch.zeros_like(sums),
        "random": {"cpu": torch.Generator().manual_seed(key).get_state()},
    }


def weights_in(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The parameters and buffers of the network that a checkpoint's test was of."""
    shared, own = (_loaded(checkpoint.files[name]) for name in ("state.pt", "rank-0.pt"))
    if shared["average"]:
        prefix = "module."
        both = {**shared["average"], **own["average"]}
        return {n.removeprefix(prefix): t for n, t in both.items() if n.startswith(prefix)}
    return {**shared["parameters"], **own["buffers"]}


def _loaded(content: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
