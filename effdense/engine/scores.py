"""Loss and error, added up over batches and processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .distributed import summed


@dataclass(frozen=True)
class Score:
    """What a network is worth on some samples."""

    loss: float
    """Mean cross-entropy, nats per sample."""
    error: float
    """Per cent."""
    samples: int

    def value(self, metric: str) -> float:
        """What it says by one of :data:`METRICS`; NaN where that is not known."""
        found = {"loss": self.loss, "error": self.error}
        return float(found.get(metric, math.nan))


METRICS = {"loss": False, "error": False}
"""Whether more of it is better."""


class Tally:
    """Adds up loss, mistakes and samples on the device, so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """``loss`` is the mean over the samples of ``logits`` (N, classes), ``labels`` (N,)."""
        wrong = (logits.argmax(1) != labels).sum()
        count = torch.full_like(wrong, len(labels))
        self._sums += torch.stack([loss.detach().double() * len(labels), wrong, count])

    def state(self) -> Tensor:
        """This process's sums."""
        return self._sums.cpu().clone()

    def restore(self, sums: Tensor) -> None:
        """Go on from what :meth:`state` gave."""
        self._sums.copy_(sums)

    def score(self) -> Score:
        """The result over all processes; a collective."""
        loss, wrong, samples = summed(self._sums).tolist()
        return Score(loss / max(samples, 1), 100 * wrong / max(samples, 1), round(samples))
