"""What a module's forward computes, followed through its code instead of run.

NOTE [ what is followed ]
Python is interpreted, statement by statement, with the modules, functions and constants that
it really reads, and with symbols in place of tensors. So nothing of the user's is run, and
nothing is guessed from samples: what a branch on a size, a value or ``requires_grad`` does is
known on both of its sides. Whatever isn't certain to be a function of the input, parameters,
buffers and torch's random generators raises :class:`Unreadable`: an attribute that is stored,
an object that may change behind its name, a hook on a tensor, any call of unknown code.

Operations become nodes, equal ones the same number. Those that a DenseNet is made of have
nodes of their own; all others are only known to be functions. A symbol is a cell, because
operations in place change what is behind a name; where they may change something else too
(through a view), that becomes unknown.

What was read is kept (evidence.py): while it is the same, so is what was found.
"""

from __future__ import annotations

import ast
import builtins
import functools
import math
import operator
import os
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from .evidence import ABSENT, PLAIN, Evidence
from .objections import AVERAGE_POOLS, BATCH_NORMS, CONVOLUTIONS, has_hooks, pool_objection
from .source import Definition, Differs, Unreadable, definition

_TORCH = os.path.dirname(torch.__file__) + os.sep
_MOST_PATHS, _MOST_STEPS, _MOST_CALLS = 64, 100_000, 40


_CONSTANTS = (
    *PLAIN,
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.layout,
    torch.Size,
    range,
    slice,
)


class Symbol:
    """A tensor: the node of its value, its rank where known, and what it may be a view of."""

    __slots__ = ("bases", "node", "rank")

    def __init__(self, node: int, rank: int | None = None, bases: Iterable[Symbol] = ()) -> None:
        self.node, self.rank, self.bases = node, rank, tuple(bases)


@dataclass(frozen=True)
class Unknown:
    """A scalar that depends on tensors or modes; ``key`` says on what."""

    key: Any


@dataclass(frozen=True, eq=False)
class _Method:
    """A function bound to an object, or the name of a tensor's method."""

    function: Any
    owner: Any


@dataclass(frozen=True, eq=False)
class _Super:
    after: type
    owner: Any


@dataclass(frozen=True, eq=False)
class _Closure:
    """A function that was defined while interpreting."""

    node: Definition
    scope: _Scope
    defaults: list[Any]
    named_defaults: dict[str, Any]


class _Reference(list):
    """A list from outside, which may be read and not changed."""


class _Scope:
    def __init__(self, names: dict[str, Any], outer: _Scope | types.FunctionType) -> None:
        self.names, self.outer = names, outer

    def function(self) -> types.FunctionType:
        outer = self.outer
        return outer.function() if isinstance(outer, _Scope) else outer


class _Raised(Exception):
    """The code that is followed raises."""


class _Return(Exception):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


_RAISES = object()


class _Path:
    """The decisions of one run through a module's forward."""

    def __init__(self, prefix: Sequence[tuple[Any, bool]]) -> None:
        self.prefix = prefix
        self.decisions: list[tuple[Any, bool]] = []

    def decide(self, key: Any) -> bool:
        if isinstance(key, tuple) and key[0] == "training":
            for known, decision in self.decisions:
                if known == key:
                    return decision
        made = len(self.decisions)
        decision = self.prefix[made][1] if made < len(self.prefix) else True
        self.decisions.append((key, decision))
        return decision


class Capture:
    """One interpretation; nodes are numbers, whose meaning ``nodes`` holds."""

    def __init__(self, root: nn.Module, original: type, evidence: Evidence) -> None:
        self.root, self.original, self.evidence = root, original, evidence
        # modules whose calls mean something to whoever asks
        self.intercept: dict[nn.Module, Callable[..., Any]] = {}
        self._held = frozenset(root.modules())
        self.nodes: list[tuple[Any, ...]] = []
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._tensors: dict[int, tuple[Tensor, Symbol]] = {}
        self._paths: list[_Path] = []
        self._norms: list[Any] = []
        self._contexts = self._depth = self._steps = 0
        # operations in place on parameters and buffers
        self.effects: list[tuple[Any, ...]] = []

    # ------------------------------------------------------------------ nodes

    def node(self, *meaning: Any) -> int:
        if self._contexts:
            meaning = ("in a context", *meaning)
        return self._number(meaning)

    def _number(self, meaning: tuple[Any, ...]) -> int:
        if meaning not in self._numbers:
            self._numbers[meaning] = len(self.nodes)
            self.nodes.append(meaning)
        return self._numbers[meaning]

    def unknown(self) -> int:
        """A node that equals no other."""
        return self.node("unknown", len(self.nodes))

    def parts(self, node: int) -> list[int]:
        """What a node concatenates: itself, where it is no concatenation."""
        meaning = self.nodes[node]
        return list(meaning[1:]) if meaning[0] == "cat" else [node]

    def cat(self, nodes: Sequence[int]) -> int:
        flat = [part for node in nodes for part in self.parts(node)]
        return flat[0] if len(flat) == 1 else self.node("cat", *flat)

    def dropped(self, node: int) -> tuple[int, Any, float, bool] | None:
        """(kept, whose mode decides, rate, by channels) where node drops in training only."""
        meaning = self.nodes[node]
        if meaning[0] != "if":
            return None
        _, (_, module), dropped, kept = meaning
        found = self.nodes[dropped]
        if found[0] != "dropout" or found[3] != kept:
            return None
        return kept, module, found[2], found[1]

    def formula(self, node: int, names: dict[Any, str]) -> str:
        """A node in words; ``names`` of modules."""
        kind, *rest = self.nodes[node]
        if kind in ("conv", "norm"):
            return f"{names.get(rest[0], kind)}({self.formula(rest[1], names)})"
        if kind in ("relu", "avg_pool"):
            return f"{kind}({self.formula(rest[0], names)})"
        if kind == "cat":
            return f"cat({', '.join(self.formula(part, names) for part in rest)})"
        if kind == "input":
            return "x"
        if kind == "features":
            return f"f{rest[0]}"
        if kind == "dropout":
            return f"dropout({self.formula(rest[2], names)})"
        if kind == "if":
            return self.formula(rest[1], names)
        if kind in ("call", "module"):
            said = names.get(rest[0], rest[0]) if kind == "module" else rest[0]
            inner = [self.formula(n, names) for n in rest[1] if isinstance(n, int)]
            return f"{said}({', '.join(inner)})"
        return str(kind)

    # ---------------------------------------------------------------- modules

    def run(self, *args: Any) -> Any:
        """What the root's forward makes of ``args``, its class being ``original``."""
        return self._explore(lambda: self._forward(self.root, args, {}), args)

    def call_module(self, module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if module in self.intercept:
            return self.intercept[module](*args, **kwargs)
        return self.call_plainly(module, args, kwargs)

    def call_plainly(self, module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        kind = self._class_of(module)
        if module not in self._held:
            raise Unreadable(f"it calls a {kind.__name__} that it doesn't hold")
        if has_hooks(module):
            raise Unreadable(f"a {kind.__name__} in it has hooks")
        if "parametrizations" in module._modules:
            raise Unreadable(f"a {kind.__name__} in it is parametrised")
        for name in (
            "__call__",
            "_call_impl",
            "__getattr__",
            "__getattribute__",
        ):
            self.evidence.attribute(kind, name)
            if getattr(kind, name, None) is not getattr(nn.Module, name, None):
                raise Unreadable(f"{kind.__name__} has its own {name}")
        return self._explore(lambda: self._forward(module, args, kwargs), (args, kwargs))

    def _forward(self, module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        kind = self._class_of(module)
        self.evidence.attribute(kind, "forward")
        forward = getattr(kind, "forward", None)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not _is_torchs(forward):
            return self._norm(module, forward, args, kwargs)
        return self._call_forward(module, forward, args, kwargs)

    def _call_forward(
        self, module: Any, forward: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        if isinstance(module, BATCH_NORMS[-1:]) and forward is BATCH_NORMS[-1].forward:
            return self._torchs(module, args, kwargs)
        if _is_torchs(forward):
            return self._torchs(module, args, kwargs)
        if not isinstance(forward, types.FunctionType):
            raise Unreadable(f"the forward of {type(module).__name__} is no plain function")
        return self._call_function(forward, [module, *args], kwargs)

    def _torchs(self, module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A call of a module whose forward is torch's."""
        if isinstance(module, nn.Sequential):
            (value,) = [*args, *kwargs.values()]
            for child in module._modules.values():
                value = self.call_module(child, [value], {})
            return value
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        alone = len(args) + len(kwargs) == 1 and isinstance(x, Symbol)
        if isinstance(module, nn.Identity) and alone:
            return x
        exact = _defining(type(module), "forward")
        if alone and issubclass(exact, (*BATCH_NORMS, nn.modules.batchnorm._BatchNorm)):
            return Symbol(self.node("norm", module, x.node), x.rank)
        if alone and issubclass(exact, CONVOLUTIONS):
            return Symbol(self.node("conv", module, x.node), x.rank)
        if alone and exact is nn.ReLU:
            return self._relu(x, module.inplace)
        if alone and exact in _DROPOUT_MODULES and not module.inplace:
            channels = exact is not nn.Dropout
            return self._dropout(x, module.p, Unknown(("training", module)), channels)
        if alone and exact in AVERAGE_POOLS and pool_objection("", module) is None:
            return Symbol(self.node("avg_pool", x.node), x.rank)
        symbols = list(_symbols([*args, *kwargs.values()]))
        nodes = tuple(s.node for s in symbols)
        result = self.node("module", module, nodes)
        if getattr(module, "inplace", False) and isinstance(x, Symbol):
            return self._in_place(x, result)
        fresh = exact.__module__ in _FRESH_MODULES and exact is not nn.Identity
        return Symbol(result, x.rank if fresh and alone else None, [] if fresh else symbols)

    def _norm(self, module: Any, forward: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A batch norm with a forward of its own, which moves its buffers as torch's does."""
        before = len(self.effects)
        self._norms.append(module)
        try:
            value = self._call_forward(module, forward, args, kwargs)
        finally:
            self._norms.pop()
        effects, self.effects[before:] = self.effects[before:], []
        counted = module.num_batches_tracked
        training = dict(self._paths[-1].decisions).get(("training", module))
        expected = []
        if counted is not None and module.track_running_stats and training is not False:
            expected = [("add_", id(counted), (1,))]
        # torch's own forward, called by super(), leaves no notes
        if effects and effects != expected:
            raise Unreadable(f"{type(module).__name__} moves its buffers in its own way")
        return value

    def _class_of(self, module: nn.Module) -> type:
        return self.original if module is self.root else type(module)

    # ------------------------------------------------------------------ paths

    def _explore(self, run: Callable[[], Any], arguments: Any) -> Any:
        """What all paths through a call come to."""
        outcomes: list[tuple[list[tuple[Any, bool]], Any]] = []
        waiting: list[list[tuple[Any, bool]]] = [[]]
        before = _state(arguments)
        while waiting:
            prefix = waiting.pop()
            path = _Path(prefix)
            self._paths.append(path)
            try:
                value = run()
            except _Raised:
                value = _RAISES
            finally:
                self._paths.pop()
            made = path.decisions
            outcomes.append((made, value))
            for i in range(len(prefix), len(made)):
                waiting.append([*made[:i], (made[i][0], not made[i][1])])
            if len(outcomes) + len(waiting) > _MOST_PATHS:
                raise Unreadable("its code has too many branches")
            if made and _state(arguments) != before:
                raise Unreadable("it changes what it is given, in one of its branches")
        if len(outcomes) == 1 and outcomes[0][1] is _RAISES:
            raise _Raised
        return self._joined(outcomes, 0)

    def _joined(self, outcomes: list[tuple[list[tuple[Any, bool]], Any]], depth: int) -> Any:
        values = [value for _, value in outcomes]
        first = values[0]
        if all(_same(first, value) for value in values[1:]):
            return first
        key = outcomes[0][0][depth][0]
        sides = [[o for o in outcomes if o[0][depth][1] is side] for side in (True, False)]
        yes, no = (self._joined(side, depth + 1) for side in sides)
        if _same(yes, no):
            return yes
        pair = [value for value in (yes, no) if value is not _RAISES]
        if not all(isinstance(value, Symbol) for value in pair):
            if all(isinstance(value, (*PLAIN, Unknown)) for value in pair):
                return Unknown(key)
            raise Unreadable("what it returns depends on a condition that is not known")
        if len(pair) == 2 and isinstance(key, tuple) and key[0] == "training":
            return Symbol(self.node("if", key, yes.node, no.node), yes.rank, [yes, no])
        return Symbol(self.unknown(), None, pair)

    def _truth(self, value: Any) -> bool:
        if isinstance(value, (Symbol, Unknown)):
            key = value.key if isinstance(value, Unknown) else ("value", value.node)
            return self._paths[-1].decide(key)
        if isinstance(value, nn.Module):
            if "__bool__" in dir(type(value)) or "__len__" in dir(type(value)):
                return len(value._modules) > 0
            return True
        if isinstance(value, (*_CONSTANTS, list, tuple, dict, set, frozenset)):
            return bool(value)
        if isinstance(
            value, (types.FunctionType, types.BuiltinFunctionType, type, _Method, _Closure)
        ):
            return True
        raise Unreadable(f"a {type(value).__name__} decides a branch")

    # ------------------------------------------------------------- operations

    def _relu(self, x: Symbol, inplace: bool) -> Symbol:
        node = self.node("relu", x.node)
        return self._in_place(x, node) if inplace else Symbol(node, x.rank)

    def _dropout(self, x: Symbol, rate: Any, training: Any, channels: bool) -> Symbol:
        if rate == 0 or training is False:
            return Symbol(x.node, x.rank, [x, *x.bases])
        node = self.node("dropout", channels, rate, x.node)
        if isinstance(training, Unknown) and training.key[0] == "training":
            node = self.node("if", training.key, node, x.node)
        elif training is not True:
            node = self.unknown()
        return Symbol(node, x.rank, [x, *x.bases])

    def _in_place(self, x: Symbol, node: int, note: tuple[Any, ...] = ()) -> Symbol:
        """x holds ``node`` from now on; what it may be a view of, nobody knows what."""
        if note[:1] == ("add_",) and self._tensor_of(x) is not None:
            self.effects.append(("add_", id(self._tensor_of(x)), note[1]))
            return x
        for changed in (x, *x.bases):
            tensor = self._tensor_of(changed)
            if tensor is not None:
                self.effects.append(("changed", id(tensor)))
        for base in x.bases:
            base.node = self.unknown()
        x.node = node
        return x

    def _tensor_of(self, x: Symbol) -> Tensor | None:
        return next((tensor for tensor, symbol in self._tensors.values() if symbol is x), None)

    def _operation(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A function of tensors that is only known to be one."""
        if "out" in kwargs or "generator" in kwargs:
            raise Unreadable(f"{name} is given an output or a generator")
        self._check_operands([*args, *kwargs.values()], name)
        symbols = list(_symbols([*args, *kwargs.values()]))
        nodes = tuple(s.node for s in symbols)
        result = self.node("call", name, nodes, _spelled(args), _spelled(kwargs))
        if name.endswith("_") and not name.endswith("__"):
            if not args or not isinstance(args[0], Symbol):
                raise Unreadable(f"{name} changes something else than a tensor")
            return self._in_place(args[0], result, (name, tuple(args[1:])))
        bases: list[Symbol] = []
        if name not in _FRESH:
            bases = [each for s in symbols for each in (s, *s.bases)]
        elementwise = name in _ELEMENTWISE and symbols
        return Symbol(result, symbols[0].rank if elementwise else None, bases)

    def _check_operands(self, values: Any, name: str) -> None:
        for value in values:
            if isinstance(value, (list, tuple)):
                self._check_operands(value, name)
            elif not isinstance(value, (*_CONSTANTS, Symbol, Unknown)):
                raise Unreadable(f"{name} is given a {type(value).__name__}")

    def _torch_function(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A call of one of torch's functions, or NotImplemented."""
        handler = _handlers().get(function)
        if handler is not None:
            return handler(self, args, kwargs)
        if function in _same_as_false():
            return False
        name = getattr(function, "__name__", "")
        if function not in _operations():
            return NotImplemented
        if isinstance(function, types.FunctionType) and "inplace" in _parameters(function):
            bound = dict(zip(_parameters(function), args, strict=False)) | kwargs
            if bound.get("inplace", False) is not False:
                name = f"{name}_"
        return self._operation(name, args, kwargs)

    def _tensor_method(
        self, x: Symbol, name: str, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        if name in ("dim", "ndimension") and not args and x.rank is not None:
            return x.rank
        if name in ("size", "dim", "ndimension", "numel", "item", "tolist", "is_contiguous") or (
            name.startswith("is_") and not args
        ):
            if name == "size" and not args and not kwargs:
                return self._shape(x)
            return Unknown((name, x.node, _spelled(args)))
        if name == "relu" or name == "relu_":
            return self._relu(x, name == "relu_")
        if name.startswith("_") or name in _NO_FUNCTIONS or not hasattr(Tensor, name):
            raise Unreadable(f"it calls a tensor's {name}")
        return self._operation(name, [x, *args], kwargs)

    def _shape(self, x: Symbol) -> Any:
        if x.rank is None:
            return Unknown(("shape", x.node))
        return tuple(Unknown(("size", x.node, i)) for i in range(x.rank))

    # ------------------------------------------------------------------ calls

    def call(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if isinstance(function, nn.Module):
            return self.call_module(function, args, kwargs)
        if isinstance(function, _Closure):
            return self._call_closure(function, args, kwargs)
        if isinstance(function, _Method):
            return self._call_method(function, args, kwargs)
        if isinstance(function, Unknown):
            return Unknown(("call", function.key, _spelled(args)))
        if isinstance(function, types.MethodType):
            return self.call(
                function.__func__, [self.admit(function.__self__, "self"), *args], kwargs
            )
        try:
            builtin = _BUILTINS.get(function)
            found = self._torch_function(function, args, kwargs)
        except TypeError:
            raise Unreadable(f"it calls a {type(function).__name__}") from None
        if found is not NotImplemented:
            return found
        if builtin is not None:
            return builtin(self, args, kwargs)
        if isinstance(function, types.FunctionType):
            if function.__code__.co_filename.startswith(_TORCH):
                raise Unreadable(f"it calls {function.__module__}.{function.__qualname__}")
            return self._call_function(function, args, kwargs)
        owner = getattr(function, "__module__", None)
        name = getattr(function, "__qualname__", type(function).__name__)
        raise Unreadable(f"it calls {f'{owner}.' if owner else ''}{name}")

    def _call_function(
        self, function: types.FunctionType, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        self.evidence.function(function)
        node = definition(function.__code__)
        defaults = [self.admit(v, "a default") for v in function.__defaults__ or ()]
        named = {n: self.admit(v, n) for n, v in (function.__kwdefaults__ or {}).items()}
        return self._run_body(node, _Scope({}, function), defaults, named, args, kwargs)

    def _call_closure(self, closure: _Closure, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        scope = _Scope({}, closure.scope)
        return self._run_body(
            closure.node, scope, closure.defaults, closure.named_defaults, args, kwargs
        )

    def _run_body(
        self,
        node: Definition,
        scope: _Scope,
        defaults: list[Any],
        named_defaults: dict[str, Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        scope.names |= _bound(node.args, defaults, named_defaults, args, kwargs)
        self._depth += 1
        if self._depth > _MOST_CALLS:
            raise Unreadable("its calls go too deep")
        try:
            if isinstance(node, ast.Lambda):
                return self.value(node.body, scope)
            if any(
                isinstance(each, (ast.Yield, ast.YieldFrom, ast.Await)) for each in ast.walk(node)
            ):
                raise Unreadable(f"{node.name} is a generator")
            self._statements(node.body, scope)
        except _Return as result:
            return result.value
        finally:
            self._depth -= 1
        return None

    def _call_method(self, method: _Method, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        function, owner = method.function, method.owner
        if isinstance(owner, Symbol):
            return self._tensor_method(owner, function, args, kwargs)
        if isinstance(owner, nn.Module):
            if function in _module_methods():
                found = function(owner, *args, **kwargs)
                return found if isinstance(found, int) else list(found)
            if _is_torchs(function) and function.__name__ == "forward":
                return self._torchs(owner, args, kwargs)
            if function is BATCH_NORMS[-1].forward:
                return self._torchs(owner, args, kwargs)
            return self.call(function, [owner, *args], kwargs)
        # a method of a plain value or of a container made here
        return getattr(owner, function)(*args, **kwargs)

    # -------------------------------------------------------------- reading

    def admit(self, value: Any, name: str) -> Any:
        """A value from outside as the interpretation sees it."""
        if isinstance(value, (*_CONSTANTS, nn.Module, types.ModuleType, types.BuiltinFunctionType)):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (types.FunctionType, type, types.MethodType)):
            return value
        if type(value) in (tuple, list):
            if type(value) is list:
                self.evidence.contents(value)
            admitted = [self.admit(v, name) for v in value]
            return tuple(admitted) if type(value) is tuple else _Reference(admitted)
        if isinstance(value, dict) and all(isinstance(key, PLAIN) for key in value):
            self.evidence.contents(value)
            return types.MappingProxyType({k: self.admit(v, name) for k, v in value.items()})
        if value in _operations_or_none(value):
            return value
        raise Unreadable(f"it reads {name}, a {type(value).__name__}, which may change")

    def _tensor(self, tensor: Tensor) -> Symbol:
        if id(tensor) not in self._tensors:
            symbol = Symbol(self._number(("tensor", id(tensor))), tensor.dim())
            self._tensors[id(tensor)] = tensor, symbol
        return self._tensors[id(tensor)][1]

    def attribute(self, owner: Any, name: str) -> Any:
        if isinstance(owner, nn.Module):
            return self._module_attribute(owner, name, self._class_of(owner).__mro__)
        if isinstance(owner, Symbol):
            return self._tensor_attribute(owner, name)
        if isinstance(owner, Unknown):
            return Unknown((name, owner.key))
        if isinstance(owner, _Super):
            mro = self._class_of(owner.owner).__mro__
            if owner.after not in mro:
                raise Unreadable("super() of another class")
            return self._class_attribute(owner.owner, name, mro[mro.index(owner.after) + 1 :])
        if isinstance(owner, types.ModuleType):
            if name not in vars(owner):
                raise Unreadable(f"{owner.__name__} has no {name} yet")
            if owner is F and name == "dropout":
                # its masks are drawn here in any case, whatever stands for it
                return _DROPOUT
            self.evidence.name(vars(owner), name)
            return self.admit(vars(owner)[name], f"{owner.__name__}.{name}")
        if isinstance(owner, type):
            return self._class_level(owner, name)
        if isinstance(owner, (torch.dtype, torch.device)):
            return getattr(owner, name)
        allowed = next((names for kind, names in _METHODS if type(owner) is kind), ())
        if name in allowed:
            return _Method(name, owner)
        raise Unreadable(f"it reads {name} of a {type(owner).__name__}, which may change")

    def _module_attribute(self, module: nn.Module, name: str, mro: Sequence[type]) -> Any:
        own = vars(module)
        if module not in self._held:
            raise Unreadable(f"it reads {name} of a {type(module).__name__} that it doesn't hold")
        if name == "training":
            return Unknown(("training", module))
        # properties come before what an instance holds
        for kind in mro:
            if isinstance(vars(kind).get(name), property):
                return self._class_attribute(module, name, mro)
        if name in own:
            value = own[name]
            if isinstance(value, Tensor):
                raise Unreadable(f"{name} is a tensor that is no parameter or buffer")
            return self.admit(value, f"self.{name}")
        try:
            return self._class_attribute(module, name, mro)
        except AttributeError:
            for held in (module._parameters, module._buffers, module._modules):
                if name in held:
                    return self.admit(held[name], f"self.{name}")
            raise

    def _class_attribute(self, owner: Any, name: str, mro: Sequence[type]) -> Any:
        found = next((kind for kind in mro if name in vars(kind)), None)
        if found is None:
            raise AttributeError(name)
        value = vars(found)[name]
        self.evidence.attribute(mro[0], name)
        if isinstance(value, types.FunctionType):
            return _Method(value, owner)
        if isinstance(value, staticmethod):
            return value.__func__
        if isinstance(value, property):
            if not isinstance(value.fget, types.FunctionType):
                raise Unreadable(f"{name} is a property that can't be read")
            return self.call(value.fget, [owner], {})
        if hasattr(type(value), "__get__"):
            raise Unreadable(f"{name} is a {type(value).__name__}")
        return self.admit(value, name)

    def _class_level(self, owner: type, name: str) -> Any:
        found = next((kind for kind in owner.__mro__ if name in vars(kind)), None)
        if found is None or type(owner) is not type:
            raise Unreadable(f"it reads {owner.__name__}.{name}")
        value = vars(found)[name]
        self.evidence.attribute(owner, name)
        if isinstance(value, types.FunctionType):
            return value
        if isinstance(value, staticmethod):
            return value.__func__
        if isinstance(value, property) or hasattr(type(value), "__get__"):
            raise Unreadable(f"it reads {owner.__name__}.{name}")
        return self.admit(value, name)

    def _tensor_attribute(self, x: Symbol, name: str) -> Any:
        if name == "shape":
            return self._shape(x)
        if name == "ndim" and x.rank is not None:
            return x.rank
        if name in ("ndim", "dtype", "device", "requires_grad", "is_cuda", "layout", "is_leaf"):
            return Unknown((name, x.node))
        if name in ("T", "mT", "H", "data"):
            return self._operation(name, [x], {})
        if name.startswith("_") or not callable(getattr(Tensor, name, None)):
            raise Unreadable(f"it reads a tensor's {name}")
        return _Method(name, x)

    def _name(self, name: str, scope: _Scope) -> Any:
        level: Any = scope
        while isinstance(level, _Scope):
            if name in level.names:
                return level.names[name]
            level = level.outer
        function: types.FunctionType = level
        free = function.__code__.co_freevars
        if name in free:
            assert function.__closure__ is not None
            cell = function.__closure__[free.index(name)]
            self.evidence.cell(cell)
            return self.admit(cell.cell_contents, name)
        names = function.__globals__
        if not names.get("__name__", "").startswith("torch."):
            self.evidence.name(names, name)
        if name in names:
            return self.admit(names[name], name)
        if hasattr(builtins, name):
            return getattr(builtins, name)
        raise _Raised

    # ------------------------------------------------------------- statements

    def _statements(self, body: Sequence[ast.stmt], scope: _Scope) -> None:
        for statement in body:
            self._steps += 1
            if self._steps > _MOST_STEPS:
                raise Unreadable("its code runs too long")
            method = getattr(self, f"_do_{type(statement).__name__}", None)
            if method is None:
                raise Unreadable(f"it has a {type(statement).__name__} statement")
            method(statement, scope)

    def _do_Expr(self, s: ast.Expr, scope: _Scope) -> None:
        if not isinstance(s.value, ast.Constant):
            self.value(s.value, scope)

    def _do_Pass(self, s: ast.Pass, scope: _Scope) -> None:
        pass

    def _do_Return(self, s: ast.Return, scope: _Scope) -> None:
        raise _Return(None if s.value is None else self.value(s.value, scope))

    def _do_Raise(self, s: ast.Raise, scope: _Scope) -> None:
        raise _Raised

    def _do_Break(self, s: ast.Break, scope: _Scope) -> None:
        raise _Break

    def _do_Continue(self, s: ast.Continue, scope: _Scope) -> None:
        raise _Continue

    def _do_Assert(self, s: ast.Assert, scope: _Scope) -> None:
        if not self._truth(self.value(s.test, scope)):
            raise _Raised

    def _do_If(self, s: ast.If, scope: _Scope) -> None:
        self._statements(s.body if self._truth(self.value(s.test, scope)) else s.orelse, scope)

    def _do_While(self, s: ast.While, scope: _Scope) -> None:
        while self._truth(self.value(s.test, scope)):
            try:
                self._statements([ast.Pass(), *s.body], scope)
            except _Break:
                return
            except _Continue:
                continue
        self._statements(s.orelse, scope)

    def _do_For(self, s: ast.For, scope: _Scope) -> None:
        for item in self._items(self.value(s.iter, scope)):
            self._store(s.target, item, scope)
            try:
                self._statements([ast.Pass(), *s.body], scope)
            except _Break:
                return
            except _Continue:
                continue
        self._statements(s.orelse, scope)

    def _do_With(self, s: ast.With, scope: _Scope) -> None:
        """Contexts of torch's that change how tensors are computed, and nothing else."""
        for item in s.items:
            call = item.context_expr
            if not isinstance(call, ast.Call) or item.optional_vars is not None:
                raise Unreadable("it has a with statement")
            function = self.value(call.func, scope)
            if function not in _CONTEXTS:
                raise Unreadable("it has a with statement")
            for argument in [*call.args, *(k.value for k in call.keywords)]:
                self.value(argument, scope)
        self._contexts += 1
        try:
            self._statements(s.body, scope)
        finally:
            self._contexts -= 1

    def _do_Assign(self, s: ast.Assign, scope: _Scope) -> None:
        value = self.value(s.value, scope)
        for target in s.targets:
            self._store(target, value, scope)

    def _do_AnnAssign(self, s: ast.AnnAssign, scope: _Scope) -> None:
        if s.value is not None:
            self._store(s.target, self.value(s.value, scope), scope)

    def _do_AugAssign(self, s: ast.AugAssign, scope: _Scope) -> None:
        if not isinstance(s.target, ast.Name):
            raise Unreadable(f"it stores {ast.unparse(s.target)}")
        old, new = self._name(s.target.id, scope), self.value(s.value, scope)
        if isinstance(old, Symbol):
            name = f"{type(s.op).__name__.lower()}_"
            self._operation(name, [old, new], {})
            return
        if isinstance(old, _Reference):
            raise Unreadable(f"it changes {s.target.id}")
        if type(old) is list and isinstance(s.op, ast.Add):
            # in place, as Python does
            old.extend(self._items(new))
            return
        self._store(s.target, self._binary(s.op, old, new), scope)

    def _do_Delete(self, s: ast.Delete, scope: _Scope) -> None:
        for target in s.targets:
            if not isinstance(target, ast.Name) or target.id not in scope.names:
                raise Unreadable(f"it deletes {ast.unparse(target)}")
            del scope.names[target.id]

    def _do_FunctionDef(self, s: ast.FunctionDef, scope: _Scope) -> None:
        if s.decorator_list:
            raise Unreadable(f"{s.name} is decorated")
        scope.names[s.name] = self._closure(s, scope)

    def _closure(self, node: Definition, scope: _Scope) -> _Closure:
        defaults = [self.value(d, scope) for d in node.args.defaults]
        named = {
            argument.arg: self.value(default, scope)
            for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            if default is not None
        }
        return _Closure(node, scope, defaults, named)

    def _store(self, target: ast.expr, value: Any, scope: _Scope) -> None:
        if isinstance(target, ast.Name):
            scope.names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            self._unpack(target.elts, value, scope)
        elif isinstance(target, ast.Subscript):
            owner, index = self.value(target.value, scope), self.value(target.slice, scope)
            if isinstance(owner, Symbol):
                self._operation("setitem_", [owner, index, value], {})
            elif type(owner) in (list, dict) and isinstance(index, PLAIN):
                owner[index] = value
            else:
                raise Unreadable(f"it stores {ast.unparse(target)}")
        else:
            raise Unreadable(f"it stores {ast.unparse(target)}")

    def _unpack(self, targets: Sequence[ast.expr], value: Any, scope: _Scope) -> None:
        if any(isinstance(target, ast.Starred) for target in targets):
            raise Unreadable("it unpacks by a star")
        if isinstance(value, Symbol):
            values: list[Any] = [
                self._operation("unpack", [value, i], {}) for i in range(len(targets))
            ]
        elif isinstance(value, Unknown):
            values = [Unknown((i, value.key)) for i in range(len(targets))]
        else:
            values = list(self._items(value))
        if len(values) != len(targets):
            raise _Raised
        for target, each in zip(targets, values, strict=True):
            self._store(target, each, scope)

    def _items(self, value: Any) -> Iterator[Any]:
        if isinstance(value, nn.ModuleDict):
            return iter(list(value._modules))
        if isinstance(value, (nn.Sequential, nn.ModuleList)):
            return iter(list(value._modules.values()))
        if isinstance(value, (list, tuple, range, str, dict, set, types.MappingProxyType)):
            return iter(value)
        if isinstance(value, _ITERATORS):
            return iter(list(value))
        raise Unreadable(f"it goes through a {type(value).__name__}")

    # ------------------------------------------------------------ expressions

    def value(self, node: ast.expr, scope: _Scope) -> Any:
        method = getattr(self, f"_of_{type(node).__name__}", None)
        if method is None:
            raise Unreadable(f"it has a {type(node).__name__} expression")
        return method(node, scope)

    def _of_Constant(self, e: ast.Constant, scope: _Scope) -> Any:
        return e.value

    def _of_Name(self, e: ast.Name, scope: _Scope) -> Any:
        return self._name(e.id, scope)

    def _of_Attribute(self, e: ast.Attribute, scope: _Scope) -> Any:
        try:
            return self.attribute(self.value(e.value, scope), e.attr)
        except AttributeError:
            raise _Raised from None

    def _of_Call(self, e: ast.Call, scope: _Scope) -> Any:
        if isinstance(e.func, ast.Name) and e.func.id == "super":
            return self._super(e, scope)
        function = self.value(e.func, scope)
        args: list[Any] = []
        for argument in e.args:
            if isinstance(argument, ast.Starred):
                args += self._items(self.value(argument.value, scope))
            else:
                args.append(self.value(argument, scope))
        kwargs: dict[str, Any] = {}
        for keyword in e.keywords:
            value = self.value(keyword.value, scope)
            if keyword.arg is None:
                if not isinstance(value, (dict, types.MappingProxyType)):
                    raise Unreadable("it calls by a mapping")
                kwargs |= value
            else:
                kwargs[keyword.arg] = value
        return self.call(function, args, kwargs)

    def _super(self, e: ast.Call, scope: _Scope) -> _Super:
        if e.args:
            after, owner = (self.value(argument, scope) for argument in e.args)
        else:
            function = scope.function()
            after = self._name("__class__", _Scope({}, function))
            level = scope
            while isinstance(level.outer, _Scope):
                level = level.outer
            owner = next(iter(level.names.values()))
        if not isinstance(after, type) or not isinstance(owner, nn.Module):
            raise Unreadable("it calls super()")
        return _Super(after, owner)

    def _of_Lambda(self, e: ast.Lambda, scope: _Scope) -> Any:
        return self._closure(e, scope)

    def _of_IfExp(self, e: ast.IfExp, scope: _Scope) -> Any:
        return self.value(e.body if self._truth(self.value(e.test, scope)) else e.orelse, scope)

    def _of_NamedExpr(self, e: ast.NamedExpr, scope: _Scope) -> Any:
        value = self.value(e.value, scope)
        self._store(e.target, value, scope)
        return value

    def _of_BoolOp(self, e: ast.BoolOp, scope: _Scope) -> Any:
        stop = isinstance(e.op, ast.Or)
        for operand in e.values[:-1]:
            value = self.value(operand, scope)
            if self._truth(value) is stop:
                return value if not isinstance(value, (Symbol, Unknown)) else stop
        return self.value(e.values[-1], scope)

    def _of_UnaryOp(self, e: ast.UnaryOp, scope: _Scope) -> Any:
        value = self.value(e.operand, scope)
        if isinstance(e.op, ast.Not):
            return not self._truth(value)
        if isinstance(value, Symbol):
            return self._operation(type(e.op).__name__.lower(), [value], {})
        if isinstance(value, Unknown):
            return Unknown((type(e.op).__name__, value.key))
        if not isinstance(value, (int, float)):
            raise Unreadable(f"it computes with a {type(value).__name__}")
        return _UNARY[type(e.op)](value)

    def _of_BinOp(self, e: ast.BinOp, scope: _Scope) -> Any:
        return self._binary(e.op, self.value(e.left, scope), self.value(e.right, scope))

    def _binary(self, op: ast.operator, left: Any, right: Any) -> Any:
        name = type(op).__name__.lower()
        if isinstance(left, Symbol) or isinstance(right, Symbol):
            return self._operation(name, [left, right], {})
        if isinstance(left, Unknown) or isinstance(right, Unknown):
            sides = [_spelled(side) for side in (left, right)]
            return Unknown((name, *sides))
        if not all(isinstance(v, (int, float, str, tuple, list)) for v in (left, right)):
            raise Unreadable(f"it computes with a {type(left).__name__}")
        if type(op) not in _BINARY:
            raise Unreadable(f"it has a {type(op).__name__} expression")
        try:
            return _BINARY[type(op)](left, right)
        except Exception:
            raise _Raised from None

    def _of_Compare(self, e: ast.Compare, scope: _Scope) -> Any:
        left, result = self.value(e.left, scope), True
        for op, node in zip(e.ops, e.comparators, strict=True):
            right = self.value(node, scope)
            result = self._compared(op, left, right)
            if len(e.ops) > 1 and not self._truth(result):
                return False
            left = right
        return result

    def _compared(self, op: ast.cmpop, left: Any, right: Any) -> Any:
        if isinstance(op, (ast.Is, ast.IsNot)):
            if isinstance(left, Unknown) and isinstance(right, bool):
                return Unknown(("is", left.key, right, type(op).__name__))
            same = left is right
            return same if isinstance(op, ast.Is) else not same
        name = type(op).__name__.lower()
        if isinstance(op, (ast.In, ast.NotIn)):
            if isinstance(right, nn.ModuleDict):
                right = list(right._modules)
            if isinstance(right, types.MappingProxyType):
                right = dict(right)
        if any(isinstance(v, Symbol) for v in (left, right)):
            return self._operation(name, [left, right], {})
        if _has_unknown((left, right)):
            return Unknown((name, _spelled(left), _spelled(right)))
        if not all(
            isinstance(v, (*_CONSTANTS, list, tuple, dict, set, type)) for v in (left, right)
        ):
            raise Unreadable(f"it compares a {type(left).__name__}")
        try:
            return _COMPARE[type(op)](left, right)
        except TypeError:
            raise _Raised from None

    def _of_Tuple(self, e: ast.Tuple, scope: _Scope) -> Any:
        return tuple(self._elements(e.elts, scope))

    def _of_List(self, e: ast.List, scope: _Scope) -> Any:
        return self._elements(e.elts, scope)

    def _elements(self, nodes: Sequence[ast.expr], scope: _Scope) -> list[Any]:
        found: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                found += self._items(self.value(node.value, scope))
            else:
                found.append(self.value(node, scope))
        return found

    def _of_Dict(self, e: ast.Dict, scope: _Scope) -> Any:
        found: dict[Any, Any] = {}
        for key, node in zip(e.keys, e.values, strict=True):
            if key is None:
                raise Unreadable("it merges mappings")
            found[self.value(key, scope)] = self.value(node, scope)
        return found

    def _of_Slice(self, e: ast.Slice, scope: _Scope) -> Any:
        bounds = [None if b is None else self.value(b, scope) for b in (e.lower, e.upper, e.step)]
        return slice(*bounds)

    def _of_Subscript(self, e: ast.Subscript, scope: _Scope) -> Any:
        owner, index = self.value(e.value, scope), self.value(e.slice, scope)
        if isinstance(owner, Symbol):
            return self._operation("getitem", [owner, *_flat_index(index)], {})
        if isinstance(owner, Unknown) or _has_unknown((index,)):
            return Unknown(("getitem", _spelled(owner), _spelled(index)))
        if isinstance(owner, (nn.Sequential, nn.ModuleList)) and isinstance(index, int):
            owner = list(owner._modules.values())
        if isinstance(owner, nn.ModuleDict):
            owner = dict(owner._modules)
        if not isinstance(owner, (list, tuple, dict, str, types.MappingProxyType, range)):
            raise Unreadable(f"it reads an item of a {type(owner).__name__}")
        try:
            return owner[index]
        except (IndexError, KeyError, TypeError):
            raise _Raised from None

    def _of_JoinedStr(self, e: ast.JoinedStr, scope: _Scope) -> Any:
        said = ""
        for part in e.values:
            if isinstance(part, ast.Constant):
                said += str(part.value)
                continue
            assert isinstance(part, ast.FormattedValue)
            value = self.value(part.value, scope)
            if not isinstance(value, (int, float, str)) or part.format_spec is not None:
                return Unknown(("text", len(self.nodes)))
            said += str(value)
        return said

    def _of_ListComp(self, e: ast.ListComp, scope: _Scope) -> Any:
        return list(self._comprehended(e.elt, e.generators, _Scope({}, scope)))

    def _of_GeneratorExp(self, e: ast.GeneratorExp, scope: _Scope) -> Any:
        return list(self._comprehended(e.elt, e.generators, _Scope({}, scope)))

    def _comprehended(
        self, element: ast.expr, loops: Sequence[ast.comprehension], scope: _Scope
    ) -> Iterator[Any]:
        if not loops:
            yield self.value(element, scope)
            return
        loop = loops[0]
        for item in self._items(self.value(loop.iter, scope)):
            self._store(loop.target, item, scope)
            if all(self._truth(self.value(test, scope)) for test in loop.ifs):
                yield from self._comprehended(element, loops[1:], scope)


def follow(capture: Capture, *args: Any) -> Any:
    """What the root's forward makes of ``args``; a string where that can't be told: why."""
    try:
        return capture.run(*args)
    except Differs as difference:
        return str(difference)
    except Unreadable as reason:
        return f"its code can't be followed: {reason}"
    except _Raised:
        return "its forward raises"
    except RecursionError:
        return "its code can't be followed: it goes too deep"


# ------------------------------------------------------------------------ tables


def _bound(
    spec: ast.arguments,
    defaults: list[Any],
    named_defaults: dict[str, Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Arguments by name, as Python binds them."""
    names = [argument.arg for argument in (*spec.posonlyargs, *spec.args)]
    only = [argument.arg for argument in spec.kwonlyargs]
    bound = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) | named_defaults
    # in the order of declaration: super() asks for the first
    bound = {name: bound[name] for name in (*names, *only) if name in bound}
    given = dict(zip(names, args, strict=False))
    rest = dict(kwargs)
    for name in (*names, *only):
        if name in rest:
            if name in given:
                raise _Raised
            given[name] = rest.pop(name)
    merged = {name: given.get(name, bound.get(name, ABSENT)) for name in (*names, *only)}
    if any(value is ABSENT for value in merged.values()):
        raise _Raised
    if spec.vararg is not None:
        merged[spec.vararg.arg] = tuple(args[len(names) :])
    elif len(args) > len(names):
        raise _Raised
    if spec.kwarg is not None:
        merged[spec.kwarg.arg] = rest
    elif rest:
        raise _Raised
    return merged


def _symbols(values: Any) -> Iterator[Symbol]:
    for value in values:
        if isinstance(value, Symbol):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _symbols(value)


def _spelled(values: Any) -> Any:
    """Constants among an operation's arguments, so that it is told apart from others."""
    if isinstance(values, dict):
        return tuple((name, _spelled(value)) for name, value in values.items())
    if isinstance(values, Unknown):
        return values
    if isinstance(values, (list, tuple)):
        return tuple(_spelled(value) for value in values)
    if isinstance(values, Symbol):
        return "node", values.node
    return repr(values)


def _plain(values: Any) -> bool:
    return all(isinstance(value, (*PLAIN, Unknown)) for value in values)


def _has_unknown(values: Any) -> bool:
    for value in values:
        if isinstance(value, Unknown):
            return True
        if isinstance(value, slice) and _has_unknown((value.start, value.stop, value.step)):
            return True
        if isinstance(value, (list, tuple)) and _has_unknown(value):
            return True
    return False


def _flat_index(index: Any) -> list[Any]:
    found: list[Any] = []
    for each in index if isinstance(index, tuple) else [index]:
        if isinstance(each, slice):
            found += [each.start, each.stop, each.step]
        else:
            found.append(each)
    return found


def _state(arguments: Any) -> Any:
    """What can be changed in what a call is given."""
    if isinstance(arguments, Symbol):
        return arguments.node
    if isinstance(arguments, dict):
        return [(name, _state(value)) for name, value in arguments.items()]
    if isinstance(arguments, (list, tuple)):
        return [_state(value) for value in arguments]
    return id(arguments)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Symbol) and isinstance(other, Symbol):
        return one.node == other.node
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, (*PLAIN, Unknown)) and type(one) is type(other):
        return bool(one == other)
    return one is other


def _is_torchs(function: Any) -> bool:
    return isinstance(function, types.FunctionType) and function.__code__.co_filename.startswith(
        _TORCH
    )


def _defining(kind: type, name: str) -> type:
    return next(each for each in kind.__mro__ if name in vars(each))


@functools.lru_cache(maxsize=512)
def _parameters(function: types.FunctionType) -> tuple[str, ...]:
    code = function.__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


@functools.cache
def _operations() -> frozenset[Any]:
    """torch's functions of tensors: all they do is compute."""
    found = [
        function
        for name, function in vars(F).items()
        if not name.startswith("_") and callable(function) and not isinstance(function, type)
    ]
    for name in dir(torch._C._VariableFunctions):
        if not name.startswith("_") and name not in _NO_FUNCTIONS:
            found.append(getattr(torch, name, None))
            found.append(getattr(torch._C._VariableFunctions, name))
    for part in (torch.special, torch.linalg, torch.fft):
        found += [f for n, f in vars(part).items() if not n.startswith("_") and callable(f)]
    found += [f for f in vars(torch.functional).values() if _is_torchs(f)]
    found += [f for f in vars(torch).values() if getattr(f, "__module__", "") == "torch.functional"]
    for function in (torch.is_grad_enabled, torch.is_autocast_enabled, torch.get_autocast_dtype):
        found.append(function)
    return frozenset(f for f in found if f is not None and getattr(f, "__hash__", None))


def _operations_or_none(value: Any) -> Any:
    try:
        return _operations() | _CONTEXTS if hash(value) else ()
    except TypeError:
        return ()


@functools.cache
def _same_as_false() -> frozenset[Any]:
    """Questions whose answer is no wherever a converted module runs at all."""
    return frozenset(
        {
            torch.jit.is_scripting,
            torch.jit.is_tracing,
            torch.compiler.is_exporting,
            torch._C._get_tracing_state,
        }
    )


@functools.cache
def _module_methods() -> frozenset[Any]:
    """Methods of torch's modules that only say what they hold."""
    return frozenset(
        {
            nn.Module.children,
            nn.Module.named_children,
            nn.Module.modules,
            nn.ModuleDict.items,
            nn.ModuleDict.values,
            nn.ModuleDict.keys,
            nn.ModuleDict.__len__,
            nn.ModuleList.__len__,
            nn.Sequential.__len__,
        }
    )


def _handle_relu(capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    bound = dict(zip(("input", "inplace"), args, strict=False)) | kwargs
    if not isinstance(bound.get("input"), Symbol) or bound.keys() - {"input", "inplace"}:
        raise Unreadable("relu of something else than a tensor")
    return capture._relu(bound["input"], bound.get("inplace", False) is not False)


def _handle_relu_(capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return _handle_relu(capture, args, kwargs | {"inplace": True})


def _handle_cat(capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    bound = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
    dim = bound.pop("dim", bound.pop("axis", 0))
    tensors = bound.pop("tensors", None)
    if bound or not isinstance(tensors, (list, tuple)) or not tensors:
        raise Unreadable("cat of something else than a list of tensors")
    if not all(isinstance(x, Symbol) for x in tensors):
        raise Unreadable("cat of something else than tensors")
    if len(tensors) == 1 and capture._contexts:
        return capture._operation("cat", [tuple(tensors), dim], {})
    rank = next((x.rank for x in tensors if x.rank is not None), None)
    if isinstance(dim, int) and rank is not None and (dim == 1 or dim == 1 - rank):
        return Symbol(capture.cat([x.node for x in tensors]), rank)
    return capture._operation("cat", [tuple(tensors), dim], {})


def _handle_dropout(name: str, channels: bool) -> Any:
    def handle(capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        names = ("input", "p", "training", "inplace")
        bound = dict(zip(names, args, strict=False)) | kwargs
        x, rate = bound.get("input"), bound.get("p", 0.5)
        if bound.get("inplace", False) is not False and isinstance(x, Symbol):
            return capture._operation(f"{name}_", [x, rate, bound.get("training", True)], {})
        if not isinstance(x, Symbol) or not isinstance(rate, (int, float)):
            return capture._operation(name, args, kwargs)
        return capture._dropout(x, rate, bound.get("training", True), channels)

    return handle


def _handle_avg_pool(capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    names = ("input", "kernel_size", "stride", "padding")
    bound = dict(zip(names, args, strict=False)) | kwargs
    x, size = bound.pop("input", None), bound.pop("kernel_size", None)
    stride, padding = bound.pop("stride", None), bound.pop("padding", 0)
    windows = {2} == {_scalar(size), _scalar(size if stride is None else stride)}
    if isinstance(x, Symbol) and not bound and len(args) <= 4 and windows and _scalar(padding) == 0:
        return Symbol(capture.node("avg_pool", x.node), x.rank)
    return capture._operation("avg_pool", args, kwargs)


def _scalar(size: Any) -> Any:
    if isinstance(size, (tuple, list)) and len(set(size)) == 1:
        return size[0]
    return size


def _handle_batch_norm(capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    names = (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("training", "momentum", "eps"),
    )
    bound = dict(zip(names, args, strict=False)) | kwargs
    x = bound.get("input")
    if not capture._norms or not isinstance(x, Symbol):
        return _uncertain_batch_norm(capture, bound, x)
    norm = capture._norms[-1]
    mode = dict(capture._paths[-1].decisions).get(("training", norm))
    tracked = norm.running_mean is not None and norm.running_var is not None
    if isinstance(bound.get("training"), Unknown):
        return _uncertain_batch_norm(capture, bound, x)
    if bound.get("training", False) != (mode is True or not tracked) or (mode is None and tracked):
        return _uncertain_batch_norm(capture, bound, x)
    expected = {
        "running_mean": norm.running_mean if mode is not True or norm.track_running_stats else None,
        "running_var": norm.running_var if mode is not True or norm.track_running_stats else None,
        "weight": norm.weight,
        "bias": norm.bias,
    }
    for name, tensor in expected.items():
        symbol = bound.get(name)
        if (symbol is None) != (tensor is None):
            return _uncertain_batch_norm(capture, bound, x)
        if tensor is not None and symbol is not capture._tensor(tensor):
            return _uncertain_batch_norm(capture, bound, x)
    if bound.get("eps", 1e-5) != norm.eps:
        return _uncertain_batch_norm(capture, bound, x)
    # in eval mode momentum is not used
    if mode is True and tracked and bound.get("momentum", 0.1) != norm.momentum:
        return _uncertain_batch_norm(capture, bound, x)
    return Symbol(capture.node("norm", norm, x.node), x.rank)


def _uncertain_batch_norm(capture: Capture, bound: dict[str, Any], x: Any) -> Any:
    for name in ("running_mean", "running_var"):
        if isinstance(bound.get(name), Symbol):
            capture._in_place(bound[name], capture.unknown())
    return capture._operation("batch_norm", [x], {})


def _handle_checkpoint(capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``checkpoint(f, *args)``: what f computes."""
    own = {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"}
    if "context_fn" in kwargs:
        raise Unreadable("it checkpoints in contexts of its own")
    return capture.call(args[0], args[1:], {n: v for n, v in kwargs.items() if n not in own})


def _handle_assert(capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if not capture._truth(args[0]):
        raise _Raised


@functools.cache
def _handlers() -> dict[Any, Any]:
    return {
        F.relu: _handle_relu,
        torch.relu: _handle_relu,
        F.relu_: _handle_relu_,
        torch.relu_: _handle_relu_,
        torch.cat: _handle_cat,
        torch.concat: _handle_cat,
        torch.concatenate: _handle_cat,
        _DROPOUT: _handle_dropout("dropout", False),
        F.dropout1d: _handle_dropout("dropout1d", True),
        F.dropout2d: _handle_dropout("dropout2d", True),
        F.dropout3d: _handle_dropout("dropout3d", True),
        F.avg_pool1d: _handle_avg_pool,
        F.avg_pool2d: _handle_avg_pool,
        F.avg_pool3d: _handle_avg_pool,
        F.batch_norm: _handle_batch_norm,
        torch.utils.checkpoint.checkpoint: _handle_checkpoint,
        torch._assert: _handle_assert,
    }


def _builtin_isinstance(capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    value, kinds = args
    flat = kinds if isinstance(kinds, tuple) else (kinds,)
    if not all(isinstance(kind, type) for kind in flat):
        raise Unreadable("isinstance of something else than a class")
    if isinstance(value, Symbol):
        if Tensor in flat or object in flat:
            return True
        if any(issubclass(kind, Tensor) for kind in flat):
            return Unknown(("isinstance", value.node))
        return False
    if isinstance(value, Unknown):
        return Unknown(("isinstance", value.key))
    if isinstance(value, types.MappingProxyType):
        return dict in flat
    return isinstance(value, tuple(kind for kind in flat if type(kind) is type))


def _builtin_getattr(capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[1], str):
        raise Unreadable("it reads an attribute by an unknown name")
    try:
        return capture.attribute(args[0], args[1])
    except AttributeError:
        if len(args) == 3:
            return args[2]
        raise _Raised from None


def _builtin_hasattr(capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[0], nn.Module) or not isinstance(args[1], str):
        raise Unreadable("it asks for an attribute of something else than a module")
    try:
        capture.attribute(args[0], args[1])
    except AttributeError:
        return False
    return True


def _builtin_number(kind: Callable[..., Any]) -> Any:
    def call(capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if any(isinstance(a, Symbol) for a in args) or _has_unknown(args):
            return Unknown((kind.__name__, _spelled(args)))
        flat = [v for a in args for v in (a if isinstance(a, (list, tuple)) else [a])]
        if kwargs or not _plain(flat):
            raise Unreadable(f"it calls {kind.__name__}")
        try:
            return kind(*args)
        except Exception:
            raise _Raised from None

    return call


def _builtin_bool(capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return capture._truth(args[0])


def _builtin_len(capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    (value,) = args
    if isinstance(value, (Symbol, Unknown)):
        return Unknown(("len", _spelled(value)))
    if isinstance(value, nn.Module):
        return len(list(capture._items(value)))
    if isinstance(value, (list, tuple, dict, str, range, types.MappingProxyType)):
        return len(value)
    raise Unreadable(f"it asks for the length of a {type(value).__name__}")


def _builtin_items(kind: Callable[..., Any]) -> Any:
    """Over lists of what is gone through: enumerate, zip, reversed, list, tuple."""

    def call(capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = [list(capture._items(a)) if not isinstance(a, (int, bool)) else a for a in args]
        if kwargs.keys() - {"start", "strict"}:
            raise Unreadable(f"it calls {kind.__name__}")
        found = kind(*given, **kwargs)
        return found if isinstance(found, tuple) else list(found)

    return call


def _builtin_any(kind: bool) -> Any:
    def call(capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        for value in capture._items(args[0]):
            if capture._truth(value) is kind:
                return kind
        return not kind

    return call


_BUILTINS: dict[Any, Any] = {
    isinstance: _builtin_isinstance,
    getattr: _builtin_getattr,
    hasattr: _builtin_hasattr,
    len: _builtin_len,
    bool: _builtin_bool,
    any: _builtin_any(True),
    all: _builtin_any(False),
    **{kind: _builtin_number(kind) for kind in (int, float, str, abs, min, max, round, sum, range)},
    **{f: _builtin_number(f) for f in (math.sqrt, math.floor, math.ceil, math.log, math.prod)},
    **{kind: _builtin_items(kind) for kind in (enumerate, zip, reversed, list, tuple)},
}
_ITERATORS: tuple[Any, ...] = (type({}.values()), type({}.items()), type({}.keys()))
_METHODS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (list, ("append", "extend", "insert", "pop", "reverse", "copy")),
    (dict, ("items", "keys", "values", "get")),
    (types.MappingProxyType, ("items", "keys", "values", "get")),
    (str, ("startswith", "endswith", "lower", "upper", "join", "split", "format")),
)
_UNARY: dict[type, Any] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: operator.invert,
}
_BINARY: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: dict[type, Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_CONTEXTS: frozenset[Any] = frozenset(
    {torch.no_grad, torch.enable_grad, torch.autocast, torch.amp.autocast}
)
_DROPOUT = F.dropout
_DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# Tensors' methods and torch's functions that do more, or other things, than compute.
_NO_FUNCTIONS = frozenset(
    {
        *("register_hook", "register_post_accumulate_grad_hook", "backward", "retain_grad"),
        *("requires_grad_", "set_", "share_memory_", "resize_", "resize_as_", "detach_", "apply_"),
        *("map_", "numpy", "data_ptr", "storage", "untyped_storage", "as_subclass", "module_load"),
        *("from_numpy", "from_file", "set_data", "manual_seed", "seed", "swap_tensors"),
        *("rename_", "pin_memory", "record_stream"),
    }
)
# Operations whose result is never a view of what they are given.
_ELEMENTWISE = frozenset(
    {
        *(
            "add",
            "sub",
            "mult",
            "mul",
            "div",
            "pow",
            "matmult",
            "usub",
            "exp",
            "log",
            "sqrt",
            "rsqrt",
        ),
        *("tanh", "sigmoid", "gelu", "silu", "mish", "elu", "leaky_relu", "hardtanh", "abs", "neg"),
        *("softplus", "celu", "selu", "hardswish", "hardsigmoid", "relu6", "clamp", "bernoulli"),
        *("batch_norm", "layer_norm", "group_norm", "instance_norm", "mod", "floordiv"),
    }
)
_FRESH = _ELEMENTWISE | {
    *(
        "mean",
        "sum",
        "var",
        "var_mean",
        "std",
        "new_empty",
        "new_zeros",
        "new_ones",
        "zeros",
        "ones",
    ),
    *("empty_like", "zeros_like", "ones_like", "rand_like", "randn_like", "rand", "randn", "cat"),
    *("stack", "conv1d", "conv2d", "conv3d", "linear", "matmul", "bmm", "clone", "softmax"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool", "interpolate", "einsum"),
    *("gt", "lt", "gte", "lte", "eq", "noteq"),
}
_FRESH_MODULES = frozenset(
    f"torch.nn.modules.{name}"
    for name in ("conv", "batchnorm", "instancenorm", "normalization", "activation", "linear")
)
