"""The graph of a forward, with the bytes that each node keeps for backward.

NOTE [ whose node it is ]
Hooks on modules would put dense blocks on the plain path, so what belongs to which module
follows from autograd's graph alone: a node with parameters belongs to the module that has
them (a dense block and what reads it are one node); one without them to the module of what
it reads; and where it reads several, as a concatenation does, to the next module after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..tracing import nodes_behind

# Distinct modules that one node is named after; a node of more is named after their parents.
_MOST_NAMES = 3
LOSS = "loss"


@dataclass
class Node:
    """One or more of autograd's nodes."""

    place: str
    """The modules that they are of."""
    operations: list[str] = field(default_factory=list)
    """By autograd's names."""
    kept: int = 0
    """Bytes."""


@dataclass
class Graph:
    """Nodes in the order of forward, and edges from what makes a tensor to what reads it."""

    nodes: list[Node] = field(default_factory=list)
    edges: set[tuple[int, int]] = field(default_factory=set)

    @property
    def kept(self) -> int:
        """Bytes kept for backward, each storage counted once."""
        return sum(node.kept for node in self.nodes)


def autograd_graph(model: nn.Module, x: Tensor, nesting: int = 2) -> Graph:
    """A node for each of autograd's of one forward and a scalar loss.

    Args:
        model: on any device; on meta nothing is computed and nothing allocated.
        x: the input. It, parameters and buffers aren't counted as kept.
        nesting: how many parts of a module's name are its place: 2 for features.denseblock1.

    Raises:
        ValueError: where the output depends on no parameter.
    """
    output = next(leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor))
    if output.grad_fn is None:
        raise ValueError("the output depends on no parameter that needs a gradient")
    loss = output.square().mean()
    nodes = [node for node in nodes_behind(loss) if not _is_leaf(node)]
    before_loss = {node for node in nodes_behind(output) if not _is_leaf(node)}
    names = {id(p): name for name, p in model.named_parameters()}
    places = _places(nodes, before_loss, names, nesting)
    not_kept = [*model.parameters(), *model.buffers(), x]
    counted = {t.untyped_storage()._cdata for t in not_kept}
    index = {node: i for i, node in enumerate(nodes)}
    graph = Graph()
    for node in nodes:
        kept = 0
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            if storage._cdata not in counted:
                counted.add(storage._cdata)
                kept += storage.nbytes()
        graph.nodes.append(Node(places[node], [_operation(node)], kept))
        graph.edges |= {(index[producer], index[node]) for producer in _producers(node)}
    return graph


def module_graph(graph: Graph) -> Graph:
    """One node for each place, with what its nodes keep together."""
    merged = Graph()
    index: dict[str, int] = {}
    for node in graph.nodes:
        if node.place not in index:
            index[node.place] = len(merged.nodes)
            merged.nodes.append(Node(node.place))
        into = merged.nodes[index[node.place]]
        into.operations += node.operations
        into.kept += node.kept
    for a, b in graph.edges:
        source, target = (index[graph.nodes[i].place] for i in (a, b))
        if source != target:
            merged.edges.add((source, target))
    return merged


def as_dot(graphs: Iterable[tuple[str, Graph]]) -> str:
    """Graphviz's text: a cluster for each (title, graph), the more is kept the darker."""
    graphs = list(graphs)
    largest = max((node.kept for _, graph in graphs for node in graph.nodes), default=0) or 1
    lines = ["digraph effdense {", '  graph [fontname="Helvetica", ranksep=0.3];']
    lines.append('  node [shape=box, style=filled, fontname="Helvetica", fontsize=11];')
    for number, (title, graph) in enumerate(graphs):
        caption = f"{title}: keeps {graph.kept / 2**20:,.1f} MiB for backward"
        lines += [f"  subgraph cluster_{number} {{", f"    label={_quoted(caption)};"]
        for i, node in enumerate(graph.nodes):
            colour = f'"0.08 {node.kept / largest:.3f} 1.0"'
            label = _quoted(_label(node))
            lines.append(f"    g{number}n{i} [label={label}, fillcolor={colour}];")
        lines += [f"    g{number}n{a} -> g{number}n{b};" for a, b in sorted(graph.edges)]
        lines.append("  }")
    return "\n".join([*lines, "}"]) + "\n"


def _label(node: Node) -> str:
    what = node.operations[0]
    if len(node.operations) > 1:
        what = f"{len(node.operations)} operations"
    size = f"{node.kept / 2**20:,.2f} MiB" if node.kept >= 10240 else f"{node.kept:,} bytes"
    kept = [size] if node.kept else []
    return "\n".join([node.place or "(the model)", what, *kept])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _operation(node: Any) -> str:
    name = node.name().rpartition("::")[2].rstrip("0123456789")
    return name.removesuffix("Backward")


def _is_leaf(node: Any) -> bool:
    return hasattr(node, "variable")


def _producers(node: Any) -> list[Any]:
    """The nodes whose results this one reads, parameters aside."""
    found = [parent for parent, _ in node.next_functions if parent is not None]
    return [parent for parent in found if not _is_leaf(parent)]


def _saved(node: Any) -> Iterator[Tensor]:
    """What a node keeps: a Function's saved tensors, or an operation's by their names."""
    values = list(getattr(node, "saved_tensors", ()))
    values += [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            yield value


def _places(
    nodes: list[Any], before_loss: set[Any], names: dict[int, str], nesting: int
) -> dict[Any, str]:
    # See NOTE [ whose node it is ].
    own = {node: _own_place(node, names, nesting) for node in nodes}
    readers: dict[Any, Any] = {}
    for node in nodes:
        for producer in _producers(node):
            readers.setdefault(producer, node)
    places: dict[Any, str] = {}
    for node in nodes:
        producers = _producers(node)
        if node not in before_loss:
            places[node] = LOSS
        elif own[node] is not None:
            places[node] = own[node]
        elif len(producers) == 1:
            places[node] = places[producers[0]]
        else:
            after = readers.get(node)
            while after in before_loss and own[after] is None:
                after = readers.get(after)
            default = places[producers[0]] if producers else ""
            places[node] = own[after] if after in before_loss else default
    return places


def _own_place(node: Any, names: dict[int, str], nesting: int) -> Any:
    """The modules whose parameters a node reads, None without any."""
    leaves = [parent for parent, _ in node.next_functions if parent is not None]
    read = [names[id(p.variable)] for p in leaves if _is_leaf(p) and id(p.variable) in names]
    if not read:
        return None
    modules = [name.split(".")[:-1] for name in read]
    for parts in range(nesting, 0, -1):
        found = list(dict.fromkeys(".".join(module[:parts]) for module in modules))
        if len(found) <= _MOST_NAMES:
            return " + ".join(found)
    return " + ".join([found[0], "...", found[-1]])
