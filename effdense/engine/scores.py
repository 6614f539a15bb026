"""What a network is worth: added up over batches and processes, or from all its answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .distributed import from_main, gathered_on_main, summed
from .mistakes import Mistake, worst
from .tasks import Classification, Task

# Up to so many classes each one's curves, and the confusion matrix, are worth their time.
RANKED_CLASSES = 100
TOP = 5


@dataclass(frozen=True)
class Score:
    """What a network is worth on some samples."""

    loss: float
    """Mean over the samples, nats."""
    error: float
    """Wrong answers of those that are known, per cent."""
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of a test: what :func:`metric_names` says; NaN where it is not defined."""
    per_class: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Of a test: samples, error, auroc and auprc of each class; NaN where not defined."""
    confusion: Sequence[Sequence[int]] = ()
    """Of a test: samples by class and :attr:`answers`; empty: too many classes."""
    answers: Sequence[str] = ()
    """The classes; where these don't exclude each other, a row's right and wrong yes and no."""
    mistakes: Sequence[Mistake] = ()
    """Of a test of every image: those that the network is most wrongly sure of."""

    def value(self, metric: str) -> float:
        """What it says by one of :data:`METRICS`; NaN where that is not known."""
        found = {"loss": self.loss, "error": self.error, **self.metrics}
        return float(found.get(metric, math.nan))


METRICS = {
    "loss": False,
    "error": False,
    "mean_class_error": False,
    "top5_error": False,
    "auroc": True,
    "auprc": True,
}
"""Whether more of it is better."""


def metric_names(task: Task) -> list[str]:
    """What a test measures besides loss and error, by the names of :data:`METRICS`."""
    names = ["mean_class_error"]
    if isinstance(task, Classification) and len(task.classes) > TOP:
        names.append("top5_error")
    return names + ["auroc", "auprc"] * (len(task.classes) <= RANKED_CLASSES)


class Tally:
    """Adds up loss, mistakes and samples on the device, so that no step waits for it."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task = task
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(
        self, loss: Tensor, outputs: Tensor, labels: Tensor, held: Tensor | None = None
    ) -> None:
        """``loss`` is the mean over the samples of ``outputs`` (N, classes).

        Where ``held`` () is false, nothing is added.
        """
        wrong, judged = self._task.wrong(outputs, labels)
        count = torch.full_like(wrong, len(labels))
        found = torch.stack([loss.detach().double() * len(labels), wrong, judged, count])
        self._sums += found if held is None else found.masked_fill(~held, 0.0)

    def state(self) -> Tensor:
        """This process's sums."""
        return self._sums.cpu().clone()

    def restore(self, sums: Tensor) -> None:
        """Go on from what :meth:`state` gave."""
        # older runs counted samples alone, each of which was judged
        self._sums.copy_(sums if len(sums) == 4 else sums[[0, 1, 2, 2]])

    def score(self, *, own: bool = False) -> Score:
        """The result over all processes, a collective; or this process's own."""
        sums = self._sums if own else summed(self._sums)
        loss, wrong, judged, samples = sums.tolist()
        return Score(loss / max(samples, 1), 100 * wrong / max(judged, 1), round(samples))


def full_score(tally: Score, task: Task, outputs: Tensor, labels: Tensor, asked: int) -> Score:
    """``tally`` with all that is known of a test; a collective.

    Args:
        tally: over all processes.
        task: what was asked.
        outputs: (n, classes) of this process's samples, which may be none.
        labels: theirs.
        asked: samples of the test set; those that could not be read have no outputs.
    """
    found = gathered_on_main((outputs.float().cpu(), labels.cpu()))
    parts = [part for part in found if len(part[1])]
    details: dict[str, Any] = {}
    if parts:
        all_outputs, all_labels = (torch.cat(part) for part in zip(*parts, strict=True))
        details = _details(task, all_outputs.double(), all_labels)
        # else nobody knows any more which image an answer is to
        if len(all_labels) == asked and all_outputs.isfinite().all():
            details["mistakes"] = worst(task, all_outputs.double(), all_labels)
    return Score(tally.loss, tally.error, tally.samples, **from_main(details))


def _details(task: Task, outputs: Tensor, labels: Tensor) -> dict[str, Any]:
    from sklearn import metrics as sklearn_metrics

    if not outputs.isfinite().all():
        return {"metrics": dict.fromkeys(metric_names(task), math.nan)}
    classes, single = range(len(task.classes)), isinstance(task, Classification)
    few, metrics = len(classes) <= RANKED_CLASSES, {}
    # not through a sigmoid, which makes different scores of large outputs equal
    scores = (task.probabilities(outputs) if single else outputs).numpy()
    answers = outputs.argmax(1).numpy() if single else (outputs > 0).long().numpy()
    truth = labels.numpy()
    if single and len(classes) > TOP:
        top = sklearn_metrics.top_k_accuracy_score(truth, scores, k=TOP, labels=classes)
        metrics["top5_error"] = 100 * (1 - float(top))
    rows: dict[str, list[float]] = {name: [] for name in ("samples", "error", "auroc", "auprc")}
    tables = []
    for one in classes:
        known = np.full(len(truth), True) if single else ~np.isnan(truth[:, one])
        has = truth[known] == one if single else truth[known, one] > 0.5
        says = answers[known] == one if single else answers[known, one] == 1
        # of a class among others those that were not recognised; of a label all wrong answers
        judged = has if single else np.full(len(has), True)
        rows["samples"].append(int(has.sum()))
        rows["error"].append(
            100 * float((says != has)[judged].mean()) if judged.any() else math.nan
        )
        defined = few and 0 < has.sum() < len(has)
        for name, function in (("auroc", "roc_auc_score"), ("auprc", "average_precision_score")):
            call = getattr(sklearn_metrics, function)
            rows[name].append(float(call(has, scores[known, one])) if defined else math.nan)
        if few and not single:
            tables.append(
                sklearn_metrics.confusion_matrix(has, says, labels=[0, 1]).ravel().tolist()
            )
    metrics["mean_class_error"] = _mean(rows["error"])
    if few:
        metrics |= {name: _mean(rows[name]) for name in ("auroc", "auprc")}
    if few and single:
        tables = sklearn_metrics.confusion_matrix(truth, answers, labels=classes).tolist()
    answered = task.classes if single else ("true no", "false yes", "false no", "true yes")
    return {"metrics": metrics, "per_class": rows, "confusion": tables, "answers": answered}


def _mean(values: Sequence[float]) -> float:
    """Of those that are defined."""
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan
