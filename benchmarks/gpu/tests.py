"""The tests that can run on a device, run on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import torch

from . import ROOT
from .sheet import Sheet


def run(sheet: Sheet, device: torch.device, tiny: bool) -> None:
    try:
        import pytest  # noqa: F401
    except ImportError:
        sheet.skip("tests", "tests/device", "pytest is not installed")
        return
    with TemporaryDirectory() as folder:
        found = Path(folder) / "found.xml"
        chosen = ["-k", device.type] + (["-m", "not slow"] if tiny else [])
        plugin = ["-p", "benchmarks.gpu", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-q", *plugin, f"--junitxml={found}"]
        try:
            done = subprocess.run(
                [*command, *chosen, "tests/device"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=sheet.left(),
            )
        except subprocess.TimeoutExpired:
            sheet.check("tests", "tests/device", False, note="not done in their time")
            return
        if not found.exists():
            sheet.check("tests", "tests/device", False, note=done.stdout[-300:])
            return
        cases = list(ElementTree.parse(found).iter("testcase"))
        if not cases:
            sheet.check("tests", "tests/device", False, note=f"none ran: {done.stdout[-300:]}")
        for case in cases:
            what = str(case.get("name"))
            group = str(case.get("classname")).removeprefix("tests.device.")
            failure, skip = case.find("failure"), case.find("skipped")
            failure = failure if failure is not None else case.find("error")
            if skip is not None:
                sheet.skip(group, what, str(skip.get("message")))
            else:
                note = "" if failure is None else str(failure.get("message"))[:300]
                sheet.check(group, what, failure is None, note=note)
