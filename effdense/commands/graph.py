"""``graph``: where a training step's memory goes, as a picture."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import arg

from ..choices import Save
from ..errors import UserError, first_line
from ..machine.sizes import show_size
from ..memory.graphs import Graph, as_dot, autograd_graph, module_graph
from . import front_end
from .network import Batch, Network


@dataclass(frozen=True)
class Options:
    """Draw the naive network beside effdense's, with the bytes that each node keeps.

    Nothing is computed. A picture needs Graphviz's dot; its text is written always.
    """

    network: Network = field(default_factory=lambda: Network(depth=40))
    batch: Batch = field(default_factory=Batch)
    output: Annotated[Path, arg(aliases=["-o"], metavar="FILE")] = Path("graph.svg")
    """SVG, PNG or PDF, with the text beside it as .dot; or .dot alone."""
    level: Literal["module", "autograd"] = "module"
    """A node for each module, or for each of autograd's nodes."""
    nesting: int = 2
    """Parts of a module's name that are shown: 2 for features.denseblock1."""
    only: Annotated[
        Literal["naive", "effdense"] | None,
        arg(metavar="{naive,effdense}", help_behavior_hint="(default: side by side)"),
    ] = None
    """One of the two."""
    save: Save = "features"
    """What effdense's blocks keep."""

    def __post_init__(self) -> None:
        front_end.check_positive(nesting=self.nesting)


def run(options: Options) -> None:
    if options.output.is_dir():
        raise UserError(f"cannot write {options.output}: it is a folder")
    text = options.output.with_suffix(".dot")
    if not text.parent.is_dir():
        raise UserError(f"cannot write {text}: there is no folder {text.parent}")
    graphs = {}
    for title in ("naive", "effdense"):
        if options.only in (None, title):
            graphs[title] = _graph(title, options)
            print(f"{title:<9} keeps {show_size(graphs[title].kept)} for backward")
    try:
        text.write_text(as_dot(graphs.items()), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {text}: {error.strerror}") from None
    print(text)
    if options.output != text:
        _draw(text, options.output)


def _graph(title: str, options: Options) -> Graph:
    network = options.network
    with torch.device("meta"):
        model = network.naive() if title == "naive" else network.ours(options.save)
    shape = network.input_shape(model, options.batch)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    x = torch.empty(shape, dtype=dtype, device="meta")
    with network.refusing(shape):
        graph = autograd_graph(model.train(), x, options.nesting)
    return module_graph(graph) if options.level == "module" else graph


def _draw(text: Path, picture: Path) -> None:
    dot = shutil.which("dot")
    if dot is None:
        print(
            f"no picture: Graphviz's dot is not on PATH (apt install graphviz); with it: "
            f"dot -T{picture.suffix[1:] or 'svg'} {text} -o {picture}",
            file=sys.stderr,
        )
        return
    kind = picture.suffix[1:]
    command = [dot, f"-T{kind}", str(text), "-o", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        line = first_line(done.stderr.strip() or f"exit status {done.returncode}")
        raise UserError(f"Graphviz's dot could not draw {picture}: {line}")
    print(picture)
