"""Which tests are asked of a change, and what became of those that nobody saw."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.helpers.launch import REPOSITORY
from tests.helpers.mutants import COLUMNS, RECORD, excuses, mutants
from tests.helpers.tests_of_lines import TestsOfLines

CODE = """
def f(x):
    if x:
        return 1
    return 2
"""
TESTS = """
import sys; sys.path.insert(0, {folder!r})
import threading
import code_of_it as c
import pytest

@pytest.mark.parametrize("x", [1, 2, 3, 4])
def test_one(x): assert c.f(x) == 1
def test_two(): assert c.f(0) == 2
def test_in_a_thread():
    thread = threading.Thread(target=c.f, args=(0,))
    thread.start()
    thread.join()
def test_nothing(): pass
def test_that_fails(): assert c.f(1) == 2
"""
LOOK = """
import sys; from pathlib import Path; import pytest
from tests.helpers.tests_of_lines import Recorder
folder = Path(sys.argv[1])
options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(folder)]
recorder = Recorder(folder, folder / "found.json", 2)
sys.exit(pytest.main([str(folder / "test_it.py"), *options], [recorder]))
"""


def test_who_runs_a_line(tmp_path: Path) -> None:
    (tmp_path / "code_of_it.py").write_text(CODE)
    (tmp_path / "test_it.py").write_text(TESTS.format(folder=str(tmp_path)))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    look = [sys.executable, "-c", LOOK, str(tmp_path)]
    assert subprocess.run(look, cwd=REPOSITORY, capture_output=True).returncode == 1
    found = TestsOfLines.read(tmp_path / "found.json")
    assert found.failed == ["test_it.py::test_that_fails"]

    def running(lines: list[int], most: int = 9, module: str = "code_of_it.py") -> list[str]:
        return sorted(n.split("::")[1] for n in found.running(module, lines, most))

    first = ["test_one[1]", "test_one[3]"]
    second = ["test_in_a_thread", "test_two"]
    assert running([4]) == first
    assert running([5]) == second
    assert running([3]) == sorted(first + second)
    # where nobody runs the line, those of the module; else all
    assert running([1]) == sorted(first + second)
    assert running([4], module="other.py") == sorted([*first, *second, "test_nothing"])
    # a second case of a function after the first of each
    assert Counter(name.split("[")[0] for name in running([3], 3)) == {
        "test_one": 1,
        "test_two": 1,
        "test_in_a_thread": 1,
    }
    both = TestsOfLines.together([found, TestsOfLines({}, [])])
    assert both == found


def test_every_survivor_was_looked_at() -> None:
    """Killed since by a test that is named, or excused; or there is no such change any more."""
    with RECORD.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    package = REPOSITORY / "effdense"
    for row in rows:
        assert row["found"] in ("killed", "excused", "survived"), row
        change = f"{row['module']}: {row['change']}"
        if row["found"] != "survived":
            assert not row["now"], row
        elif row["now"] == "excused":
            assert change in excuses(), row
        elif row["now"] == "drawn no more":
            source = (package / row["module"]).read_bytes()
            assert change not in {m.key(source) for m in mutants(row["module"], source)}, row
        else:
            path, _, name = row["now"].partition("::")
            assert f"def {name}(" in (REPOSITORY / path).read_text(), row
