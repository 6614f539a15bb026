"""``evaluate``: a run's network, tested on images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from . import front_end


@dataclass(frozen=True)
class Options:
    """Test the network of a run, or of a file that it has exported, on FOLDER/CLASS/*."""

    source: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of the run, or its model.safetensors."""
    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """One folder per class in it."""
    batch_size: int = 64
    """Images."""

    def __post_init__(self) -> None:
        front_end.check_positive(batch_size=self.batch_size)


def run(options: Options) -> None:
    from ..engine.export import evaluated, trained

    loss, error, images = evaluated(trained(options.source), options.folder, options.batch_size)
    print(f"error {error:.2f} %, loss {loss:.4f} on {images:,} images")
