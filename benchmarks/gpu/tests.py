"""The tests that can run on a device, run on it.

First ``tests/device``, which needs nothing but torch; then of the other tests those for which
``device`` is one of several (``tests/conftest.py``), file by file while there is time.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import torch

from . import ROOT
from .sheet import Sheet

FILES = {
    "parity and save modes": "tests/exactness/test_parity.py",
    "hazards": "tests/exactness/test_hazards.py",
    "offloading": "tests/memory/test_offloading.py",
    "recomputation": "tests/memory/test_recomputation.py",
    "conversion": "tests/conversion/test_conversion.py",
    "precision": "tests/exactness/test_precision.py",
    "resumption": "tests/engine/test_resume.py",
}
LATE = "not done in their time"
# of which a checkout that nobody installed may lack some
_NEEDED = ("torchvision", "safetensors", "numpy", "yaml", "sklearn", "tyro")


def run(sheet: Sheet, device: torch.device, tiny: bool) -> None:
    if importlib.util.find_spec("pytest") is None:
        sheet.skip("tests", "tests/device", "pytest is not installed")
        return
    chosen = ["-k", device.type] + (["-m", "not slow"] if tiny else [])
    found = _run(sheet, ["tests/device", *chosen])
    if isinstance(found, str):
        sheet.check("tests", "tests/device", False, note=found)
    else:
        for case in found:
            _tell(sheet, case)
    _run_others(sheet, FILES if device.type == "cuda" else {"all": " ".join(FILES.values())})


def _run_others(sheet: Sheet, files: dict[str, str]) -> None:
    absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    for name, paths in files.items():
        what = f"on a GPU: {name}"
        if absent:
            sheet.skip("tests", what, f"{absent[0]} is not installed")
        elif sheet.has_time("tests", what, 10):
            found = _run(sheet, [*paths.split(), "-m", "gpu"])
            if found == LATE:
                sheet.skip("tests", what, LATE)
            else:
                _tell_together(sheet, what, found)


def _run(sheet: Sheet, chosen: list[str]) -> list[ElementTree.Element] | str:
    """The cases of a run of pytest, or why there are none."""
    with TemporaryDirectory() as folder:
        found = Path(folder) / "found.xml"
        plugin = ["-p", "benchmarks.gpu", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-q", *plugin, f"--junitxml={found}", *chosen]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=sheet.left()
            )
        except subprocess.TimeoutExpired:
            return LATE
        cases = list(ElementTree.parse(found).iter("testcase")) if found.exists() else []
        return cases or f"none ran: {done.stdout[-300:]}{done.stderr[-300:]}"


def _fault(case: ElementTree.Element) -> str | None:
    failure = case.find("failure")
    failure = failure if failure is not None else case.find("error")
    return None if failure is None else str(failure.get("message"))[:300]


def _tell(sheet: Sheet, case: ElementTree.Element) -> None:
    what = str(case.get("name"))
    group = str(case.get("classname")).removeprefix("tests.device.")
    skip, fault = case.find("skipped"), _fault(case)
    if skip is not None:
        sheet.skip(group, what, str(skip.get("message")))
    else:
        sheet.check(group, what, fault is None, note=fault or "")


def _tell_together(sheet: Sheet, what: str, found: list[ElementTree.Element] | str) -> None:
    """A row for a file's tests, and one for each that fails."""
    if isinstance(found, str):
        sheet.check("tests", what, False, note=found)
        return
    skipped = Counter(str(s.get("message")) for case in found for s in case.iter("skipped"))
    faults = [(str(case.get("name")), fault) for case in found if (fault := _fault(case))]
    passed = len(found) - skipped.total() - len(faults)
    reasons = [f"{number} skipped: {reason}" for reason, number in skipped.items()]
    if passed == 0 and not faults:
        sheet.skip("tests", what, "; ".join(reasons))
        return
    note = "; ".join([f"{passed} passed, {len(faults)} failed", *reasons])
    sheet.check("tests", what, not faults, note=note)
    for name, fault in faults:
        sheet.check("tests", name, False, note=fault)
