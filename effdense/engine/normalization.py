"""Mean and deviation of a run's images: measured once, then kept with it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .data.images import ImageData, Normalization
from .data.order import share
from .distributed import World, all_or_none, from_main, gathered
from .options import ResolvedConfig
from .recipes import FILES
from .records import CHECKPOINTS, read_config

# So many images, evenly spread, say what all of them would.
MEASURED = 10_000


def settle_normalization(config: ResolvedConfig, data: ImageData, world: World) -> None:
    """Normalise ``data`` as the run that is gone on with does, or as is measured; a collective.

    Raises:
        UserError: on every process, where an image cannot be read.
    """
    if config.data not in FILES or config.normalization != "measured":
        return
    held = None
    if world.is_main and config.work_dir is not None and not config.overwrite:
        with suppress(UserError):
            held = _held(config.work_dir, config, data)
    held = from_main(held)
    data.normalize_by(Normalization.recorded(held) if held else _measured(data, world))


def _held(work_dir: Path, config: ResolvedConfig, data: ImageData) -> dict[str, Any] | None:
    """What the run in ``work_dir`` was normalised by, if it is the one that is gone on with."""
    recorded = read_config(work_dir)
    images = {"train": len(data.train), "test": len(data.test)}
    same = (
        not config.differences(recorded["options"])
        and recorded.get("images", images) == images
        and recorded.get("table", data.digest) == data.digest
        # else nothing has been learnt from what was measured
        and any((work_dir / CHECKPOINTS).glob("[!.]*"))
    )
    return recorded.get("normalization") if same else None


def _measured(data: ImageData, world: World) -> Normalization:
    """The same bits for any number of processes: moments are added in the images' order."""
    count, channels = len(data.train), data.in_channels
    chosen = torch.linspace(0, count - 1, min(count, MEASURED), dtype=torch.float64).long()
    mine = share(chosen, world.rank, world.world_size)
    data.normalize_by(Normalization.none(channels))
    moments = [torch.empty(0, 2 * channels, dtype=torch.float64)]
    with all_or_none():
        for images, _ in data.train.batches(mine.split(8), None, torch.device("cpu")):
            values = images.double().flatten(2)
            moments.append(torch.cat([values.mean(2), values.square().mean(2)], dim=1))
    mean, square = torch.cat(gathered(torch.cat(moments))).mean(0).chunk(2)
    deviation = (square - mean.square()).clamp_min(0).sqrt()
    # few digits: what is kept is read back as it was
    rounded = [[float(f"{value:.6g}") for value in each] for each in (mean, deviation)]
    return Normalization(tuple(rounded[0]), tuple(value or 1.0 for value in rounded[1]))
