"""Whether a module is still what it was when its code was followed.

NOTE [ the signature ]
What a forward does follows from its code, from what the code closes over, and from the
attributes of the modules that it calls: all of them, since any may be read or shadow a
method. They are compared by identity, in a few passes that run in C, at every forward; only
``training`` may differ. Hooks must be absent. Parameters and buffers may be replaced by
others of their type, for they are read afresh.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

from torch import nn

from .evidence import Evidence

# What this package keeps on blocks and transitions, and may change between forwards.
_OURS = frozenset({"training", "save", "offload", "plain", "backend", "captured"})
_Found = TypeVar("_Found")


class Watch:
    """A module and all it holds, as they are now."""

    def __init__(self, root: nn.Module, evidence: Evidence) -> None:
        modules = list(root.modules())
        inner = modules[1:]
        # not the root itself: what is kept for it must not keep it alive
        self._root = vars(root)
        self._own = self._roots_own()
        self._inner, self._kinds = inner, list(map(type, inner))
        self._dicts = [vars(module) for module in inner]
        self._dicts += [module._modules for module in modules]
        self._values = list(chain.from_iterable(map(dict.values, self._dicts)))
        self._hooks = [
            hooks
            for module in inner
            for hooks in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
        ]
        self._tensors: list[dict[str, Any]] = [module._parameters for module in modules]
        self._tensors += [module._buffers for module in modules]
        self._tensor_kinds = self._kinds_of_tensors()
        self._evidence = evidence

    def holds(self) -> bool:
        return (
            self._same_values()
            and not any(self._hooks)
            and list(map(type, self._inner)) == self._kinds
            and self._kinds_of_tensors() == self._tensor_kinds
            and self._same_own()
            and self._evidence.holds()
        )

    def _same_values(self) -> bool:
        if sum(map(len, self._dicts)) != len(self._values):
            return False
        values = chain.from_iterable(map(dict.values, self._dicts))
        if all(map(operator.is_, values, self._values)):
            return True
        now = list(chain.from_iterable(map(dict.values, self._dicts)))
        names = chain.from_iterable(self._dicts)
        for name, value, before in zip(names, now, self._values, strict=True):
            if value is not before and name != "training":
                return False
        # another mode: the next comparison is quick again
        self._values = now
        return True

    def _same_own(self) -> bool:
        own = self._roots_own()
        return len(own) == len(self._own) and all(map(operator.is_, own, self._own))

    def _kinds_of_tensors(self) -> list[type]:
        return list(map(type, chain.from_iterable(map(dict.values, self._tensors))))

    def _roots_own(self) -> list[Any]:
        return [
            part
            for name, value in self._root.items()
            if name not in _OURS
            for part in (name, value)
        ]


_kept: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[Watch, Any]]] = (
    weakref.WeakKeyDictionary()
)


def kept(
    module: nn.Module,
    original: type[nn.Module],
    read: Callable[[nn.Module, type[nn.Module], Evidence], _Found],
) -> _Found:
    """``read(module, original, evidence)``, or what it gave while nothing has changed."""
    readings = _kept.setdefault(module, {})
    reading = readings.get((read, original))
    if reading is None or not reading[0].holds():
        evidence = Evidence()
        watch = Watch(module, evidence)
        reading = readings[read, original] = watch, read(module, original, evidence)
    return reading[1]
