"""``graph``: where a training step's memory goes, as a picture."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from ..block.dense_block import SAVE_MODES
from ..errors import UserError
from ..machine.memory import show_size
from ..memory.graphs import Graph, as_dot, autograd_graph, module_graph
from . import Commands
from .network import Network, add_input_arguments, add_model_argument, network_of


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "graph",
        help="draw a network's compute graph with the bytes that each node keeps for backward",
        description="Draw the compute graph of the naive network beside effdense's, with the "
        "bytes that each node keeps for backward, each storage counted once. Nothing is "
        "allocated or computed. A picture needs Graphviz's dot; its text is written always.",
    )
    add_model_argument(parser, depth=40)
    add_input_arguments(parser, batch_size=64)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("graph.svg"),
        metavar="FILE",
        help="SVG, PNG or PDF, with the text beside it as .dot; or .dot alone (default graph.svg)",
    )
    parser.add_argument(
        "--level",
        choices=("module", "autograd"),
        default="module",
        help="a node for each module, or for each of autograd's nodes (default module)",
    )
    parser.add_argument(
        "--nesting",
        type=int,
        default=2,
        metavar="N",
        help="parts of a module's name that tell it from others: 2 for features.denseblock1, 3 "
        "for its layers too (default 2)",
    )
    parser.add_argument(
        "--only", choices=("naive", "effdense"), help="one of the two (default: side by side)"
    )
    parser.add_argument("--save", choices=SAVE_MODES, default="features", help="of effdense's")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    network = network_of(options)
    if options.nesting < 1:
        raise UserError(f"--nesting must be a positive integer, got {options.nesting}")
    text = options.output.with_suffix(".dot")
    if not text.parent.is_dir():
        raise UserError(f"cannot write {text}: there is no folder {text.parent}")
    graphs = {}
    for title in ("naive", "effdense"):
        if options.only in (None, title):
            graphs[title] = _graph(network, title, options)
            print(f"{title:<9} keeps {show_size(graphs[title].kept)} for backward")
    try:
        text.write_text(as_dot(graphs.items()), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {text}: {error.strerror}") from None
    print(text)
    if options.output != text:
        _draw(text, options.output)


def _graph(network: Network, title: str, options: argparse.Namespace) -> Graph:
    with torch.device("meta"):
        model = network.naive() if title == "naive" else network.ours(options.save)
    shape = network.input_shape(model, options.batch_size, options.image_size)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    x = torch.empty(shape, dtype=dtype, device="meta")
    try:
        graph = autograd_graph(model.train(), x, options.nesting)
    except (ValueError, RuntimeError, IndexError, NotImplementedError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{network.name} refuses input of shape {shape}: {line}") from None
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
        line = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
        raise UserError(f"Graphviz's dot could not draw {picture}: {line}")
    print(picture)
