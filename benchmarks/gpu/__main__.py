"""``python -m benchmarks.gpu``: each section in a process of its own, then the report."""

from __future__ import annotations

import argparse
import datetime
import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import ROOT, page, targets
from .sheet import Row, Sheet, as_json, rows_of, told

# by how much of the time each may take; what one leaves over is the others'
SECTIONS = {
    "environment": 3,
    "operations": 10,
    "checks": 12,
    "tests": 15,
    "memory": 20,
    "speed": 32,
    "sanitizer": 8,
}
# a process that is told to stop by itself is waited for a little longer
GRACE = 15


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    fault = _wrong_device(options.device)
    if fault is not None:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    if options.section is not None:
        _section(options)
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    rows = {"run": _about(options), **_all_sections(options)}
    (options.output / "report.json").write_text(as_json(rows))
    (options.output / "report.html").write_text(page.html(rows))
    failed = [row for found in rows.values() for row in found if row.verdict == "fail"]
    print(f"\n{page.summary(rows)}")
    for row in failed:
        print(f"  {row}")
    print(f"report: {options.output}/report.html and report.json, to be attached to an issue")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Whether effdense is right, small and fast on this machine's GPU, in one "
        "report. Exit status 1 where something does not hold.",
    )
    parser.add_argument("--device", default="auto", help="cuda, cuda:N or cpu (default: a GPU)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of all (default: 10)")
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-report"), help="folder (default: gpu-report)"
    )
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="(default: all)"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny networks, as ever on a CPU")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser


def _wrong_device(name: str) -> str | None:
    kind, colon, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (colon and not index.isdecimal())):
        return f"--device expects cuda, cuda:N or cpu, got {name}"
    count = torch.cuda.device_count()
    if kind == "cuda" and count == 0:
        return "torch sees no GPU here"
    if colon and int(index) >= count:
        return f"--device {name}: torch sees {count} GPUs, the last is cuda:{count - 1}"
    return None


def _about(options: argparse.Namespace) -> list[Row]:
    """What was asked, and of what."""
    began = datetime.datetime.now(datetime.timezone.utc)
    # its name is the environment's to ask for: who asks may hold a part of its memory, or all of
    # it where a GPU takes one process at a time
    on_gpu = options.device.startswith("cuda")
    left_out = [each for each in SECTIONS if each not in options.sections]
    said = {
        "begun": f"{began:%Y-%m-%d %H:%M} UTC",
        "device": options.device if on_gpu else "cpu, no GPU",
        "networks": "tiny" if options.tiny or not on_gpu else "full size",
        "time allowed": f"{options.minutes:g} minutes",
        "sections not asked for": ", ".join(left_out) or "none",
    }
    return [Row("run", what, "said", note=which) for what, which in said.items()]


def _section(options: argparse.Namespace) -> None:
    """One section, in this process."""
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    # what it took to get here, torch's import above all, is a part of its time
    seconds = options.until - time.time()
    sheet = Sheet(_rows_path(options.output, options.section), seconds)
    tiny = options.tiny or device.type != "cuda"
    importlib.import_module(f"benchmarks.gpu.{options.section}").run(sheet, device, tiny)


def _rows_path(output: Path, section: str) -> Path:
    return output / "rows" / f"{section}.jsonl"


def _all_sections(options: argparse.Namespace) -> dict[str, list[Row]]:
    end = time.monotonic() + 60 * options.minutes
    rows: dict[str, list[Row]] = {}
    waiting = list(options.sections)
    while waiting:
        name, left = waiting[0], end - time.monotonic()
        seconds = left * SECTIONS[name] / sum(SECTIONS[each] for each in waiting)
        waiting.pop(0)
        print(f"\n== {name}, at most {max(0, seconds):.0f} s", flush=True)
        began = time.monotonic()
        path = _rows_path(options.output, name)
        path.unlink(missing_ok=True)
        fault = _run(options, name, seconds)
        rows[name] = rows_of(path)
        if fault is not None:
            rows[name].append(told(Row("section", name, "fail", note=fault)))
            print(rows[name][-1])
        rows[name].append(Row("section", "time", "said", time.monotonic() - began, "s"))
    if "speed" in rows:
        rows["targets"] = targets.rows(rows["speed"], options.device)
    return rows


def _run(options: argparse.Namespace, name: str, seconds: float) -> str | None:
    """Run a section in a process of its own; what went wrong, or None."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--section", name]
    command += ["--until", str(time.time() + seconds), "--device", options.device]
    command += ["--output", str(options.output.resolve()), *["--tiny"] * options.tiny]
    log = _rows_path(options.output.resolve(), name).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w+") as file:
        try:
            done = subprocess.run(command, cwd=ROOT, stderr=file, timeout=max(1, seconds) + GRACE)
        except subprocess.TimeoutExpired:
            return "ended: it did not keep its time"
        file.seek(0)
        said = file.read().strip().splitlines() or [""]
    return None if done.returncode == 0 else f"exit status {done.returncode}: {said[-1][:300]}"


if __name__ == "__main__":
    sys.exit(main())
