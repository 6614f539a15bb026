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
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from .builtin_functions import BUILTINS, METHODS
from .evidence import PLAIN, Evidence
from .interpreting import CONSTANTS, Interpreter
from .objections import AVERAGE_POOLS, BATCH_NORMS, CONVOLUTIONS, has_hooks, pool_objection
from .operations import (
    _TORCH,
    DROPOUT,
    DROPOUT_MODULES,
    ELEMENTWISE,
    FRESH,
    FRESH_MODULES,
    NO_FUNCTIONS,
    handlers,
    is_torchs,
    module_methods,
    operations,
    operations_or_none,
    same_as_false,
)
from .source import Definition, Differs, Unreadable, definition
from .symbols import (
    Closure,
    Method,
    Raised,
    Reference,
    Return,
    Scope,
    Super,
    Symbol,
    Unknown,
    bound_arguments,
    of_gradients,
    same,
    spelled,
    state_of,
    symbols_in,
)

_MOST_PATHS, _MOST_CALLS = 64, 40


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


class Capture(Interpreter):
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
        super().__init__()
        self._depth = 0
        # operations in place on parameters and buffers
        self.effects: list[tuple[Any, ...]] = []
        self.of_gradients = False
        """Whether what is computed may be something else where gradients are asked for."""

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
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not is_torchs(forward):
            return self._norm(module, forward, args, kwargs)
        return self._call_forward(module, forward, args, kwargs)

    def _call_forward(
        self, module: Any, forward: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        if isinstance(module, BATCH_NORMS[-1:]) and forward is BATCH_NORMS[-1].forward:
            return self._torchs(module, args, kwargs)
        if is_torchs(forward):
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
        if alone and exact in DROPOUT_MODULES and not module.inplace:
            channels = exact is not nn.Dropout
            return self._dropout(x, module.p, Unknown(("training", module)), channels)
        if alone and exact in AVERAGE_POOLS and pool_objection("", module) is None:
            return Symbol(self.node("avg_pool", x.node), x.rank)
        symbols = list(symbols_in([*args, *kwargs.values()]))
        nodes = tuple(s.node for s in symbols)
        result = self.node("module", module, nodes)
        if getattr(module, "inplace", False) and isinstance(x, Symbol):
            return self._in_place(x, result)
        fresh = exact.__module__ in FRESH_MODULES and exact is not nn.Identity
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
        effects: list[list[Any]] = []
        before = state_of(arguments)
        while waiting:
            prefix = waiting.pop()
            path = _Path(prefix)
            self._paths.append(path)
            first = len(self.effects)
            try:
                value = run()
            except Raised:
                value = _RAISES
            finally:
                self._paths.pop()
            made = path.decisions
            outcomes.append((made, value))
            effects.append(self.effects[first:])
            for i in range(len(prefix), len(made)):
                waiting.append([*made[:i], (made[i][0], not made[i][1])])
            if len(outcomes) + len(waiting) > _MOST_PATHS:
                raise Unreadable("its code has too many branches")
            if made and state_of(arguments) != before:
                raise Unreadable("it changes what it is given, in one of its branches")
        if len(outcomes) == 1 and outcomes[0][1] is _RAISES:
            raise Raised
        if any(found != effects[0] for found in effects):
            for made, _ in outcomes:
                self.used([Unknown(key) for key, _ in made])
        return self._joined(outcomes, 0)

    def _joined(self, outcomes: list[tuple[list[tuple[Any, bool]], Any]], depth: int) -> Any:
        values = [value for _, value in outcomes]
        first = values[0]
        if all(same(first, value) for value in values[1:]):
            return first
        key = outcomes[0][0][depth][0]
        sides = [[o for o in outcomes if o[0][depth][1] is side] for side in (True, False)]
        yes, no = (self._joined(side, depth + 1) for side in sides)
        if same(yes, no):
            return yes
        pair = [value for value in (yes, no) if value is not _RAISES]
        if not all(isinstance(value, Symbol) for value in pair):
            if all(isinstance(value, (*PLAIN, Unknown)) for value in pair):
                plain = yes is True and no is False
                return Unknown(key if plain else ("if", key, *map(spelled, pair)))
            raise Unreadable("what it returns depends on a condition that is not known")
        if len(pair) == 2 and isinstance(key, tuple) and key[0] == "training":
            return Symbol(self.node("if", key, yes.node, no.node), yes.rank, [yes, no])
        self.used(Unknown(key))
        return Symbol(self.unknown(), None, pair)

    def used(self, value: Any) -> None:
        self.of_gradients = self.of_gradients or of_gradients(value)

    def _truth(self, value: Any) -> bool:
        if isinstance(value, (Symbol, Unknown)):
            key = value.key if isinstance(value, Unknown) else ("value", value.node)
            return self._paths[-1].decide(key)
        if isinstance(value, nn.Module):
            if "__bool__" in dir(type(value)) or "__len__" in dir(type(value)):
                return len(value._modules) > 0
            return True
        if isinstance(value, (*CONSTANTS, list, tuple, dict, set, frozenset)):
            return bool(value)
        if isinstance(
            value, (types.FunctionType, types.BuiltinFunctionType, type, Method, Closure)
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
            self.used(training)
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
        self.used([*(a for a in (*args, *kwargs.values()) if not isinstance(a, str))])
        symbols = list(symbols_in([*args, *kwargs.values()]))
        nodes = tuple(s.node for s in symbols)
        result = self.node("call", name, nodes, spelled(args), spelled(kwargs))
        if name.endswith("_") and not name.endswith("__"):
            if not args or not isinstance(args[0], Symbol):
                raise Unreadable(f"{name} changes something else than a tensor")
            return self._in_place(args[0], result, (name, tuple(args[1:])))
        bases: list[Symbol] = []
        if name not in FRESH:
            bases = [each for s in symbols for each in (s, *s.bases)]
        elementwise = name in ELEMENTWISE and symbols
        return Symbol(result, symbols[0].rank if elementwise else None, bases)

    def _check_operands(self, values: Any, name: str) -> None:
        for value in values:
            if isinstance(value, (list, tuple)):
                self._check_operands(value, name)
            elif not isinstance(value, (*CONSTANTS, Symbol, Unknown)):
                raise Unreadable(f"{name} is given a {type(value).__name__}")

    def _torch_function(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A call of one of torch's functions, or NotImplemented."""
        handler = handlers().get(function)
        if handler is not None:
            return handler(self, args, kwargs)
        if function in same_as_false():
            return False
        name = getattr(function, "__name__", "")
        if function not in operations():
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
            return Unknown((name, x.node, spelled(args)))
        if name == "relu" or name == "relu_":
            return self._relu(x, name == "relu_")
        if name.startswith("_") or name in NO_FUNCTIONS or not hasattr(Tensor, name):
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
        if isinstance(function, Closure):
            return self._call_closure(function, args, kwargs)
        if isinstance(function, Method):
            return self._call_method(function, args, kwargs)
        if isinstance(function, Unknown):
            return Unknown(("call", function.key, spelled(args)))
        if isinstance(function, types.MethodType):
            return self.call(
                function.__func__, [self.admit(function.__self__, "self"), *args], kwargs
            )
        try:
            builtin = BUILTINS.get(function)
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
        return self._run_body(node, Scope({}, function), defaults, named, args, kwargs)

    def _call_closure(self, closure: Closure, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        scope = Scope({}, closure.scope)
        return self._run_body(
            closure.node, scope, closure.defaults, closure.named_defaults, args, kwargs
        )

    def _run_body(
        self,
        node: Definition,
        scope: Scope,
        defaults: list[Any],
        named_defaults: dict[str, Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        scope.names |= bound_arguments(node.args, defaults, named_defaults, args, kwargs)
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
        except Return as result:
            return result.value
        finally:
            self._depth -= 1
        return None

    def _call_method(self, method: Method, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        function, owner = method.function, method.owner
        if isinstance(owner, Symbol):
            return self._tensor_method(owner, function, args, kwargs)
        if isinstance(owner, nn.Module):
            if function in module_methods():
                found = function(owner, *args, **kwargs)
                return found if isinstance(found, int) else list(found)
            if is_torchs(function) and function.__name__ == "forward":
                return self._torchs(owner, args, kwargs)
            if function is BATCH_NORMS[-1].forward:
                return self._torchs(owner, args, kwargs)
            return self.call(function, [owner, *args], kwargs)
        # a method of a plain value or of a container made here
        return getattr(owner, function)(*args, **kwargs)

    # -------------------------------------------------------------- reading

    def admit(self, value: Any, name: str) -> Any:
        """A value from outside as the interpretation sees it."""
        if isinstance(value, (*CONSTANTS, nn.Module, types.ModuleType, types.BuiltinFunctionType)):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (types.FunctionType, type, types.MethodType)):
            return value
        if type(value) in (tuple, list):
            if type(value) is list:
                self.evidence.contents(value)
            admitted = [self.admit(v, name) for v in value]
            return tuple(admitted) if type(value) is tuple else Reference(admitted)
        if isinstance(value, dict) and all(isinstance(key, PLAIN) for key in value):
            self.evidence.contents(value)
            return types.MappingProxyType({k: self.admit(v, name) for k, v in value.items()})
        if value in operations_or_none(value):
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
        if isinstance(owner, Super):
            mro = self._class_of(owner.owner).__mro__
            if owner.after not in mro:
                raise Unreadable("super() of another class")
            return self._class_attribute(owner.owner, name, mro[mro.index(owner.after) + 1 :])
        if isinstance(owner, types.ModuleType):
            if name not in vars(owner):
                raise Unreadable(f"{owner.__name__} has no {name} yet")
            if owner is F and name == "dropout":
                # its masks are drawn here in any case, whatever stands for it
                return DROPOUT
            self.evidence.name(vars(owner), name)
            return self.admit(vars(owner)[name], f"{owner.__name__}.{name}")
        if isinstance(owner, type):
            return self._class_level(owner, name)
        if isinstance(owner, (torch.dtype, torch.device)):
            return getattr(owner, name)
        allowed = next((names for kind, names in METHODS if type(owner) is kind), ())
        if name in allowed:
            return Method(name, owner)
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
            return Method(value, owner)
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
        return Method(name, x)

    def _name(self, name: str, scope: Scope) -> Any:
        level: Any = scope
        while isinstance(level, Scope):
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
        raise Raised


def follow(capture: Capture, *args: Any) -> Any:
    """What the root's forward makes of ``args``; a string where that can't be told: why."""
    try:
        return capture.run(*args)
    except Differs as difference:
        return str(difference)
    except Unreadable as reason:
        return f"its code can't be followed: {reason}"
    except Raised:
        return "its forward raises"
    except RecursionError:
        return "its code can't be followed: it goes too deep"


# ------------------------------------------------------------------------ tables


def _defining(kind: type, name: str) -> type:
    return next(each for each in kind.__mro__ if name in vars(each))


@functools.lru_cache(maxsize=512)
def _parameters(function: types.FunctionType) -> tuple[str, ...]:
    code = function.__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
