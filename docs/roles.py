"""What mkdocstrings lacks for our docstrings: links in Sphinx's notation.

:class:`DenseNet` becomes a link where the package exports the name, else code. A link that
leads nowhere is a warning of the build, and in strict mode its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from griffe import Alias, Extension, Module, Object

ROLE = re.compile(r":(func|class|meth|attr|mod|data):`~?([\w.]+)`")


class Roles(Extension):
    """Rewrites the docstrings of a package once all of it has been read."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        exported = {str(name) for name in pkg.exports or ()}

        for owner, obj in objects(pkg):

            def link(role: re.Match[str], owner: str = owner) -> str:
                kind, name = role[1], role[2].removeprefix(f"{pkg.name}.")
                if kind in ("meth", "attr") and "." not in name:
                    name = f"{owner}.{name}"
                public = name.partition(".")[0] in exported
                return f"[`{name}`][{pkg.name}.{name}]" if public else f"`{role[2]}`"

            if obj.docstring is not None:
                obj.docstring.value = ROLE.sub(link, obj.docstring.value)


def objects(parent: Object, owner: str = "") -> Iterator[tuple[str, Object]]:
    """Everything under ``parent``, each with the name of the class that it is or belongs to."""
    for member in parent.members.values():
        if not isinstance(member, Alias):
            inner = member.name if member.is_class else owner
            yield inner, member
            yield from objects(member, inner)
