"""The scores for TensorBoard, where that is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError
from .progress import Speed
from .records import writing
from .scores import Score


def require_tensorboard() -> None:
    """See that it is there.

    Raises:
        UserError: where it isn't.
    """
    if find_spec("tensorboard") is None:
        raise UserError("--tensorboard: it is not installed; pip install tensorboard")


def add_scores(folder: Path, epoch: int, train: Score, test: Score, speed: Speed) -> None:
    """Write an epoch's scores; what was there of it and of later ones is replaced.

    Raises:
        UserError: where the file system refuses.
    """
    from torch.utils.tensorboard import SummaryWriter

    with writing(folder):
        # TensorBoard drops what a purged step and later ones had before
        writer: Any = SummaryWriter(str(folder), purge_step=epoch)
        with writer:
            for part, score in (("train", train), ("test", test)):
                shown = {"loss": score.loss, "error": score.error, "samples": score.samples}
                for name, value in {**shown, **score.metrics}.items():
                    writer.add_scalar(f"{name}/{part}", value, epoch)
            writer.add_scalar("images per second", speed.images_per_second, epoch)
            writer.add_scalar("waiting for images (%)", speed.wait_percent, epoch)
            writer.add_scalar("memory (MiB)", speed.memory / 2**20, epoch)
