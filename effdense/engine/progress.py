"""What a run shows while it trains."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..machine.memory import peak_resident_bytes
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
    """Bytes: the peak of the largest process."""

    @property
    def images_per_second(self) -> float:
        """0 where the clock has not moved: a small epoch can be shorter than its tick."""
        return self.images / self.seconds if self.seconds > 0 else 0.0

    @property
    def wait_percent(self) -> float:
        """Share of the time that was spent waiting for images."""
        return 100 * self.waited / self.seconds if self.seconds > 0 else 0.0


def peak_memory(device: torch.device) -> int:
    """The most memory this process has held, bytes: resident, or allocated on its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def duration(seconds: float) -> str:
    """Such as 01:30 or 2:05:00."""
    return tqdm.format_interval(max(0, round(seconds)))


class Progress:
    """What rank 0 shows: a bar on a terminal, else one line per epoch; other ranks nothing."""

    def __init__(self, config: ResolvedConfig, world: World) -> None:
        self._shown = world.is_main
        self._bars = world.is_main and sys.stderr.isatty()
        self._device = world.device
        self._epochs, self._batch_size = config.epochs, config.batch_size
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

    def show(self, score: Score, waited: float) -> None:
        """Put the training so far beside the bar; ``waited`` seconds for images."""
        if self._bar is None or not self._bars:
            return
        facts = self._bar.format_dict
        shown = {"loss": f"{score.loss:.4f}", "error": f"{score.error:.2f} %"}
        if facts["elapsed"] > 0 and facts["n"] > facts["initial"]:
            rate = (facts["n"] - facts["initial"]) / facts["elapsed"]
            left = (self._epochs - self._epoch) * facts["total"] + facts["total"] - facts["n"]
            shown["images/s"] = f"{rate * self._batch_size:,.0f}"
            shown["waiting"] = f"{100 * waited / facts['elapsed']:.0f} %"
            shown["run"] = f"{duration(left / rate)} left"
        shown["memory"] = f"{peak_memory(self._device) / 2**20:,.0f} MiB"
        self._bar.set_postfix(shown)

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
