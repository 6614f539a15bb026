"""Which tests run a line of the package: a plugin of pytest that looks at each test as it runs.

Of what runs in the test's own process alone: what a forked or started one runs is not seen.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

Trace = Callable[[FrameType, str, Any], Any]


class Recorder:
    """Writes, for each test that passed, its seconds of a core and the lines of ``package`` it ran.

    Of a function's cases so many at most, from its first to its last, are run at all.
    """

    def __init__(self, package: Path, written: Path, cases: int) -> None:
        self.package = f"{package}/"
        self.written, self.cases = written, cases
        self.tests: list[tuple[str, float, dict[str, list[int]]]] = []
        self.failed: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        functions: dict[str, list[pytest.Item]] = defaultdict(list)
        for item in items:
            if not any(skip.args[:1] == (True,) for skip in item.iter_markers("skipif")):
                functions[item.nodeid.split("[")[0]].append(item)
        items[:] = [
            cases[i * len(cases) // kept]
            for cases in functions.values()
            for kept in [min(self.cases, len(cases))]
            for i in range(kept)
        ]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, None, None]:
        ran: dict[str, set[int]] = defaultdict(set)
        self.passed, start = False, time.process_time()
        trace = _tracing(self.package, ran)
        threading.settrace(trace)
        sys.settrace(trace)
        yield
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type, unused-ignore]
        if self.passed:
            lines = {module: sorted(found) for module, found in ran.items()}
            self.tests.append((item.nodeid, time.process_time() - start, lines))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.passed = report.passed
        if report.failed:
            self.passed = False
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.written.write_text(json.dumps({"tests": self.tests, "failed": self.failed}))


def _tracing(package: str, ran: dict[str, set[int]]) -> Trace:
    start = len(package)

    def called(frame: FrameType, event: str, argument: Any) -> Trace | None:
        path = frame.f_code.co_filename
        if not path.startswith(package):
            return None
        add = ran[path[start:]].add

        def line(frame: FrameType, event: str, argument: Any) -> Trace:
            add(frame.f_lineno)
            return line

        return line

    return called


@dataclass
class TestsOfLines:
    """What a :class:`Recorder` found."""

    seconds: dict[str, float]
    failed: list[str]
    by_line: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    by_module: dict[str, set[str]] = field(default_factory=dict)

    __test__ = False

    @classmethod
    def read(cls, written: Path) -> TestsOfLines:
        found = json.loads(written.read_text())
        tests = found["tests"]
        self = cls({name: seconds for name, seconds, _ in tests}, found["failed"])
        for name, _, modules in tests:
            for module, lines in modules.items():
                self.by_module.setdefault(module, set()).add(name)
                for line in lines:
                    self.by_line.setdefault((module, line), set()).add(name)
        return self

    @classmethod
    def together(cls, parts: Sequence[TestsOfLines]) -> TestsOfLines:
        """Of several files."""
        self = cls({}, [])
        for part in parts:
            self.seconds |= part.seconds
            self.failed += part.failed
            for line, names in part.by_line.items():
                self.by_line.setdefault(line, set()).update(names)
            for module, names in part.by_module.items():
                self.by_module.setdefault(module, set()).update(names)
        return self

    def running(self, module: str, lines: Iterable[int], most: int) -> list[str]:
        """At most so many of the tests that ran one of the lines.

        Where none did in its own process, of all that ran the module; where none did that, of all.
        """
        ran: set[str] = set()
        for line in lines:
            ran |= self.by_line.get((module, line), set())
        return spread(ran or self.by_module.get(module) or self.seconds, self.seconds, most)


def spread(names: Iterable[str], seconds: dict[str, float], most: int) -> list[str]:
    """At most so many of the tests, the quickest cases of each function.

    A second one of a function only after the first of all, so that as many as possible look.
    """
    cases: dict[str, int] = defaultdict(int)
    order = []
    for name in sorted(names, key=lambda name: (seconds[name], name)):
        function = name.split("[")[0]
        order.append((cases[function], seconds[name], name))
        cases[function] += 1
    return [name for _, _, name in sorted(order)[:most]]
