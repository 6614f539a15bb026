"""The test images that a network is most wrongly sure of, as rows and as pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .data.images import Split
from .tasks import Classification, Task

# A page of them, of so many pixels at most.
SHOWN, SIDE = 12, 128


class Mistake(NamedTuple):
    """An image that was answered wrongly."""

    number: int
    """Its place in the test set."""
    truth: str
    answer: str
    probability: float
    """That the network gave the answer."""


def worst(task: Task, outputs: Tensor, labels: Tensor) -> list[Mistake]:
    """The mistakes with the most probable answers, that one first.

    Args:
        task: what was asked.
        outputs: (n, classes) of the whole test set, in its order.
        labels: theirs.
    """
    probabilities, classes = task.probabilities(outputs), task.classes
    if isinstance(task, Classification):
        given, answers = probabilities.max(1, keepdim=True)
        wrong = answers != labels.unsqueeze(1)
    else:
        says = outputs > 0
        given = torch.where(says, probabilities, 1 - probabilities)
        wrong = (says != (labels > 0.5)) & ~labels.isnan()
    ranked = torch.where(wrong, given, -1.0).flatten()
    found = []
    for place in ranked.topk(min(SHOWN, int(wrong.sum()))).indices.tolist():
        index, column = divmod(place, given.shape[1])
        if isinstance(task, Classification):
            truth, answer = classes[int(labels[index])], classes[int(answers[index])]
        else:
            both = classes[column], f"no {classes[column]}"
            truth, answer = both if labels[index, column] > 0.5 else both[::-1]
        found.append(Mistake(index, truth, answer, float(ranked[place])))
    return found


def pictures(split: Split, indices: Sequence[int], device: torch.device) -> list[str]:
    """Those images of a split as PNG in base64, or nothing where there is nothing to be seen."""
    found = []
    with suppress(UserError):
        for images, _ in split.batches(torch.tensor(indices).split(1), None, device):
            found.append(_picture(images[0].float().cpu()) if images.dim() > 3 else "")
    return found if len(found) == len(indices) else [""] * len(indices)


def _picture(image: Tensor) -> str:
    """From its darkest to its brightest value; of a volume the middle slice."""
    from torchvision.transforms.v2.functional import to_pil_image

    if image.dim() == 4:
        image = image[..., image.shape[-1] // 2].mT.flip(1)
    image = image[: 3 if len(image) >= 3 else 1]
    low, high = image.aminmax()
    scaled = (image - low) * (255 / (high - low).clamp_min(1e-30))
    shown = to_pil_image(scaled.to(torch.uint8))
    content = io.BytesIO()
    shown.thumbnail((SIDE, SIDE))
    shown.save(content, format="PNG")
    return base64.b64encode(content.getvalue()).decode()
