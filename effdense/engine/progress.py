"""What a run shows while it trains."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..machine.memory import peak_resident_bytes, resident_bytes
from .data.images import Batch
from .distributed import World
from .options import ResolvedConfig
from .scores import Score


@dataclass(frozen=True)
class Speed:
    """How fast a process trained through (the rest of) an epoch."""

    images: int
    """Of all processes."""
    seconds: float
    waited: float
    """Seconds for which the slowest process waited for its images."""
    memory: int
    """Bytes: the peak of the largest process, over its start on a processor."""

    @property
    def images_per_second(self) -> float:
        """0 where the clock has not moved: a small epoch can be shorter than its tick."""
        return self.images / self.seconds if self.seconds > 0 else 0.0

    @property
    def wait_percent(self) -> float:
        """Share of the time that was spent waiting for images."""
        return 100 * self.waited / self.seconds if self.seconds > 0 else 0.0


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds, where its memory on ``device`` is counted as resident."""
    return 0 if device.type == "cuda" else resident_bytes()


def duration(seconds: float) -> str:
    """Such as 01:30 or 2:05:00."""
    return tqdm.format_interval(max(0, round(seconds)))


# Seconds between two looks at the loss: beside a bar, and in lines where there is no terminal.
_BAR_SECONDS, _LINE_SECONDS = 1.0, 30.0


class Progress:
    """What rank 0 shows: a bar on a terminal, else a line per epoch and half minute; others none.

    Args:
        config, world: the run's.
        held: bytes that this process held at its start, see :func:`held_memory`.
    """

    def __init__(self, config: ResolvedConfig, world: World, held: int = 0) -> None:
        self._shown = world.is_main
        self._bars = world.is_main and sys.stderr.isatty()
        self._device, self._held = world.device, held
        self._epochs, self._batch_size = config.epochs, config.batch_size
        self._bar: tqdm[Batch] | None = None
        self._began = self._looked = time.monotonic()
        self._epoch = self._first = self._done = self._total = 0

    def peak_memory(self) -> int:
        """The most memory this process has held, bytes: over its start, or on its GPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(0, peak_resident_bytes() - self._held)

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
        self._first, self._done, self._total = done, done, total
        # the first step is looked at beside a bar
        self._looked = time.monotonic() - (_BAR_SECONDS if self._bars else 0)
        with self._counted(
            batches, f"epoch {self._epoch}/{self._epochs}", total, done
        ) as self._bar:
            for batch in self._bar:
                self._done += 1
                yield batch

    def tests(self, batches: Iterable[Batch], total: int) -> Iterator[Batch]:
        """Pass the batches of a test on, with a bar of their own."""
        with self._counted(batches, "testing", total, 0) as bar:
            yield from bar

    def _counted(self, batches: Iterable[Batch], name: str, total: int, done: int) -> tqdm[Batch]:
        return tqdm(
            batches,
            desc=name,
            total=total,
            initial=done,
            disable=not self._bars,
            leave=False,
            unit="step",
        )

    def is_due(self) -> bool:
        """Whether it is time for :meth:`show`, on this process."""
        seconds = _BAR_SECONDS if self._bars else _LINE_SECONDS
        return self._shown and time.monotonic() - self._looked >= seconds

    def show(self, score: Score, waited: float) -> None:
        """Show the training so far: this process's score, and ``waited`` seconds for images."""
        now = self._looked = time.monotonic()
        rate = (self._done - self._first) / max(now - self._began, 1e-9)
        left = (self._epochs - self._epoch + 1) * self._total - self._done
        shown = {
            "loss": f"{score.loss:.4f}",
            "error": f"{score.error:.2f} %",
            "images/s": f"{rate * self._batch_size:,.0f}",
            "waiting": f"{100 * waited / max(now - self._began, 1e-9):.0f} %",
            "memory": f"{self.peak_memory() / 2**20:,.0f} MiB",
            "run": f"{duration(left / max(rate, 1e-9))} left",
        }
        if self._bars and self._bar is not None:
            self._bar.set_postfix(shown)
            return
        facts = "  ".join(f"{name} {value}" for name, value in shown.items())
        self.say(f"epoch {self._epoch}/{self._epochs}  step {self._done}/{self._total}  {facts}")

    def end(self, train: Score, test: Score, speed: Speed) -> None:
        """Print the line of an epoch."""
        rate = f"{speed.images_per_second:,.0f} images/s  " if speed.images_per_second else ""
        # below that, faster reading would not be noticed
        if speed.wait_percent >= 5:
            rate += f"waiting for images {speed.wait_percent:.0f} %  "
        auroc = test.metrics.get("auroc", math.nan)
        ranked = "" if math.isnan(auroc) else f"AUROC {auroc:.4f}  "
        seconds = time.monotonic() - self._began
        left = self._epochs - self._epoch
        width = len(str(self._epochs))
        self.say(
            f"epoch {self._epoch:{width}}/{self._epochs}  "
            f"train loss {train.loss:.4f} error {train.error:5.2f} %  "
            f"test loss {test.loss:.4f} error {test.error:5.2f} %  {ranked}"
            f"{rate}{speed.memory / 2**20:,.0f} MiB  {seconds:.1f} s"
            + (f"  {duration(left * seconds)} left" if left else "")
        )
