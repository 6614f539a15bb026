"""The house stands: imports run one way, in no circle, and go in by the parts' doors.

Every import counts: at the top of a module, inside a function, or for the type checker alone. A
circle that only runs later is still a circle for a reader.

A part, which is a package of ``effdense`` or a module beside them, exports the modules that are
in its ``__all__``. From another part these may be imported and no other, and from them no name
with a leading underscore. The tests look inside.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.launch import REPOSITORY

FLOORS = (
    {"autocast", "choices", "differentiation", "errors", "reference", "tracing", "version"},
    {"machine", "weights"},
    # the operations; the kernels are one way of doing them, in their terms
    {"backends", "kernels"},
    {"norms"},
    {"recognition"},
    {"block"},
    {"conversion", "models"},
    {"adaptation"},
    {"memory"},
    {"verification"},
    {"engine"},
    # what users import
    {"effdense"},
    {"commands"},
    {"__main__"},
    {"benchmarks", "train_ddp"},
)
"""From the ground up. Nothing imports from a floor above, nor from its neighbours on its own."""
TOGETHER = {"backends", "kernels"}


class Import(NamedTuple):
    """One module's use of another."""

    importer: str
    target: str
    """The module."""
    name: str
    """What of it, empty for the module itself."""
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line}: {self.target} {self.name}".rstrip()


class House:
    """All modules of a folder laid out as this repository, and what they import of each other."""

    def __init__(self, root: Path) -> None:
        self.modules: dict[str, Path] = {}
        for folder, package in (
            ("effdense", "effdense"),
            ("kernels", "effdense.kernels"),
            ("benchmarks", "benchmarks"),
        ):
            for path in sorted((root / folder).rglob("*.py")):
                words = (package, *path.relative_to(root / folder).with_suffix("").parts)
                self.modules[".".join(words).removesuffix(".__init__")] = path
        for path in root.glob("*.py"):
            self.modules[path.stem] = path
        self.trees = {name: ast.parse(path.read_text()) for name, path in self.modules.items()}
        self.imports = [found for name in self.modules for found in self._imports(name)]

    def _imports(self, importer: str) -> Iterator[Import]:
        for node in ast.walk(self.trees[importer]):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if target := self._module(importer, alias.name):
                        yield Import(importer, target, "", node.lineno)
            elif isinstance(node, ast.ImportFrom):
                base = self._origin(importer, node)
                for alias in node.names:
                    if submodule := self._module(importer, f"{base}.{alias.name}"):
                        yield Import(importer, submodule, "", node.lineno)
                    elif target := self._module(importer, base):
                        yield Import(importer, target, alias.name, node.lineno)

    def _origin(self, importer: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self.modules[importer].name == "__init__.py"
        words = importer.split(".")
        above = words[: len(words) - node.level + is_package]
        return ".".join([*above, *([node.module] if node.module else [])])

    def _module(self, importer: str, name: str) -> str | None:
        """The full name of one of ours; the benchmarks' scripts see each other without theirs."""
        if importer.startswith("benchmarks") and f"benchmarks.{name}" in self.modules:
            return f"benchmarks.{name}"
        return name if name in self.modules else None

    def exports(self, package: str) -> set[str]:
        """What ``__all__`` says."""
        for node in self.trees[package].body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return set(ast.literal_eval(node.value))
        return set()

    def upward(self) -> list[str]:
        """Imports that don't lead down."""
        floor = {part: height for height, parts in enumerate(FLOORS) for part in parts}
        wrong = []
        for found in self.imports:
            here, there = part_of(found.importer), part_of(found.target)
            if here != there and not {here, there} <= TOGETHER and floor[there] >= floor[here]:
                wrong.append(str(found))
        return wrong

    def circle(self) -> list[str]:
        """Modules that import each other in a ring, empty if there is no such."""
        graph = {
            name: {i.target for i in self.imports if i.importer == name} for name in self.modules
        }
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            return list(error.args[1])
        return []

    def through_walls(self) -> list[str]:
        """Imports from another part of what it doesn't export."""
        return [str(found) for found in self.imports if self._is_through_a_wall(found)]

    def _is_through_a_wall(self, found: Import) -> bool:
        if part_of(found.importer) == part_of(found.target):
            return False
        if found.name.startswith("_") and not found.name.endswith("__"):
            return True
        words = found.target.split(".")
        # of effdense itself every part may be entered, of a part what it exports
        return any(
            words[depth] not in self.exports(".".join(words[:depth]))
            for depth in range(2, len(words))
        )

    def private_names(self) -> list[str]:
        """Uses of ``module._name`` where the module is of another part."""
        wrong = []
        for name, tree in self.trees.items():
            aliases = {
                alias.asname or alias.name: target
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
                if (target := self._module(name, f"{self._origin(name, node)}.{alias.name}"))
                and part_of(target) != part_of(name)
            }
            wrong += [
                f"{name}:{node.lineno}: {ast.unparse(node)}"
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in aliases
                and node.attr.startswith("_")
                and not node.attr.endswith("__")
            ]
        return wrong


def part_of(module: str) -> str:
    """The part a module is in: what comes after ``effdense``, or what stands beside it."""
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] if top == "effdense" and rest else top


@pytest.fixture(scope="module")
def house() -> House:
    return House(REPOSITORY)


def test_every_part_stands_on_one_floor(house: House) -> None:
    parts = {part_of(module) for module in house.modules}
    on_floors = [part for floor in FLOORS for part in floor]
    assert sorted(on_floors) == sorted(parts)


def test_imports_lead_down(house: House) -> None:
    assert len(house.imports) > 300
    assert house.upward() == []


def test_no_modules_import_each_other_in_a_circle(house: House) -> None:
    assert house.circle() == []


def test_parts_are_entered_by_what_they_export(house: House) -> None:
    assert house.through_walls() == []
    assert house.private_names() == []


def test_what_a_part_exports_is_wanted(house: House) -> None:
    wanted = {
        ".".join(found.target.split(".")[:depth])
        for found in house.imports
        if part_of(found.importer) != part_of(found.target)
        for depth in range(3, found.target.count(".") + 2)
    }
    exported = {
        f"{package}.{name}"
        for package in house.modules
        if package.count(".") > 0
        for name in house.exports(package)
    }
    assert exported == wanted


VIOLATIONS = {
    "upward": {"block/stage.py": "def f():\n    from ..models import DenseNet"},
    "upward to the door": {"memory/plan.py": "import effdense"},
    "neighbour": {"conversion.py": "from .models import DenseNet"},
    "circle": {"block/a.py": "from . import b", "block/b.py": "from .a import f"},
    "type checker's circle": {
        "norms/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import B",
        "norms/b.py": "from .a import f",
    },
    "internal module": {"block/a.py": "from ..norms.inside import f"},
    "private name": {"block/a.py": "from ..norms.door import _f"},
    "private attribute": {"block/a.py": "from ..norms import door\ndoor._f()"},
}


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_each_rule_can_be_broken(violation: str, tmp_path: Path) -> None:
    sound = {
        "__init__.py": "from .models import DenseNet",
        "models.py": "from .block.dense_block import f",
        "conversion.py": "",
        "memory/__init__.py": "",
        "block/__init__.py": '__all__ = ["dense_block"]',
        "block/dense_block.py": "from ..norms import door\nfrom ..norms.door import f\ndoor.f()",
        "norms/__init__.py": '__all__ = ["door"]',
        "norms/door.py": "from . import inside",
        "norms/inside.py": "",
    }

    def found(files: dict[str, str]) -> list[list[str]]:
        for name, text in files.items():
            path = tmp_path / "effdense" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        house = House(tmp_path)
        return [house.upward(), house.circle(), house.through_walls(), house.private_names()]

    assert found(sound) == [[], [], [], []]
    assert sum(map(bool, found(sound | VIOLATIONS[violation]))) == 1
