"""What a network is taught: what its outputs mean, its loss, and when it is wrong.

NOTE [ Shares of a loss ]
The loss of a batch is a sum over its samples, divided by what every process knows without asking:
the number of samples and constants of the training set. A mean over what a batch happens to hold
of known labels, or of weights, would have another denominator in each process's share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .data.images import ImageData, class_counts
from .options import ResolvedConfig


@dataclass(frozen=True)
class Task(ABC):
    """One kind of question; labels are what :class:`.data.images.Split` holds."""

    kind: ClassVar[str]
    best_by: ClassVar[str] = "error"
    """What of a test says which epoch is the best, unless something else is asked for."""
    classes: tuple[str, ...]
    label_smoothing: float = 0.0
    weights: Tensor | None = None
    """Of each class (classes,), or of its positive samples where classes don't exclude each
    other; None: 1."""

    @abstractmethod
    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean over the samples of a share; see NOTE [ Shares of a loss ]."""

    @abstractmethod
    def wrong(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """How many answers are wrong, and of how many."""

    @abstractmethod
    def probabilities(self, outputs: Tensor) -> Tensor:
        """Of each class, (N, classes)."""

    def plain(self) -> Task:
        """The same question as it is tested: each sample counts once."""
        return replace(self, label_smoothing=0.0, weights=None)

    def on(self, device: torch.device) -> Task:
        """The same with its weights on a device: to copy them would have each step wait."""
        return self if self.weights is None else replace(self, weights=self.weights.to(device))

    def _weights(self, outputs: Tensor) -> Tensor | None:
        """In what losses are computed in, whatever autocast makes of the outputs."""
        return None if self.weights is None else self.weights.to(_exact(outputs))


def _exact(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


@dataclass(frozen=True)
class Classification(Task):
    """One class a sample: softmax and cross-entropy. Labels: (N,) in int64, or shares of classes
    (N, classes).
    """

    kind = "classification"

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        weights, smoothing = self._weights(outputs), self.label_smoothing
        if weights is None:
            return F.cross_entropy(outputs, labels, label_smoothing=smoothing)
        # torch's own weighted mean divides by the weights of these samples
        options: Any = {"reduction": "none", "label_smoothing": smoothing}
        return F.cross_entropy(_exact(outputs), labels, weights, **options).mean()

    def wrong(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        likeliest = labels.argmax(1) if labels.is_floating_point() else labels
        wrong = (outputs.argmax(1) != likeliest).sum()
        return wrong, torch.full_like(wrong, len(labels))

    def probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(1)


@dataclass(frozen=True)
class MultiLabel(Task):
    """Any number of classes a sample: a sigmoid and binary cross-entropy each. Labels: (N, classes)
    of 0 to 1; NaN is not known, and counts for nothing.
    """

    kind = "multilabel"
    best_by = "auroc"
    known: float = 0.0
    """Labels that are known of a training sample, on average: what its loss is divided by."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        targets = labels.nan_to_num() * (1 - self.label_smoothing) + self.label_smoothing / 2
        each = F.binary_cross_entropy_with_logits(
            _exact(outputs),
            targets.to(_exact(outputs)),
            pos_weight=self._weights(outputs),
            reduction="none",
        )
        return (each * ~labels.isnan()).sum(1).mean() / self.known

    def wrong(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        known = ~labels.isnan()
        return (((outputs > 0) != (labels > 0.5)) & known).sum(), known.sum()

    def probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()


def make_task(config: ResolvedConfig, data: ImageData) -> Task:
    """What a run's options and training labels ask for.

    Raises:
        UserError: for weights of a class that has no sample to be weighed.
    """
    labels, weighed = data.train.labels, config.balance == "loss"
    counts = class_counts(labels, data.num_classes)
    if weighed and not counts.all():
        raise UserError(
            f"--balance loss cannot weigh {data.classes[int(counts.argmin())]}, which no training "
            f"image has: leave the class out, or use --balance sampling"
        )
    if not labels.is_floating_point():
        # 1 on average over the training set
        weights = len(labels) / (len(counts) * counts) if weighed else None
        return Classification(data.classes, config.label_smoothing, weights)
    known = (~labels.isnan()).sum(0)
    weights = (known - counts) / counts if weighed else None
    return MultiLabel(
        data.classes, config.label_smoothing, weights, float(known.sum()) / len(labels)
    )


def balanced(labels: Tensor, num_classes: int) -> Tensor:
    """How likely each sample is to be drawn so that classes are drawn alike, (N,).

    Where classes don't exclude each other the rarest that a sample has counts, and having none
    is a class.
    """
    counts = class_counts(labels, num_classes).double()
    if not labels.is_floating_point():
        return 1 / counts[labels]
    has = labels > 0.5
    none = (~has.any(1)).sum().clamp_min(1).double()
    return torch.where(has, 1 / counts.clamp_min(1), 0.0).amax(1).where(has.any(1), 1 / none)
