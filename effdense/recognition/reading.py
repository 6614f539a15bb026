"""Dense blocks and transitions recognised by structure and by their code, whoever wrote them.

NOTE [ read, then proved ]
The fused path reads parameters and never calls a layer, so it must know what calling it
would do. First the modules are read (parts.py): one batch norm and one convolution a layer,
or two of each, and nothing else with parameters. What the forwards do with them (which end of
the concatenation is the new one, a scale, a branch, a hook on a tensor) is then followed
through their code (capturing.py), operation by operation, and must be the dense block's. What
can't be followed isn't fused. Layers of other kinds are recomputed if their block chains them
and their code is certain to compute the same twice; else they are left as they are.

As a second line, a copy with random float64 parameters is run on the CPU (proving.py) and
must give the same outputs, gradients and buffers. That proof holds for a signature (the code,
and the types and plain attributes of all modules), is made once per process and never touches
the user's tensors or random state. Blocks of this package with their own layers need none.

What was found is kept while nothing it was found from has changed (watching.py), which is
looked at before every forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from torch import nn

from .. import reference
from .capturing import Capture, Symbol, follow
from .evidence import Evidence
from .objections import (
    AVERAGE_POOLS,
    BATCH_NORMS,
    SYNC_BATCH_NORMS,
    conv_objection,
    has_hooks,
    module_objection,
    pool_objection,
)
from .parts import (
    BlockParts,
    Chain,
    TransitionParts,
    _Layer,
    _leaves,
    _norm_objection,
    _own_objection,
    _read_layer,
    _scalars,
    _shared_objection,
    _width_objection,
    layers_of,
)
from .proving import _prove_block, _prove_chain, _prove_norm_relu, _prove_transition, _proved
from .source import Differs
from .watching import kept


def read_block(block: nn.Module, original: type[nn.Module]) -> BlockParts | str:
    """The parts of a block whose forward is ``original``'s, or why it can't be fused."""
    found = kept(block, original, _read_block)
    if isinstance(found, str):
        return found
    parts, layers = found
    if not any(layer.parts.drop_rate for layer in layers):
        return parts
    return parts._replace(
        layers=tuple(
            layer.parts if layer.mode.training else layer.parts._replace(drop_rate=0.0)
            for layer in layers
        )
    )


def _read_block(
    block: nn.Module, original: type[nn.Module], evidence: Evidence
) -> tuple[BlockParts, list[_Layer]] | str:
    """The parts, and where they were read; or an objection."""
    layers = layers_of(block)
    if not layers:
        return BlockParts((), False), []
    read: list[_Layer] = []
    for layer in layers:
        found = _read_layer(layer)
        if isinstance(found, str):
            return found
        read.append(found)
    parts = tuple(layer.parts for layer in read)
    objection = _width_objection(parts) or _shared_objection(parts) or _own_objection(block)
    if objection is not None:
        return objection
    captured = _captured_order(block, original, read, evidence)
    if isinstance(captured, str):
        return captured
    found_parts = BlockParts(parts, *captured)
    if original is reference.DenseBlock and all(type(x) is reference.DenseLayer for x in layers):
        return found_parts, read
    # followed for each layer above, so a number of equal ones proves no more than one number
    kinds = tuple(kind for kind, _ in groupby(layer.signature for layer in read))
    signature = (original, _scalars(block), kinds, evidence.key())
    proof = _proved(signature, lambda: _prove_block(block, original, found_parts.new_only))
    return proof if isinstance(proof, str) else (found_parts, read)


def _captured_order(
    block: nn.Module, original: type[nn.Module], read: Sequence[_Layer], evidence: Evidence
) -> tuple[bool, bool] | str:
    """Whether a block's code puts new features first, and returns them alone; or what else."""
    layers = layers_of(block)
    capture = Capture(block, original, evidence)
    rank = read[0].parts.conv1.weight.dim()
    features = [capture.node("input")]
    orders = {False, True}

    def meet(index: int, *args: Any, **kwargs: Any) -> Any:
        """A layer's call: its code is followed, and what it adds gets a node of its own."""
        given: Any = next(iter([*args, *kwargs.values()]), None)
        tensors = list(given) if isinstance(given, (list, tuple)) else [given]
        if len(args) + len(kwargs) != 1 or not all(isinstance(x, Symbol) for x in tensors):
            raise Differs("a layer is called with something else than features")
        x = capture.cat([tensor.node for tensor in tensors])
        _keep_orders(orders, capture.parts(x), features)
        if len(features) != index + 1 or not orders:
            raise Differs("a layer reads something else than all features before it")
        value = capture.call_plainly(layers[index], args, kwargs)
        if capture.cat([tensor.node for tensor in tensors]) != x:
            raise Differs("a layer changes the features that it reads")
        result = value.node if isinstance(value, Symbol) else -1
        new = _new_features(capture, read[index], x)
        added = capture.node("features", index)
        before = len(features)
        features.append(added)
        for found, meaning in (
            ([new], [added]),
            ([*capture.parts(x), new], [*capture.parts(x), added]),
            ([new, *capture.parts(x)], [added, *capture.parts(x)]),
        ):
            if result == capture.cat(found):
                return Symbol(capture.cat(meaning), rank)
        names: dict[Any, str] = {m: n for n, m in layers[index].named_modules()}
        said = capture.formula(result, names) if result >= 0 else f"a {type(value).__name__}"
        raise Differs(f"its layer {before} computes {said}")

    for index, layer in enumerate(layers):
        capture.intercept[layer] = lambda *a, index=index, **k: meet(index, *a, **k)
    output = follow(capture, Symbol(features[0], rank))
    if isinstance(output, str):
        return output
    if not isinstance(output, Symbol) or len(features) != len(layers) + 1:
        return "its forward does not return the features of all its layers"
    returned = capture.parts(output.node)
    new_only = len(returned) == len(layers) > 1
    _keep_orders(orders, returned, features[1:] if new_only else features)
    if capture.effects:
        return "its forward changes parameters or buffers"
    if not orders:
        return "its forward returns something else than all features, or all new ones"
    return min(orders), new_only


def _keep_orders(orders: set[bool], found: Sequence[int], features: Sequence[int]) -> None:
    if found != features:
        orders.discard(False)
    if found != features[::-1]:
        orders.discard(True)


def _new_features(capture: Capture, layer: _Layer, x: int) -> int:
    """The node of what a dense layer makes of the features x."""
    norm1, conv1, norm2, conv2, rate, channels = layer.parts
    new = capture.node("conv", conv1, capture.node("relu", capture.node("norm", norm1, x)))
    if norm2 is not None:
        new = capture.node("conv", conv2, capture.node("relu", capture.node("norm", norm2, new)))
    if rate > 0:
        dropped = capture.node("dropout", channels, rate, new)
        new = capture.node("if", ("training", layer.mode), dropped, new)
    return new


def read_transition(transition: nn.Module, original: type[nn.Module]) -> TransitionParts | str:
    """The parts of a transition whose forward is ``original``'s, or why it can't be fused."""
    return kept(transition, original, _read_transition)


def _read_transition(
    transition: nn.Module, original: type[nn.Module], evidence: Evidence
) -> TransitionParts | str:
    norms, convs, types = [], [], []
    for name, module in _leaves(transition):
        types.append(type(module))
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            objection = _norm_objection(name, module)
            norms.append(module)
            types += map(type, module.children())
        elif isinstance(module, nn.modules.conv._ConvNd):
            objection = conv_objection(name, module, 1)
            convs.append(module)
        elif isinstance(module, (nn.ReLU, nn.Identity)):
            objection = module_objection(name, module)
        elif isinstance(module, AVERAGE_POOLS) or name.endswith("pool"):
            objection = pool_objection(name, module) or module_objection(name, module)
        else:
            objection = f"{name} is a {type(module).__name__}"
        if objection is not None:
            return objection
    if len(norms) != 1 or len(convs) != 1:
        names = [name for name, _ in _leaves(transition)]
        return f"a transition's modules are {names}, not a norm, a convolution and a pooling"
    objection = _own_objection(transition)
    if objection is not None:
        return objection
    parts = TransitionParts(norms[0], convs[0])
    if parts.norm.num_features != parts.conv.in_channels:
        return "a transition's norm and convolution differ in channels"
    capture = Capture(transition, original, evidence)
    x = capture.node("input")
    expected = capture.node("norm", parts.norm, x)
    expected = capture.node("conv", parts.conv, capture.node("relu", expected))
    given = Symbol(x, parts.conv.weight.dim())
    objection = _captured_objection(capture, given, capture.node("avg_pool", expected))
    if objection is not None:
        return objection
    if original is reference.Transition:
        return parts
    signature = (original, _scalars(transition), tuple(types), evidence.key())
    proof = _proved(signature, lambda: _prove_transition(transition, original))
    return proof if isinstance(proof, str) else parts


def read_norm_relu(modules: Sequence[nn.Module | None]) -> tuple[Any, int] | str:
    """The batch norm at the head of ``modules`` if a ReLU follows, and how many modules both are.

    One where the norm applies it itself, else two.
    """
    norm = modules[0] if modules else None
    if not isinstance(norm, BATCH_NORMS):
        return "not a batch norm"
    objection = _norm_objection("the norm", norm)
    if objection is not None:
        return objection
    following = modules[1] if len(modules) > 1 else None
    if type(norm) in BATCH_NORMS:
        if type(following) is nn.ReLU and not has_hooks(following):
            return norm, 2
        return "no ReLU follows"
    found = kept(norm, type(norm), _read_own_norm)
    return found if isinstance(found, str) else (norm, 1)


def _read_own_norm(norm: Any, original: type[nn.Module], evidence: Evidence) -> str | None:
    """What speaks against a batch norm of somebody's own that should apply a ReLU too."""
    capture = Capture(norm, original, evidence)
    x = capture.node("input")
    dims = 2 + next((i for i, kind in enumerate(BATCH_NORMS) if isinstance(norm, kind)), 0)
    expected = capture.node("relu", capture.node("norm", norm, x))
    objection = _captured_objection(capture, Symbol(x, dims + 1), expected)
    if objection is not None:
        return objection
    signature = (original, _scalars(norm), tuple(map(type, norm.children())), evidence.key())
    proof = _proved(signature, lambda: _prove_norm_relu(norm))
    return proof if isinstance(proof, str) else None


def _captured_objection(capture: Capture, x: Symbol, expected: int) -> str | None:
    """What a module's code does with x instead of what is expected of it."""
    before = x.node
    output = follow(capture, x)
    if isinstance(output, str):
        return output
    if capture.effects or x.node != before:
        return "its forward changes its input, parameters or buffers"
    if not isinstance(output, Symbol) or output.node != expected:
        names: dict[Any, str] = {m: n for n, m in capture.root.named_modules()}
        if not isinstance(output, Symbol):
            return f"it returns a {type(output).__name__}"
        return f"it computes {capture.formula(output.node, names)}"
    return None


def read_chain(block: nn.Module, original: type[nn.Module]) -> Chain | str:
    """How a block of layers of any kind calls them, or why it can't be told.

    Its forward must be ``original``'s, a chain of ``x = cat([x, f(x)])`` in some spelling.
    """
    return kept(block, original, _read_chain)


def _read_chain(block: nn.Module, original: type[nn.Module], evidence: Evidence) -> Chain | str:
    for name, module in block.named_modules():
        if module is block:
            continue
        objection = module_objection(name, module)
        if objection is not None:
            return objection
        if isinstance(module, SYNC_BATCH_NORMS):
            return f"{name} is a SyncBatchNorm, not to be run twice"
    objection = _own_objection(block)
    if objection is not None:
        return objection
    if not layers_of(block):
        return "it has no layers"
    if original is reference.DenseBlock:
        # whoever builds one says that its layers are functions (see block/recomputation.py)
        return Chain(as_list=False, concatenates=False, newest_first=False, followed=False)
    chain = _captured_chain(block, original, evidence)
    if isinstance(chain, str):
        return chain
    kinds = tuple((type(module), _scalars(module)) for module in block.modules())
    proof = _proved((original, kinds, evidence.key()), lambda: _prove_chain(block, original))
    return proof if isinstance(proof, str) else chain


def _captured_chain(block: nn.Module, original: type[nn.Module], evidence: Evidence) -> Chain | str:
    """How a block's code calls its layers, whose own code may do anything that is repeatable."""
    layers = layers_of(block)
    capture = Capture(block, original, evidence)
    features = [capture.node("input")]
    orders, lists, concatenating = {False, True}, set(), set()

    def meet(index: int, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            raise Differs("a layer is called with something else than features")
        (given,) = args
        as_list = isinstance(given, (list, tuple))
        tensors = list(given) if as_list else [given]
        if not all(isinstance(x, Symbol) for x in tensors):
            raise Differs("a layer is called with something else than features")
        lists.add(as_list)
        parts = capture.parts(capture.cat([tensor.node for tensor in tensors]))
        _keep_orders(orders, parts, features)
        if len(features) != index + 1 or not orders:
            raise Differs("a layer reads something else than all features before it")
        together = Symbol(capture.cat(parts), tensors[0].rank)
        single = [together] if as_list else together
        value = capture.call_plainly(layers[index], [single], {})
        if not isinstance(value, Symbol):
            raise Differs("a layer returns something else than a tensor")
        if as_list:
            # the list may be taken apart, so it must come to the same as one tensor
            other = capture.call_plainly(layers[index], args, {})
            if not isinstance(other, Symbol) or other.node != value.node:
                raise Differs("a layer treats a list of features otherwise than their cat")
        if capture.parts(capture.cat([tensor.node for tensor in tensors])) != parts:
            raise Differs("a layer changes the features that it reads")
        if not as_list and together.node != capture.cat(parts):
            raise Differs("a layer changes the features that it reads")
        added = capture.node("features", index)
        features.append(added)
        made = capture.parts(value.node)
        rest = len(made) - len(parts)
        old_first, new_first = made[: len(parts)] == parts, made[rest:] == parts
        concatenates = rest > 0 and (old_first or new_first)
        concatenating.add(concatenates)
        if not concatenates:
            return Symbol(added, tensors[0].rank)
        orders.discard(old_first)
        combined = [*parts, added] if old_first else [added, *parts]
        return Symbol(capture.cat(combined), tensors[0].rank)

    for index, layer in enumerate(layers):
        capture.intercept[layer] = lambda *a, index=index, **k: meet(index, *a, **k)
    output = follow(capture, Symbol(features[0], _rank(block)))
    if isinstance(output, str):
        return output
    if capture.of_gradients:
        return (
            "what its layers compute depends on whether gradients are asked for, and they are run "
            "again in backward, where they are"
        )
    if len(features) != len(layers) + 1 or len(lists) != 1 or len(concatenating) != 1:
        return "its forward is no chain of concatenations"
    if isinstance(output, Symbol):
        _keep_orders(orders, capture.parts(output.node), features)
    if not isinstance(output, Symbol) or not orders:
        return "its forward is no chain of concatenations"
    return Chain(lists.pop(), concatenating.pop(), newest_first=min(orders))


def _rank(block: nn.Module) -> int | None:
    """Dimensions of a block's input, where a convolution says."""
    convs = [m for m in block.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    return convs[0].weight.dim() if convs else None
