"""What a run shows while it trains."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from .config import ResolvedConfig
from .data import Batch
from .distributed import World
from .scores import Score


class Progress:
    """What rank 0 shows: a bar on a terminal, else one line per epoch; other ranks nothing."""

    def __init__(self, config: ResolvedConfig, world: World) -> None:
        self._shown = world.is_main
        self._bars = world.is_main and sys.stderr.isatty()
        self._epochs = config.epochs
        self._bar: tqdm[Batch] | None = None
        self._began = time.monotonic()
        self._epoch = 0

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._shown:
            tqdm.write(line)
            sys.stdout.flush()

    def epoch(self, epoch: int) -> None:
        """Begin an epoch."""
        self._epoch, self._began = epoch, time.monotonic()

    def steps(self, batches: Iterable[Batch], total: int, done: int = 0) -> Iterator[Batch]:
        """Pass ``batches`` on, counting them from ``done`` to ``total``."""
        self._bar = tqdm(
            batches,
            desc=f"epoch {self._epoch}/{self._epochs}",
            total=total,
            initial=done,
            disable=not self._bars,
            leave=False,
            unit="step",
        )
        with self._bar:
            yield from self._bar

    def show(self, score: Score) -> None:
        """Put the training loss so far beside the bar."""
        if self._bar is not None and self._bars:
            self._bar.set_postfix(loss=f"{score.loss:.4f}", error=f"{score.error:.2f} %")

    def end(self, train: Score, test: Score, images: int, seconds: float) -> None:
        """Print the line of an epoch, ``images`` of which took ``seconds`` to train on."""
        # A small epoch can be shorter than a tick of the clock.
        speed = f"{images / seconds:,.0f} images/s  " if seconds > 0 else ""
        width = len(str(self._epochs))
        self.say(
            f"epoch {self._epoch:{width}}/{self._epochs}  "
            f"train loss {train.loss:.4f} error {train.error:5.2f} %  "
            f"test loss {test.loss:.4f} error {test.error:5.2f} %  "
            f"{speed}{time.monotonic() - self._began:.1f} s"
        )
