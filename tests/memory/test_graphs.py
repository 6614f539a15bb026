"""``python -m effdense graph``: what is kept for backward, and where."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import effdense
from effdense import reference
from effdense.__main__ import main
from effdense.memory.graphs import LOSS, Graph, Node, as_dot, autograd_graph, module_graph
from tests.helpers.compare import SMALL

SHAPE = (2, 3, 9, 10)
SMALL_NET = ["densenet_bc", "--depth", "10", "--growth-rate", "4", "--batch-size", "2"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def graph_of(model: nn.Module, device: str = "cpu", nesting: int = 2) -> Graph:
    model = model.to(device).train()
    return autograd_graph(model, torch.empty(SHAPE, device=device).normal_(), nesting)


def counted_by_hooks(model: nn.Module) -> int:
    """Bytes that autograd saves, each storage once, but for parameters, buffers and the input."""
    x = torch.randn(SHAPE)
    own = [*model.parameters(), *model.buffers(), x]
    seen = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.append((storage, storage.nbytes()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().mean()
    assert loss.requires_grad
    return sum(nbytes for _, nbytes in kept)


@pytest.mark.parametrize("save", [None, *effdense.SAVE_MODES])
def test_kept_bytes_are_those_that_autograd_saves(save: effdense.Save | None) -> None:
    torch.manual_seed(0)
    model = reference.DenseNet(**SMALL) if save is None else effdense.DenseNet(**SMALL, save=save)
    graph = graph_of(model)
    assert graph.kept == counted_by_hooks(model) > 0
    # and so does a net that isn't there, but for what batch norms save to themselves on a CPU
    assert graph_of(model, "meta").kept == pytest.approx(graph.kept, rel=0.02)


def test_blocks_are_nodes_and_their_bytes_stay_the_same() -> None:
    autograd = graph_of(reference.DenseNet(**SMALL), "meta")
    modules = module_graph(autograd)
    assert modules.kept == autograd.kept
    places = [node.place for node in modules.nodes]
    assert {"features.denseblock1", "features.denseblock2", "features.transition1"} < set(places)
    assert LOSS in places
    # everything is on a way from the first convolution to the loss
    named = {(places[a], places[b]) for a, b in modules.edges}
    assert ("features.conv0", "features.denseblock1") in named
    assert ("classifier", LOSS) in named
    assert not {pair for pair in named if pair[::-1] in named}
    layers = module_graph(graph_of(reference.DenseNet(**SMALL), "meta", nesting=3))
    assert "features.denseblock2.denselayer3" in [node.place for node in layers.nodes]
    assert layers.kept == autograd.kept


def test_a_concatenation_belongs_to_the_module_after_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(torch.relu(torch.cat([y, y.sigmoid()], 1)))

    places = {node.operations[0]: node.place for node in graph_of(Net(), "meta").nodes}
    assert places["Cat"] == places["Relu"] == "second"
    assert places["Sigmoid"] == "first"


def test_a_fused_block_is_one_node_with_its_reader() -> None:
    modules = module_graph(graph_of(effdense.DenseNet(**SMALL), "meta"))
    (block,) = [node for node in modules.nodes if "denseblock1" in node.place]
    assert block.place == "features.denseblock1 + features.transition1"
    assert block.operations == ["DenseStage"]
    # the features of two layers of 4 on 6 channels, and statistics
    positions, width = 2 * 9 * 10, 6 + 2 * 4
    assert 4 * positions * width <= block.kept <= 4 * positions * width + 4 * 2 * (width + 32)


def test_both_nets_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    main(["graph", *SMALL_NET, "-o", "both.dot"])
    text = Path("both.dot").read_text()
    assert text.count("subgraph cluster_") == 2
    assert re.search(r'label="naive: keeps [0-9.,]+ MiB for backward"', text)
    assert text.count("{") == text.count("}")
    defined = set(re.findall(r"(g\dn\d+) \[", text))
    assert set(re.findall(r"g\dn\d+", text)) == defined
    # the node that keeps most is the darkest of both nets
    shades = [float(shade) for shade in re.findall(r'fillcolor="0.08 ([0-9.]+) 1.0"', text)]
    assert max(shades) == 1
    assert min(shades) == 0
    assert "both.dot" in capsys.readouterr().out
    main(["graph", *SMALL_NET, "-o", "one.dot", "--only", "effdense", "--level", "autograd"])
    assert "naive" not in Path("one.dot").read_text()


def test_a_converted_model_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--image-size", "32", "--batch-size", "2", "-o", "tv.dot"]
    main(["graph", "torchvision.models:densenet121", *options])
    text = Path("tv.dot").read_text()
    assert "features.denseblock4" in text
    assert "DenseStage" in text


def test_names_are_quoted() -> None:
    graph = module_graph(graph_of(effdense.DenseNet(**SMALL), "meta"))
    graph.nodes[0].place = 'a "b" \\ c'
    assert r'label="a \"b\" \\ c\n' in as_dot([("x", graph)])


def test_a_graph_that_keeps_nothing_is_drawn() -> None:
    assert 'fillcolor="0.08 0.000 1.0"' in as_dot([("x", Graph([Node("a", ["b"], 0)]))])


def fake_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = tmp_path / "bin" / "dot"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


def test_graphviz_draws_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # dot -Tsvg x.dot -o x.svg
    fake_dot(tmp_path, monkeypatch, 'echo "$1" > "$4"; cat "$2" >> "$4"')
    main(["graph", *SMALL_NET, "-o", "x.svg"])
    drawn = Path("x.svg").read_text()
    assert drawn == "-Tsvg\n" + Path("x.dot").read_text()
    assert capsys.readouterr().out.splitlines()[-2:] == ["x.dot", "x.svg"]


def test_graphviz_s_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_dot(tmp_path, monkeypatch, 'echo "Format: xyz not recognized" >&2; exit 1')
    with pytest.raises(SystemExit) as status:
        main(["graph", *SMALL_NET, "-o", "x.xyz"])
    assert status.value.code == 2
    assert "Format: xyz not recognized" in capsys.readouterr().err


def test_without_graphviz_the_text_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    main(["graph", *SMALL_NET, "-o", "x.svg"])
    assert Path("x.dot").exists()
    assert not Path("x.svg").exists()
    assert "Graphviz's dot is not on PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["densenet_bc", "--image-size", "2"], "refuses input of shape"),
        (["densenet_bc", "--nesting", "0"], "positive integer"),
        (["densenet_bc", "-o", "nowhere/x.svg"], "no folder nowhere"),
        (["densenet_bc", "-o", "."], "cannot write .: it is a folder"),
        (["densenet_bc", "-o", ".."], "cannot write ..: it is a folder"),
        (["torch.nn:Identity"], "no convolution"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as status:
        main(["graph", "--depth", "10", "--growth-rate", "4", *arguments])
    assert status.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
