"""What ``make mutants`` changes, and what it may leave."""

from __future__ import annotations

import ast

import pytest

from tests.helpers.mutants import ROOMS, ROOT, TESTS, excuses, files_for, mutants

SOURCE = b'''
"""Of the module: 1 + 1."""
WIDE: int = 2


def f(x: int = 3, *, y: bool = True) -> list[int]:
    """Nothing here: not 4."""
    assert x != 5
    if x < 6 and not y:
        raise ValueError(f"{x + 7}")
    g(x)
    x += 1
    return [x - 8] if y else []
'''
CHANGES = {
    ("2", "3"),
    ("3", "4"),
    ("True", "False"),
    ("x < 6 and not y", "(x < 6) or (not y)"),
    ("x < 6", "x <= 6"),
    ("6", "7"),
    ("not y", "y"),
    ("g(x)", "pass"),
    ("x += 1", "pass"),
    ("1", "2"),
    ("[x - 8] if y else []", "([] if y else [x - 8])"),
    ("x - 8", "(x) + (8)"),
    ("8", "9"),
}


def test_one_place_is_changed_at_a_time() -> None:
    found = mutants("x.py", SOURCE)
    changes = {(SOURCE[m.start : m.end].decode(), m.new.strip("()") or m.new) for m in found}
    expected = {(old, new.strip("()")) for old, new in CHANGES}
    assert changes == expected
    assert len(found) == len(CHANGES)
    for mutant in found:
        changed = mutant.apply(SOURCE)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))
        assert b"# " not in changed
        assert str(mutant.line) not in mutant.key(SOURCE).split(":")[0]


def test_every_module_has_its_tests_and_every_excuse_its_place() -> None:
    package, told = ROOT / "effdense", set()
    for room in ROOMS:
        for path in sorted((package / room).rglob("*.py")):
            module, source = path.relative_to(package).as_posix(), path.read_bytes()
            for file in files_for(module):
                assert (ROOT / file).is_file(), f"{module}: {file}"
            told |= {mutant.key(source) for mutant in mutants(module, source)}
    assert set(excuses()) <= told
    for beginning in TESTS:
        named = package / (beginning if beginning.endswith("/") else f"{beginning}.py")
        assert named.exists(), beginning


def test_an_excuse_has_its_reason() -> None:
    assert all(excuses().values())
    with pytest.raises(ValueError, match="max"):
        files_for("machine/memory.py")
