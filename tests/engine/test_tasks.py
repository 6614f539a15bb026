"""What a network is taught, and how its answers are scored over processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import sklearn.metrics
import torch
from torch import Tensor

from effdense.engine.data.order import global_batches, share
from effdense.engine.distributed import World
from effdense.engine.scores import Score, Tally, full_score
from effdense.engine.tasks import Classification, MultiLabel, Task, balanced
from tests.helpers import workers
from tests.helpers.ranks import by_ranks

CPU = torch.device("cpu")
CLASSES = ("a", "b", "c")


def labels_with_gaps(count: int, classes: int = 3) -> Tensor:
    """1, 0 and NaN; seldom the last class."""
    drawn = torch.rand(count, classes)
    labels = (drawn < torch.linspace(0.5, 0.2, classes)).float()
    return labels.masked_fill(torch.rand(count, classes) < 0.3, math.nan)


TASKS: dict[str, tuple[Task, Tensor]] = {
    "classification": (Classification(CLASSES, 0.1), torch.arange(10) % 3),
    "weighted": (
        Classification(CLASSES, 0.1, torch.tensor([0.2, 1.0, 3.0])),
        torch.arange(10) % 3,
    ),
    "shares of classes": (
        Classification(CLASSES, 0.0, torch.tensor([0.2, 1.0, 3.0])),
        torch.eye(3).repeat(4, 1)[:10].roll(1, 0) * 0.3 + torch.eye(3).repeat(4, 1)[:10] * 0.7,
    ),
    "multilabel": (
        MultiLabel(CLASSES, 0.1, torch.tensor([0.5, 2.0, 7.0]), known=2.1),
        torch.tensor([[1, 0, math.nan], [math.nan, math.nan, 1]] * 5),
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_losses_of_uneven_shares_make_up_the_whole_batch_s(name: str) -> None:
    task, labels = TASKS[name]
    outputs = torch.randn(10, 3, dtype=torch.float64)
    whole = task.loss(outputs, labels)
    parts = [
        task.loss(outputs[mine], labels[mine]) * len(mine) / 10
        for mine in (share(torch.arange(10), rank, 3) for rank in range(3))
    ]
    assert whole.dtype == torch.float64
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-12, atol=0)


def test_labels_that_are_not_known_count_for_nothing() -> None:
    task = MultiLabel(CLASSES, 0.0, torch.tensor([1.0, 2.0, 3.0]), known=1.5)
    outputs = torch.tensor([[0.3, -1.0, 2.0], [5.0, 0.1, -0.2]], requires_grad=True)
    labels = torch.tensor([[1.0, math.nan, 0.0], [math.nan, 1.0, math.nan]])
    loss = task.loss(outputs, labels)
    softplus = torch.nn.functional.softplus
    by_hand = (
        softplus(-outputs[0, 0]) + softplus(outputs[0, 2]) + 2 * softplus(-outputs[1, 1])
    ) / 3
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert outputs.grad is not None
    assert torch.equal(outputs.grad != 0, ~labels.isnan())
    wrong, judged = task.wrong(outputs, labels)
    assert (int(wrong), int(judged)) == (1, 3)


def test_outputs_of_16_bits_are_taken_for_what_they_are() -> None:
    source = torch.Generator().manual_seed(0)
    for task, labels in TASKS.values():
        outputs = torch.randn(10, 3, generator=source).bfloat16()
        torch.testing.assert_close(
            task.loss(outputs, labels).float(),
            task.loss(outputs.float(), labels),
            rtol=1e-2,
            atol=0,
        )


def test_a_tally_goes_on_from_an_older_one() -> None:
    tally = Tally(Classification(CLASSES), CPU)
    tally.restore(torch.tensor([12.0, 3.0, 8.0], dtype=torch.float64))
    score = tally.score()
    assert (score.loss, score.error, score.samples) == (1.5, 37.5, 8)


def scored(task: Task, outputs: Tensor, labels: Tensor) -> Score:
    tally = Tally(task, CPU)
    tally.add(task.loss(outputs, labels), outputs, labels)
    return full_score(tally.score(), task, outputs, labels, len(labels))


def test_scores_of_one_class_a_sample() -> None:
    torch.manual_seed(0)
    names = tuple("abcdefg")
    labels, outputs = torch.randint(6, (200,)), torch.randn(200, 7).round(decimals=1)
    score = scored(Classification(names), outputs, labels)
    probabilities = outputs.double().softmax(1)
    for i in range(6):
        expected = sklearn.metrics.roc_auc_score(labels == i, probabilities[:, i])
        assert score.per_class["auroc"][i] == pytest.approx(expected, abs=1e-12)
        expected = sklearn.metrics.average_precision_score(labels == i, probabilities[:, i])
        assert score.per_class["auprc"][i] == pytest.approx(expected, abs=1e-12)
        missed = (outputs.argmax(1)[labels == i] != i).float().mean()
        assert score.per_class["error"][i] == pytest.approx(100 * float(missed))
    # no sample has the last one
    assert all(math.isnan(score.per_class[name][6]) for name in ("error", "auroc", "auprc"))
    assert score.metrics["auroc"] == pytest.approx(sum(score.per_class["auroc"][:6]) / 6, abs=1e-12)
    in_top = (outputs.double().topk(5).indices == labels[:, None]).any(1).double().mean()
    assert score.metrics["top5_error"] == pytest.approx(100 * (1 - float(in_top)), abs=0.51)
    assert sum(map(sum, score.confusion)) == 200
    hits = sum(score.confusion[i][i] for i in range(7))
    assert score.error == pytest.approx(100 * (1 - hits / 200))


def test_scores_of_labels_with_gaps() -> None:
    torch.manual_seed(0)
    labels, outputs = labels_with_gaps(150), torch.randn(150, 3) * 40
    labels[:, 2] = labels[:, 2] * 0  # nobody has it
    score = scored(MultiLabel(CLASSES, known=2.0), outputs, labels)
    for i in range(2):
        known = ~labels[:, i].isnan()
        truth, said = labels[known, i], outputs[known, i]
        expected = sklearn.metrics.roc_auc_score(truth, said)
        assert score.per_class["auroc"][i] == pytest.approx(expected, abs=1e-12)
        expected = sklearn.metrics.average_precision_score(truth, said)
        assert score.per_class["auprc"][i] == pytest.approx(expected, abs=1e-12)
        assert sum(score.confusion[i]) == int(known.sum())
        assert score.confusion[i][3] == int(((truth == 1) & (said > 0)).sum())
    assert math.isnan(score.per_class["auroc"][2])
    assert score.per_class["samples"][2] == 0
    assert len(score.answers) == 4
    judged = ~labels.isnan()
    wrong = ((outputs > 0) != (labels == 1)) & judged
    assert score.error == pytest.approx(100 * float(wrong.sum() / judged.sum()))


def test_the_mistakes_are_those_it_is_most_sure_of() -> None:
    outputs = torch.tensor([[3.0, 0, 0], [0, 9, 0], [0, 1, 0], [0, 0, 5]])
    score = scored(Classification(CLASSES), outputs, torch.tensor([0, 2, 0, 0]))
    sure = outputs.double().softmax(1)
    assert score.mistakes == [
        (1, CLASSES[2], CLASSES[1], sure[1, 1]),
        (3, CLASSES[0], CLASSES[2], sure[3, 2]),
        (2, CLASSES[0], CLASSES[1], sure[2, 1]),
    ]
    first, second, _ = CLASSES
    said, labels = (
        torch.tensor([[1.0, 2, 1], [-3, 1, 4]]),
        torch.tensor([[1, 0, 0.0], [1, 1, math.nan]]),
    )
    sure = said.double().sigmoid()
    score = scored(MultiLabel(CLASSES, known=2.0), said, labels)
    assert score.mistakes == [
        (1, first, f"no {first}", 1 - sure[1, 0]),
        (0, f"no {second}", second, sure[0, 1]),
        (0, "no c", "c", sure[0, 2]),
    ]
    # where images were left out their numbers are not known
    task = Classification(CLASSES)
    tally = Tally(task, CPU)
    assert not full_score(tally.score(), task, outputs, torch.tensor([0, 2, 0, 0]), 5).mistakes


def test_answers_that_are_not_finite_have_no_scores() -> None:
    score = scored(Classification(CLASSES), torch.full((4, 3), math.nan), torch.arange(4) % 3)
    assert all(math.isnan(value) for value in score.metrics.values())
    assert set(score.metrics) == {"mean_class_error", "auroc", "auprc"}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_scores_are_those_of_one_process(processes: int, tmp_path: Path, alone: World) -> None:
    """Bit for bit, over uneven shares; of two samples the third process has none."""
    together = by_ranks("scores", processes, tmp_path)
    for name, expected in workers.scores(alone).items():
        torch.testing.assert_close(together[name], expected, rtol=0, atol=0, equal_nan=True)


def test_balanced_orders_draw_classes_alike() -> None:
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    weights = balanced(labels, 3)
    order = torch.cat(global_batches(1000, 10, 0, 1, weights))
    drawn = torch.bincount(labels[order % 1000], minlength=3) / len(order)
    assert drawn.tolist() == pytest.approx([1 / 3] * 3, abs=0.05)
    # each time it is drawn a sample has another name, and the names don't skip
    assert len(order.unique()) == len(order) == 1000
    for sample in order[order >= 1000].tolist():
        assert sample - 1000 in order
    assert torch.equal(order, torch.cat(global_batches(1000, 10, 0, 1, weights)))
    assert not torch.equal(order, torch.cat(global_batches(1000, 10, 0, 2, weights)))


def test_balanced_labels_that_do_not_exclude_each_other() -> None:
    labels = torch.tensor([[1, 0], [1, 1], [0, math.nan], [1, 0], [1, math.nan]])
    assert balanced(labels, 2).tolist() == [0.25, 1, 1, 0.25, 0.25]
