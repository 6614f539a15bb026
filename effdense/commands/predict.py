"""``predict``: a run's network, asked about images."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from ..errors import UserError
from . import front_end


@dataclass(frozen=True)
class Options:
    """Classify images with the network of a run, or of a file that it has exported.

    CSV of each image with its most probable class, with --top-k, or with --all.
    """

    source: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of the run, or its model.safetensors."""
    images: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="PATH [PATH ...]", help_behavior_hint="(required)"),
    ]
    """Images, and folders of images."""
    all: bool = False
    """A column for each class, with its probability."""
    top_k: int = 1
    """So many classes, the most probable first, two columns each."""
    output: Annotated[
        Path | None,
        arg(aliases=["-o"], metavar="FILE", help_behavior_hint="(default: standard output)"),
    ] = None
    """Where to write."""
    batch_size: int = 64
    """Images."""

    def __post_init__(self) -> None:
        if not self.images:
            raise UserError("PATH must be an image or a folder of images")
        front_end.check_positive(batch_size=self.batch_size, top_k=self.top_k)
        if self.all and self.top_k != 1:
            raise UserError("--all and --top-k are two forms of an answer: choose one")


def run(options: Options) -> None:
    from ..engine.export import images_in, predictions, trained
    from ..engine.records import write_output

    model = trained(options.source)
    paths = images_in(options.images, model)
    rows = _rows(options, model.classes, predictions(model, paths, options.batch_size))
    if options.output is None:
        csv.writer(sys.stdout).writerows(rows)
        return

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)

    write_output(options.output, write)


def _rows(
    options: Options, classes: Sequence[str], found: Iterable[tuple[Path, Any]]
) -> Iterator[list[object]]:
    """The header, and a row for each image."""
    if options.all:
        yield ["image", *classes]
        for path, probabilities in found:
            yield [path, *(f"{value:.4f}" for value in probabilities.tolist())]
        return
    count = min(options.top_k, len(classes))
    numbers = [""] if count == 1 else [str(place) for place in range(1, count + 1)]
    yield ["image", *(f"{name}{n}" for n in numbers for name in ("class", "probability"))]
    for path, probabilities in found:
        most = probabilities.topk(count)
        pairs = zip(most.indices.tolist(), most.values.tolist(), strict=True)
        yield [path, *(cell for i, value in pairs for cell in (classes[i], f"{value:.4f}"))]
