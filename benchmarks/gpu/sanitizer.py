"""NVIDIA's compute-sanitizer over every kernel, where it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from . import ROOT
from .sheet import Sheet

TOOLS = ("memcheck", "racecheck")


def run(sheet: Sheet, device: torch.device, tiny: bool) -> None:
    path = shutil.which("compute-sanitizer")
    for tool in TOOLS:
        if device.type != "cuda":
            sheet.skip("compute-sanitizer", tool, "no GPU")
        elif path is None:
            sheet.skip("compute-sanitizer", tool, "compute-sanitizer is not on PATH")
        elif sheet.has_time("compute-sanitizer", tool, 10):
            _watch(sheet, path, tool, device)


def _watch(sheet: Sheet, path: str, tool: str, device: torch.device) -> None:
    with TemporaryDirectory() as folder:
        watched = [sys.executable, "-m", "benchmarks.gpu", "--section", "operations"]
        options = ["--device", str(device), "--output", str(Path(folder))]
        options += ["--until", str(time.time() + 600)]
        command = [path, "--tool", tool, "--error-exitcode", "99", *watched, *options]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=sheet.left()
            )
        except subprocess.TimeoutExpired:
            sheet.skip("compute-sanitizer", tool, "no time left")
            return
    said = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    note = "; ".join(said[-3:])[-300:]
    sheet.check("compute-sanitizer", tool, done.returncode == 0, note=note)
