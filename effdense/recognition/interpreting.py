"""Python's statements and expressions, as capturing.py follows them.

What a name, an attribute, a call and an operation of tensors mean is for whoever follows to say.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .builtin_functions import BINARY, COMPARE, ITERATORS, UNARY
from .evidence import PLAIN
from .operations import CONTEXTS
from .source import Definition, Unreadable
from .symbols import (
    Break,
    Closure,
    Continue,
    Raised,
    Reference,
    Return,
    Scope,
    Super,
    Symbol,
    Unknown,
    flat_index,
    has_unknown,
    spelled,
)

_MOST_STEPS = 100_000

CONSTANTS = (
    *PLAIN,
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.layout,
    torch.Size,
    range,
    slice,
)


class Interpreter:
    """Goes through statements; ``_do_X`` a statement and ``_of_X`` an expression of type X."""

    def __init__(self) -> None:
        self._contexts = self._steps = 0

    # ------------------------------------------------------------ what things mean

    def attribute(self, owner: Any, name: str) -> Any:
        """``owner.name``; AttributeError where there is none."""
        raise NotImplementedError

    def call(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """``function(*args, **kwargs)``."""
        raise NotImplementedError

    def _name(self, name: str, scope: Scope) -> Any:
        raise NotImplementedError

    def _operation(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _truth(self, value: Any) -> bool:
        raise NotImplementedError

    def used(self, value: Any) -> None:
        """Told of a value that decides what is computed."""
        raise NotImplementedError

    def unknown(self) -> int:
        """What equals nothing else."""
        raise NotImplementedError

    # ------------------------------------------------------------- statements

    def _statements(self, body: Sequence[ast.stmt], scope: Scope) -> None:
        for statement in body:
            self._steps += 1
            if self._steps > _MOST_STEPS:
                raise Unreadable("its code runs too long")
            method = getattr(self, f"_do_{type(statement).__name__}", None)
            if method is None:
                raise Unreadable(f"it has a {type(statement).__name__} statement")
            method(statement, scope)

    def _do_Expr(self, s: ast.Expr, scope: Scope) -> None:
        if not isinstance(s.value, ast.Constant):
            self.value(s.value, scope)

    def _do_Pass(self, s: ast.Pass, scope: Scope) -> None:
        pass

    def _do_Return(self, s: ast.Return, scope: Scope) -> None:
        raise Return(None if s.value is None else self.value(s.value, scope))

    def _do_Raise(self, s: ast.Raise, scope: Scope) -> None:
        raise Raised

    def _do_Break(self, s: ast.Break, scope: Scope) -> None:
        raise Break

    def _do_Continue(self, s: ast.Continue, scope: Scope) -> None:
        raise Continue

    def _do_Assert(self, s: ast.Assert, scope: Scope) -> None:
        if not self._truth(self.value(s.test, scope)):
            raise Raised

    def _do_If(self, s: ast.If, scope: Scope) -> None:
        self._statements(s.body if self._truth(self.value(s.test, scope)) else s.orelse, scope)

    def _do_While(self, s: ast.While, scope: Scope) -> None:
        while self._truth(self.value(s.test, scope)):
            try:
                self._statements([ast.Pass(), *s.body], scope)
            except Break:
                return
            except Continue:
                continue
        self._statements(s.orelse, scope)

    def _do_For(self, s: ast.For, scope: Scope) -> None:
        for item in self._items(self.value(s.iter, scope)):
            self._store(s.target, item, scope)
            try:
                self._statements([ast.Pass(), *s.body], scope)
            except Break:
                return
            except Continue:
                continue
        self._statements(s.orelse, scope)

    def _do_With(self, s: ast.With, scope: Scope) -> None:
        """Contexts of torch's that change how tensors are computed, and nothing else."""
        for item in s.items:
            call = item.context_expr
            if not isinstance(call, ast.Call) or item.optional_vars is not None:
                raise Unreadable("it has a with statement")
            function = self.value(call.func, scope)
            if function not in CONTEXTS:
                raise Unreadable("it has a with statement")
            for argument in [*call.args, *(k.value for k in call.keywords)]:
                self.used(self.value(argument, scope))
        self._contexts += 1
        try:
            self._statements(s.body, scope)
        finally:
            self._contexts -= 1

    def _do_Assign(self, s: ast.Assign, scope: Scope) -> None:
        value = self.value(s.value, scope)
        for target in s.targets:
            self._store(target, value, scope)

    def _do_AnnAssign(self, s: ast.AnnAssign, scope: Scope) -> None:
        if s.value is not None:
            self._store(s.target, self.value(s.value, scope), scope)

    def _do_AugAssign(self, s: ast.AugAssign, scope: Scope) -> None:
        if not isinstance(s.target, ast.Name):
            raise Unreadable(f"it stores {ast.unparse(s.target)}")
        old, new = self._name(s.target.id, scope), self.value(s.value, scope)
        if isinstance(old, Symbol):
            name = f"{type(s.op).__name__.lower()}_"
            self._operation(name, [old, new], {})
            return
        if isinstance(old, Reference):
            raise Unreadable(f"it changes {s.target.id}")
        if type(old) is list and isinstance(s.op, ast.Add):
            # in place, as Python does
            old.extend(self._items(new))
            return
        self._store(s.target, self._binary(s.op, old, new), scope)

    def _do_Delete(self, s: ast.Delete, scope: Scope) -> None:
        for target in s.targets:
            if not isinstance(target, ast.Name) or target.id not in scope.names:
                raise Unreadable(f"it deletes {ast.unparse(target)}")
            del scope.names[target.id]

    def _do_FunctionDef(self, s: ast.FunctionDef, scope: Scope) -> None:
        if s.decorator_list:
            raise Unreadable(f"{s.name} is decorated")
        scope.names[s.name] = self._closure(s, scope)

    def _closure(self, node: Definition, scope: Scope) -> Closure:
        defaults = [self.value(d, scope) for d in node.args.defaults]
        named = {
            argument.arg: self.value(default, scope)
            for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            if default is not None
        }
        return Closure(node, scope, defaults, named)

    def _store(self, target: ast.expr, value: Any, scope: Scope) -> None:
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

    def _unpack(self, targets: Sequence[ast.expr], value: Any, scope: Scope) -> None:
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
            raise Raised
        for target, each in zip(targets, values, strict=True):
            self._store(target, each, scope)

    def _items(self, value: Any) -> Iterator[Any]:
        if isinstance(value, nn.ModuleDict):
            return iter(list(value._modules))
        if isinstance(value, (nn.Sequential, nn.ModuleList)):
            return iter(list(value._modules.values()))
        if isinstance(value, (list, tuple, range, str, dict, set, types.MappingProxyType)):
            return iter(value)
        if isinstance(value, ITERATORS):
            return iter(list(value))
        raise Unreadable(f"it goes through a {type(value).__name__}")

    # ------------------------------------------------------------ expressions

    def value(self, node: ast.expr, scope: Scope) -> Any:
        method = getattr(self, f"_of_{type(node).__name__}", None)
        if method is None:
            raise Unreadable(f"it has a {type(node).__name__} expression")
        return method(node, scope)

    def _of_Constant(self, e: ast.Constant, scope: Scope) -> Any:
        return e.value

    def _of_Name(self, e: ast.Name, scope: Scope) -> Any:
        return self._name(e.id, scope)

    def _of_Attribute(self, e: ast.Attribute, scope: Scope) -> Any:
        try:
            return self.attribute(self.value(e.value, scope), e.attr)
        except AttributeError:
            raise Raised from None

    def _of_Call(self, e: ast.Call, scope: Scope) -> Any:
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

    def _super(self, e: ast.Call, scope: Scope) -> Super:
        if e.args:
            after, owner = (self.value(argument, scope) for argument in e.args)
        else:
            function = scope.function()
            after = self._name("__class__", Scope({}, function))
            level = scope
            while isinstance(level.outer, Scope):
                level = level.outer
            owner = next(iter(level.names.values()))
        if not isinstance(after, type) or not isinstance(owner, nn.Module):
            raise Unreadable("it calls super()")
        return Super(after, owner)

    def _of_Lambda(self, e: ast.Lambda, scope: Scope) -> Any:
        return self._closure(e, scope)

    def _of_IfExp(self, e: ast.IfExp, scope: Scope) -> Any:
        return self.value(e.body if self._truth(self.value(e.test, scope)) else e.orelse, scope)

    def _of_NamedExpr(self, e: ast.NamedExpr, scope: Scope) -> Any:
        value = self.value(e.value, scope)
        self._store(e.target, value, scope)
        return value

    def _of_BoolOp(self, e: ast.BoolOp, scope: Scope) -> Any:
        stop = isinstance(e.op, ast.Or)
        for operand in e.values[:-1]:
            value = self.value(operand, scope)
            if self._truth(value) is stop:
                return value if not isinstance(value, (Symbol, Unknown)) else stop
        return self.value(e.values[-1], scope)

    def _of_UnaryOp(self, e: ast.UnaryOp, scope: Scope) -> Any:
        value = self.value(e.operand, scope)
        if isinstance(e.op, ast.Not):
            return not self._truth(value)
        if isinstance(value, Symbol):
            return self._operation(type(e.op).__name__.lower(), [value], {})
        if isinstance(value, Unknown):
            return Unknown((type(e.op).__name__, value.key))
        if not isinstance(value, (int, float)):
            raise Unreadable(f"it computes with a {type(value).__name__}")
        return UNARY[type(e.op)](value)

    def _of_BinOp(self, e: ast.BinOp, scope: Scope) -> Any:
        return self._binary(e.op, self.value(e.left, scope), self.value(e.right, scope))

    def _binary(self, op: ast.operator, left: Any, right: Any) -> Any:
        name = type(op).__name__.lower()
        if isinstance(left, Symbol) or isinstance(right, Symbol):
            return self._operation(name, [left, right], {})
        if isinstance(left, Unknown) or isinstance(right, Unknown):
            sides = [spelled(side) for side in (left, right)]
            return Unknown((name, *sides))
        if not all(isinstance(v, (int, float, str, tuple, list)) for v in (left, right)):
            raise Unreadable(f"it computes with a {type(left).__name__}")
        if type(op) not in BINARY:
            raise Unreadable(f"it has a {type(op).__name__} expression")
        try:
            return BINARY[type(op)](left, right)
        except Exception:
            raise Raised from None

    def _of_Compare(self, e: ast.Compare, scope: Scope) -> Any:
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
        if has_unknown((left, right)):
            return Unknown((name, spelled(left), spelled(right)))
        if not all(
            isinstance(v, (*CONSTANTS, list, tuple, dict, set, type)) for v in (left, right)
        ):
            raise Unreadable(f"it compares a {type(left).__name__}")
        try:
            return COMPARE[type(op)](left, right)
        except TypeError:
            raise Raised from None

    def _of_Tuple(self, e: ast.Tuple, scope: Scope) -> Any:
        return tuple(self._elements(e.elts, scope))

    def _of_List(self, e: ast.List, scope: Scope) -> Any:
        return self._elements(e.elts, scope)

    def _elements(self, nodes: Sequence[ast.expr], scope: Scope) -> list[Any]:
        found: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                found += self._items(self.value(node.value, scope))
            else:
                found.append(self.value(node, scope))
        return found

    def _of_Dict(self, e: ast.Dict, scope: Scope) -> Any:
        found: dict[Any, Any] = {}
        for key, node in zip(e.keys, e.values, strict=True):
            if key is None:
                raise Unreadable("it merges mappings")
            found[self.value(key, scope)] = self.value(node, scope)
        return found

    def _of_Slice(self, e: ast.Slice, scope: Scope) -> Any:
        bounds = [None if b is None else self.value(b, scope) for b in (e.lower, e.upper, e.step)]
        return slice(*bounds)

    def _of_Subscript(self, e: ast.Subscript, scope: Scope) -> Any:
        owner, index = self.value(e.value, scope), self.value(e.slice, scope)
        if isinstance(owner, Symbol):
            return self._operation("getitem", [owner, *flat_index(index)], {})
        if isinstance(owner, Unknown) or has_unknown((index,)):
            return Unknown(("getitem", spelled(owner), spelled(index)))
        if isinstance(owner, (nn.Sequential, nn.ModuleList)) and isinstance(index, int):
            owner = list(owner._modules.values())
        if isinstance(owner, nn.ModuleDict):
            owner = dict(owner._modules)
        if not isinstance(owner, (list, tuple, dict, str, types.MappingProxyType, range)):
            raise Unreadable(f"it reads an item of a {type(owner).__name__}")
        try:
            return owner[index]
        except (IndexError, KeyError, TypeError):
            raise Raised from None

    def _of_JoinedStr(self, e: ast.JoinedStr, scope: Scope) -> Any:
        said = ""
        for part in e.values:
            if isinstance(part, ast.Constant):
                said += str(part.value)
                continue
            assert isinstance(part, ast.FormattedValue)
            value = self.value(part.value, scope)
            if not isinstance(value, (int, float, str)) or part.format_spec is not None:
                return Unknown(("text", self.unknown()))
            said += str(value)
        return said

    def _of_ListComp(self, e: ast.ListComp, scope: Scope) -> Any:
        return list(self._comprehended(e.elt, e.generators, Scope({}, scope)))

    def _of_GeneratorExp(self, e: ast.GeneratorExp, scope: Scope) -> Any:
        return list(self._comprehended(e.elt, e.generators, Scope({}, scope)))

    def _comprehended(
        self, element: ast.expr, loops: Sequence[ast.comprehension], scope: Scope
    ) -> Iterator[Any]:
        if not loops:
            yield self.value(element, scope)
            return
        loop = loops[0]
        for item in self._items(self.value(loop.iter, scope)):
            self._store(loop.target, item, scope)
            if all(self._truth(self.value(test, scope)) for test in loop.ifs):
                yield from self._comprehended(element, loops[1:], scope)
