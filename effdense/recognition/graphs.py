"""Dense blocks and transitions in the graphs of torch.fx, made modules again.

A graph calls norms and convolutions one by one; what they were called by is gone, but for
modules that hold them under their old names and have no forward. Where the nodes of a graph
are those of a dense block, and one such module holds what they call, that module is made a
block of layers, and the nodes one call of it. It is for recognition, as of any module, to say
what the block can be converted to. Parameters keep their names.

A node of a block that is read outside of it keeps the block as it is.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from .. import reference
from .objections import AVERAGE_POOLS, BATCH_NORMS, CONVOLUTIONS
from .reading import read_norm_relu

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_POOLS = {F.avg_pool1d: nn.AvgPool1d, F.avg_pool2d: nn.AvgPool2d, F.avg_pool3d: nn.AvgPool3d}
_CATS = {torch.cat, torch.concat, torch.concatenate}
_LAYERS = (
    ("norm relu", "conv 1", "norm relu", "conv 3", "dropout"),
    ("norm relu", "conv 1", "norm relu", "conv 3"),
    ("norm relu", "conv 3", "dropout"),
    ("norm relu", "conv 3"),
)
_TRANSITION = ("norm relu", "conv 1", "pool")


class NewestFirst(reference.DenseBlock):
    """A dense block whose layers put their features before those they read."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = torch.cat([layer(x), x], 1)
        return x


class _Found(NamedTuple):
    """A dense block, or a transition, in one graph."""

    path: str
    """Of the module that holds what its nodes call."""
    chains: tuple[tuple[Node, ...], ...]
    """The nodes of each layer, or of the transition."""
    output: Node
    cats: tuple[Node, ...]
    kind: type[nn.Module]


def group(model: nn.Module) -> tuple[Callable[[], None], dict[str, str]]:
    """Make modules of the blocks and transitions in all graphs of a model.

    Returns:
        What puts everything back; and the blocks that were left, by name, with the reason.
    """
    undoing: list[Callable[[], None]] = []
    left: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, GraphModule):
            prefix = f"{name}." if name else ""
            found = _group(module, undoing)
            left |= {prefix + path: reason for path, reason in found.items()}

    def undo() -> None:
        while undoing:
            undoing.pop()()

    return undo, left


def _group(module: Any, undoing: list[Callable[[], None]]) -> dict[str, str]:
    # torchvision's feature extractors hold a graph for each mode, one of them in use
    held = {n: v for n, v in vars(module).items() if isinstance(v, Graph)}
    graphs = {id(graph): copy.deepcopy(graph) for graph in held.values()}
    left: dict[str, str] = {}
    places = [{f.path: f for f in _places(module, graph)} for graph in graphs.values()]
    found = {path for place in places for path in place}
    grouped = False
    for path in sorted(found):
        everywhere = [place[path] for place in places if path in place]
        objection = _objection(module, everywhere, len(places))
        if objection is not None:
            if everywhere[0].kind is not nn.Sequential:
                left[path] = objection
            continue
        _fill(module, everywhere[0], undoing)
        for graph, one in zip(graphs.values(), everywhere, strict=True):
            _replace(graph, one)
        grouped = True
    if grouped:
        in_use = held.pop("_graph")
        undoing.append(lambda: _use(module, held, in_use))
        _use(module, {n: graphs[id(g)] for n, g in held.items()}, graphs[id(in_use)])
    return left


def _use(module: Any, held: dict[str, Graph], in_use: Graph) -> None:
    vars(module).update(held)
    for graph in (*held.values(), in_use):
        graph.owning_module = module
    module.graph = in_use


# -------------------------------------------------------------------- what nodes compute


def _places(module: GraphModule, graph: Graph) -> Iterator[_Found]:
    """Blocks and transitions of a graph, in its order."""
    layers: list[tuple[Node, ...]] = []
    given: list[Node] = []
    new: list[Node] = []
    newest_first = False
    seen: set[Node] = set()
    for first in graph.nodes:
        if first in seen:
            continue
        chain = _chain(module, first, _TRANSITION)
        if chain is not None:
            yield _Found(".".join(_atoms(chain)), (chain,), chain[-1], (), nn.Sequential)
            continue
        chain = next(filter(None, (_chain(module, first, layer) for layer in _LAYERS)), None)
        if chain is None:
            continue
        seen |= {*chain}
        read = _parts(first.args[0])
        if len(new) == 1:
            newest_first = read == [*new, *given]
        if not layers or read != ([*new[::-1], *given] if newest_first else [*given, *new]):
            if layers:
                yield _block(layers, given, new, newest_first)
            layers, given, new, newest_first = [], read, [], False
        layers.append(chain)
        new.append(chain[-1])
    if layers:
        yield _block(layers, given, new, newest_first)


def _block(
    layers: Sequence[tuple[Node, ...]], given: list[Node], new: list[Node], newest_first: bool
) -> _Found:
    sources: list[Any] = [chain[0].args[0] for chain in layers]
    everything = [*new[::-1], *given] if newest_first else [*given, *new]
    whole = [node for node in new[-1].users if _parts(node) == everything]
    # without one, the last features are read by somebody else than their block
    output = whole[0] if len(whole) == 1 else new[-1]
    cats = [*sources[1:], *whole]
    if _parts(sources[0]) == given != [sources[0]] and len(given) == 1:
        # a cat of the input alone
        cats.append(sources[0])
    kind = NewestFirst if newest_first else reference.DenseBlock
    return _Found(_path(layers), tuple(layers), output, tuple(cats), kind)


def _chain(module: GraphModule, node: Any, pattern: Sequence[str]) -> tuple[Node, ...] | None:
    """The nodes from ``node`` on that compute ``pattern``, whoever reads them besides."""
    nodes: list[Node] = []
    for step in pattern:
        if nodes:
            node = _reader(module, nodes[-1], step)
        kind = "" if node is None else _kind(module, node)
        if kind == "norm" and step == "norm relu":
            nodes.append(node)
            node = _reader(module, node, "relu")
            kind = step
        if node is None or kind != step:
            return None
        nodes.append(node)
    return tuple(nodes)


def _reader(module: GraphModule, node: Node, step: str) -> Node | None:
    kinds = (step, "norm") if step == "norm relu" else (step,)
    return next((user for user in node.users if _kind(module, user) in kinds), None)


def _kind(module: GraphModule, node: Node) -> str:
    """What a node makes of one tensor, in the words of a dense layer; else nothing."""
    if not node.args or node.all_input_nodes != [node.args[0]]:
        return ""
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        return _kind_of(module.get_submodule(str(node.target)))
    if node.op in ("call_function", "call_method") and node.target in _RELUS:
        return "relu" if len(node.args) == 1 and not node.kwargs.keys() - {"inplace"} else ""
    named = node.kwargs.get("kernel_size"), node.kwargs.get("stride")
    sizes: list[Any] = [size for size in (*node.args[1:], *named) if size is not None]
    windows = {edge for size in sizes for edge in ((size,) if isinstance(size, int) else size)}
    if node.target in _POOLS and windows == {2} and len(node.args) + len(node.kwargs) <= 3:
        return "pool"
    return ""


def _kind_of(called: Any) -> str:
    if isinstance(called, nn.modules.batchnorm._BatchNorm):
        if type(called) in BATCH_NORMS:
            return "norm"
        return "norm relu" if read_norm_relu([called]) == (called, 1) else ""
    if isinstance(called, CONVOLUTIONS):
        return f"conv {called.kernel_size[0]}"
    if isinstance(called, nn.modules.dropout._DropoutNd):
        return "dropout"
    if isinstance(called, AVERAGE_POOLS):
        return "pool"
    return "relu" if type(called) is nn.ReLU else ""


def _parts(node: Any) -> list[Node]:
    """What a node concatenates over the channels: itself, where it is no concatenation."""
    if node.op != "call_function" or node.target not in _CATS:
        return [node]
    bound = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    tensors, dim = bound.pop("tensors", None), bound.pop("dim", bound.pop("axis", 0))
    if bound or dim != 1 or not isinstance(tensors, (list, tuple)):
        return [node]
    return [part for tensor in tensors for part in _parts(tensor)]


# ------------------------------------------------------------------------ modules again


def _atoms(chain: tuple[Node, ...]) -> list[str]:
    """The path of what holds all that a layer calls."""
    called = [str(node.target).split(".")[:-1] for node in chain if node.op == "call_module"]
    return _common(called)


def _common(paths: Sequence[Sequence[str]]) -> list[str]:
    alike = itertools.takewhile(lambda atoms: len(set(atoms)) == 1, zip(*paths, strict=False))
    return [atoms[0] for atoms in alike]


def _path(chains: Sequence[tuple[Node, ...]]) -> str:
    """What holds all layers of a block."""
    holders = [_atoms(chain) for chain in chains]
    return ".".join(_common(holders) if len(holders) > 1 else holders[0][:-1])


def _inside(found: _Found) -> set[Node]:
    return {*found.cats, found.output, *(node for chain in found.chains for node in chain)}


def _objection(module: GraphModule, everywhere: Sequence[_Found], graphs: int) -> str | None:
    """Why a block can't be made a module again, or None."""
    found = everywhere[0]
    for one in everywhere:
        inside = _inside(one)
        for node in inside - {one.output}:
            if any(reader not in inside for reader in node.users):
                what = node.target if node.op == "call_module" else node.name
                return f"{what} is asked for"
        if one.kind is not nn.Sequential and one.output not in one.cats:
            return "the features of all its layers are read nowhere together"
    if len(everywhere) < graphs or len({str(_called(one)) for one in everywhere}) > 1:
        return "it is another one in another mode"
    holder = module.get_submodule(found.path)
    used = [name for layer in _called(found) for name in layer]
    inner = {
        id(child) for m in holder.modules() if type(m) is not nn.Module for child in m.children()
    }
    held = {
        f"{found.path}.{name}"
        for name, m in holder.named_modules()
        if type(m) is not nn.Module and id(m) not in inner
    }
    counts = Counter(node.target for node in found.output.graph.nodes if node.op == "call_module")
    once = [name for name in used if not isinstance(module.get_submodule(name), nn.ReLU)]
    depth = found.path.count(".") + 1
    names = [tuple(_atoms(chain)[: depth + 1]) for chain in found.chains]
    if (
        not found.path
        or type(holder) is not nn.Module
        or held != set(used)
        or any(counts[name] > 1 for name in once)
        or len(set(names)) < len(names)
        or any(
            str(node.target).split(".")[:-1] != _atoms(chain)
            for chain in found.chains
            for node in chain
            if node.op == "call_module"
        )
    ):
        return "there is no module that holds it alone, and each of its layers"
    return None


def _called(found: _Found) -> list[list[str]]:
    return [[str(n.target) for n in chain if n.op == "call_module"] for chain in found.chains]


def _fill(module: GraphModule, found: _Found, undoing: list[Callable[[], None]]) -> None:
    """Make what holds a block a module that computes it."""
    depth = found.path.count(".") + 1
    holder = module.get_submodule(found.path)
    if found.kind is nn.Sequential:
        _become(holder, nn.Sequential, _in_turn(module, found.chains[0], holder), undoing)
        return
    layers = {}
    for chain in found.chains:
        name, *rest = _atoms(chain)[depth:]
        layer = layers[name] = holder.get_submodule(name)
        for deeper in rest:
            _become(layer, nn.Sequential, layer._modules, undoing)
            layer = layer.get_submodule(deeper)
        _become(layer, nn.Sequential, _in_turn(module, chain, layer), undoing)
    _become(holder, found.kind, layers, undoing)


def _in_turn(
    module: GraphModule, chain: tuple[Node, ...], holder: nn.Module
) -> dict[str, nn.Module]:
    """What a chain calls by name, and modules for the functions in it and for a ReLU again."""
    found: dict[str, nn.Module] = {}
    for i, node in enumerate(chain):
        name = str(node.target).rpartition(".")[2] if node.op == "call_module" else ""
        if name and name not in found:
            found[name] = module.get_submodule(str(node.target))
            continue
        name = next(n for n in (f"function{j}" for j in range(i, 99)) if n not in holder._modules)
        made = _POOLS[node.target](2) if node.target in _POOLS else nn.ReLU()
        found[name] = made.train(holder.training)
    return found


def _become(
    module: nn.Module,
    kind: type[nn.Module],
    held: dict[str, Any],
    undoing: list[Callable[[], None]],
) -> None:
    own, before = vars(module), (type(module), module._modules)

    def undo() -> None:
        own["_modules"] = before[1]
        module.__class__ = before[0]

    undoing.append(undo)
    own["_modules"] = held
    module.__class__ = kind


def _replace(graph: Graph, found: _Found) -> None:
    """One call in the place of a block's nodes."""
    source: Any = found.chains[0][0].args[0]
    x = _parts(source)[0] if source in found.cats else source
    with graph.inserting_before(found.output):
        call = graph.call_module(found.path, (x,))
    call.meta = dict(found.output.meta)
    found.output.replace_all_uses_with(call)
    inside = _inside(found)
    for node in [node for node in reversed(graph.nodes) if node in inside]:
        graph.erase_node(node)
