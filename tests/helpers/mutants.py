"""Changed in one place, does the code still pass its tests? Then no test can see that place.

    python -m tests.helpers.mutants [--count 60] [--seed 0] [--only block/stem.py]
        [--like TEXT] [--most 40] [--slow] [--record]

Draws places of ``block/``, ``memory/`` and ``engine/`` at random and changes one at a time, in a
copy of the repository: a number, a comparison, an operator, a condition, a statement left out. The
quick tests that ``TESTS`` names for the module were looked at once, unchanged, for the lines that
each runs; of those that run the changed line, forty are run, and a change that they pass is a
survivor, which is told. Survivors that were looked at and excused stand in ``mutants.txt``, and are
not told again. ``--record`` adds what was found to ``mutants.csv``, where it is said of each
survivor what became of it.

Not mutmut, which puts its own calls around every function, where what is read here is functions'
code; nor cosmic-ray, which starts Python, and torch, anew for every change.
"""

from __future__ import annotations

import argparse
import ast
import bisect
import csv
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.tests_of_lines import Recorder, TestsOfLines

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("block", "memory", "engine")
EXCUSED = Path(__file__).with_suffix(".txt")
RECORD = Path(__file__).with_suffix(".csv")
COLUMNS = ("revision", "seed", "module", "change", "found", "now")
CASES = 6
"""Of a test function that are looked at, and may be asked."""
SECONDS = 1800
"""Of a core, that looking at a file's tests may take."""

# by the beginning of a module's path in the package; the longest that fits. SUBJECT/NAME stands for
# tests/SUBJECT/test_NAME.py.
TESTS = {
    "block/": "exactness/parity exactness/stem exactness/stepping exactness/hazards exactness/cuts"
    " memory/recomputation",
    "block/captured": "exactness/cuda_graphs engine/engine_graphs",
    "block/cuda_graphs": "exactness/cuda_graphs engine/engine_graphs",
    "block/forwards": "exactness/models exactness/parity exactness/hazards memory/offloading",
    "block/offloading": "memory/offloading",
    "block/recording": "memory/recomputation memory/estimation",
    "block/slabs": "exactness/stem exactness/cuts exactness/parity",
    "block/traced": "conversion/tracing",
    "memory/": "memory/estimation memory/graphs memory/timeline memory/meta memory/largest",
    "memory/planning": "memory/estimation memory/recomputation memory/largest",
    "engine/": "engine/training engine/config engine/records",
    "engine/average": "engine/freezing engine/training",
    "engine/checkpoint": "engine/checkpoint engine/formats",
    "engine/distributed": "engine/placement engine/meeting engine/shares engine/training",
    "engine/export": "engine/export engine/start",
    "engine/freezing": "engine/start engine/freezing",
    "engine/lock": "engine/checkpoint engine/records",
    "engine/networks": "engine/start engine/training_in_python engine/shares",
    "engine/normalization": "engine/pixels engine/data",
    "engine/options": "engine/config engine/start engine/continuation",
    "engine/plots": "engine/records engine/best",
    "engine/progress": "engine/progress engine/records",
    "engine/records": "engine/records engine/formats engine/continuation",
    "engine/rehearsal": "engine/rehearsal",
    "engine/mistakes": "engine/tasks engine/export",
    "engine/report": "engine/records engine/best engine/export",
    "engine/resumption": "engine/checkpoint engine/continuation engine/resume",
    "engine/scores": "engine/tasks engine/best",
    "engine/signals": "engine/faults engine/resume",
    "engine/standings": "engine/best",
    "engine/start": "engine/start",
    "engine/tasks": "engine/tasks",
    "engine/telemetry": "engine/telemetry",
    "engine/trainer": "engine/trainer engine/arithmetic engine/undoing engine/training",
    "engine/training": "engine/training engine/training_in_python engine/best engine/arithmetic"
    " engine/freezing",
    "engine/watchdog": "engine/faults engine/collectives",
    "engine/data/": "engine/data",
    "engine/data/own": "engine/training_in_python",
    "engine/data/image_files": "engine/data engine/pixels engine/hostile_data",
    "engine/data/pixels": "engine/pixels",
    "engine/data/shards": "engine/shards",
    "engine/data/tables": "engine/tables engine/hostile_data",
    "engine/data/volumes": "engine/volumes",
}

COMPARISONS: dict[type[ast.cmpop], str] = {
    **{ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"},
    **{ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not", ast.IsNot: "is"},
    **{ast.In: "not in", ast.NotIn: "in"},
}
OPERATORS: dict[type[ast.operator], str] = {
    **{ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.FloorDiv: "*"},
    **{ast.Mod: "+", ast.Pow: "*"},
}


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: str
    """Below ``effdense/``."""
    start: int
    end: int
    """Bytes of the source that are replaced."""
    new: str
    line: int
    before: str
    """The line as it is."""
    lines: tuple[int, ...]
    """Its statement's first, and its own: who runs one of them runs it."""

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.end :]

    def key(self, source: bytes) -> str:
        """How it is told, and excused: without its line's number, which moves."""
        old = " ".join(source[self.start : self.end].decode().split())
        short = old if len(old) <= 60 else old[:57] + "..."
        return f"{self.module}: {self.before.strip()} [{short} -> {self.new}]"


def mutants(module: str, source: bytes) -> list[Mutant]:
    """Every change of a module's source."""
    offsets = [0]
    for line in source.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    lines = source.decode().splitlines()

    def at(node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return (
            offsets[node.lineno - 1] + node.col_offset,
            offsets[node.end_lineno - 1] + node.end_col_offset,
        )

    def text(node: ast.expr | ast.stmt) -> str:
        start, end = at(node)
        return source[start:end].decode()

    tree = ast.parse(source)
    starts = sorted(node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt))

    def running(node: ast.expr | ast.stmt) -> tuple[int, ...]:
        own = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        return (starts[bisect.bisect_right(starts, node.lineno) - 1], *own)

    return [
        Mutant(module, *at(node), new, node.lineno, lines[node.lineno - 1], running(node))
        for node in _code(tree)
        for new in _changes(node, text)
    ]


def _code(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """What runs: no annotations, decorators, docstrings, messages, or names for others."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            # what an error says is read by people
            if isinstance(child, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            # an assertion, as a keyword or not
            if isinstance(child, ast.keyword) and child.arg == "strict":
                continue
            if isinstance(child, ast.Assert):
                continue
            if isinstance(child, ast.expr | ast.stmt):
                yield child
            yield from _code(child)


def _changes(node: ast.expr | ast.stmt, text: object) -> Iterator[str]:
    """What may stand in a node's place."""
    assert callable(text)
    match node:
        case ast.Constant(value=bool() as value):
            yield str(not value)
        case ast.Constant(value=int() | float() as value):
            yield repr(value + 1)
        case ast.Compare(left=left, ops=[operator], comparators=[right]):
            yield f"{text(left)} {COMPARISONS[type(operator)]} {text(right)}"
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in OPERATORS:
            yield f"({text(left)}) {OPERATORS[type(operator)]} ({text(right)})"
        case ast.BoolOp(op=operator, values=values):
            word = " or " if isinstance(operator, ast.And) else " and "
            yield f"({word.join(f'({text(value)})' for value in values)})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield f"({text(operand)})"
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield f"({text(orelse)} if {text(test)} else {text(body)})"
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield "pass"


def excuses() -> dict[str, str]:
    """Changes that may survive, by :meth:`Mutant.key`, and why."""
    found, why = {}, ""
    for line in EXCUSED.read_text().splitlines():
        if line.startswith("# "):
            why = line[2:]
        elif line:
            found[line] = why
    return found


def files_for(module: str) -> list[str]:
    """The test files that should see changes of a module."""
    _, names = max((len(p), names) for p, names in TESTS.items() if module.startswith(p))
    return [f"tests/{room}/test_{name}.py" for room, name in map(_split, names.split())]


def _split(name: str) -> list[str]:
    return name.split("/")


def survives(copy: Path, mutant: Mutant, tests: Sequence[str], seconds: float, slow: bool) -> bool:
    """Whether the tests of a changed copy pass, in so many seconds of a core."""
    path = copy / "effdense" / mutant.module
    source = path.read_bytes()
    path.write_bytes(mutant.apply(source))
    try:
        process = os.fork()
        if process == 0:
            _test(copy, tests, seconds, slow, None)
        return _status(process, seconds) == 0
    finally:
        path.write_bytes(source)


def look(copy: Path, file: str, slow: bool) -> TestsOfLines:
    """What a file's tests run of the package, where nothing is changed."""
    written = copy / "tests_of_lines.json"
    process = os.fork()
    if process == 0:
        _test(copy, [file], SECONDS, slow, Recorder(copy / "effdense", written, CASES))
    _status(process, SECONDS)
    found = TestsOfLines.read(written)
    for name in found.failed:
        print(f"not asked, since it fails where nothing is changed: {name}", flush=True)
    assert found.seconds or not found.failed, f"all tests of {file} fail unchanged"
    return found


def _status(process: int, seconds: float) -> int | None:
    """Of a process group's leader; None where it waited so long that it had to be killed."""
    end = time.monotonic() + 10 * seconds
    status = None
    while status is None and time.monotonic() < end:
        ended, code = os.waitpid(process, os.WNOHANG)
        if ended:
            status = code
        else:
            time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    if status is None:
        os.waitpid(process, 0)
    return status


def _test(
    copy: Path, tests: Sequence[str], seconds: float, slow: bool, recorder: Recorder | None
) -> None:
    """In a process of its own, which has torch but nothing of ours yet."""
    import pytest

    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds),) * 2)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:random_order"]
    options += ["-x"] if recorder is None else []
    options += [] if slow else ["-m", "not slow"]
    os._exit(pytest.main([*tests, *options], [] if recorder is None else [recorder]))


def record(rows: Sequence[dict[str, object]]) -> None:
    """Below what was found before."""
    with RECORD.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)


def summary() -> str:
    """How many were found in each room, and what became of the survivors."""
    with RECORD.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = []
    for room in ROOMS:
        own = [row for row in rows if row["module"].startswith(f"{room}/")]
        found = Counter(row["found"] for row in own)
        now = Counter(row["now"].partition("::")[0].split("/")[0] for row in own if row["now"])
        became = ", ".join(f"{n} {'killed' if k == 'tests' else k}" for k, n in now.items())
        lines.append(
            f"{room}: {len(own)} drawn, {found['killed']} killed, {found['excused']} excused, "
            f"{found['survived']} survived ({became} since)"
        )
    return "\n".join(lines)


def _revision() -> str:
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60, help="how many places (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument("--only", default="", help="modules whose path begins so: block/stem.py")
    parser.add_argument("--like", default="", help="changes in whose telling this stands")
    parser.add_argument("--most", type=int, default=40, help="tests asked of one (default 40)")
    parser.add_argument("--record", action="store_true", help="keep it in mutants.csv")
    parser.add_argument("--summary", action="store_true", help="count what mutants.csv holds")
    parser.add_argument("--slow", action="store_true", help="let the slow tests look too")
    options = parser.parse_args()
    if options.summary:
        print(summary())
        return
    # imported once, for all the processes that are forked from this one
    import pytest  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401

    package = ROOT / "effdense"
    sources = {
        str(path.relative_to(package)): path.read_bytes()
        for room in ROOMS
        for path in sorted((package / room).rglob("*.py"))
        if path.is_relative_to(package)
    }
    known = excuses()
    every = [
        mutant
        for module, source in sources.items()
        if module.startswith(options.only)
        for mutant in mutants(module, source)
        if options.like in mutant.key(source)
    ]
    chosen = random.Random(options.seed).sample(every, min(options.count, len(every)))
    print(f"{len(every):,} places, {len(chosen)} of them", flush=True)
    looked: dict[str, TestsOfLines] = {}
    counts = {"killed": 0, "excused": 0, "survived": 0}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(os.path.realpath(folder), "copy")
        ignored = shutil.ignore_patterns(".*", "site", "build", "dist", "results", "shared")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for number, mutant in enumerate(chosen):
            key, files = mutant.key(sources[mutant.module]), files_for(mutant.module)
            if key in known:
                what = "excused"
            else:
                for file in files:
                    if file not in looked:
                        looked[file] = look(copy, file, options.slow)
                seen = TestsOfLines.together([looked[file] for file in files])
                tests = seen.running(mutant.module, mutant.lines, options.most)
                # where a change makes them go on for ever
                seconds = 30 + 5 * sum(seen.seconds[test] for test in tests)
                lives = survives(copy, mutant, tests, seconds, options.slow)
                what = "survived" if lives else "killed"
            counts[what] += 1
            if what == "survived":
                print(f"{number}, line {mutant.line}: {key}", flush=True)
            if options.record:
                place, change = key.split(": ", 1)
                row = (_revision(), options.seed, place, change, what, "")
                record([dict(zip(COLUMNS, row, strict=True))])
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    sys.exit(bool(counts["survived"]))


if __name__ == "__main__":
    main()
