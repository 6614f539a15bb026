"""``verify``: is it correct here, and what does it save?"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
from tyro.conf import arg

from ..errors import UserError
from ..machine.tables import table
from ..verification.rows import Row
from . import front_end
from .env import as_text, environment
from .network import Batch, Network
from .verification import Verification

_Dtype = Literal["float64", "float32", "bfloat16"]


@dataclass(frozen=True)
class Options:
    """Hold effdense's network, or a model that it converts, against the naive one.

    Then measure memory and time of both. Exit status 1 where a claim does not hold.
    """

    network: Network = field(default_factory=lambda: Network(depth=40))
    batch: Batch = field(default_factory=lambda: Batch(batch_size=8))
    steps: int = 3
    """Of the optimisers."""
    dtype: Annotated[
        tuple[_Dtype, ...] | None,
        arg(
            metavar="{float64,float32,bfloat16} [...]",
            help_behavior_hint="(default: float64, on a GPU all)",
        ),
    ] = None
    """Error at most: 1e-10 in float64, in bfloat16 twice the naive network's own."""
    device: Annotated[
        str | None,
        arg(metavar="DEVICE", help_behavior_hint="(default: cuda where there is one)"),
    ] = None
    """cpu, cuda or cuda:N."""
    no_measurements: bool = False
    """Leave memory and time out."""
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Write the rows as JSON too."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FILE")] = Path("effdense-verify.md")
    """The report, worth attaching to an issue."""

    def __post_init__(self) -> None:
        front_end.check_positive(steps=self.steps)


def run(options: Options) -> int:
    start = time.perf_counter()
    for path in filter(None, (options.output, options.json)):
        _check_writable(path)
    device = _device(options.device)
    names = options.dtype or (get_args(_Dtype) if device.type == "cuda" else ["float64"])
    verification = Verification(
        options.network,
        options.batch,
        device,
        [getattr(torch, name) for name in names],
        steps=options.steps,
        measure=not options.no_measurements,
    )
    print(f"{verification.describe()}\n{_one_line()}\n")
    print(_line(Row("claim", "compared", "error", "limit", "")))  # type: ignore[arg-type]
    rows = []
    for row in verification.rows():
        rows.append(row)
        print(_line(row), flush=True)
    failed = sum(row.failed for row in rows)
    unchecked = sum(row.status == "not checked" for row in rows)
    verdict = f"{failed} of {len(rows) - unchecked} claims FAILED" if failed else "all claims hold"
    verdict += f", {unchecked} not checked" if unchecked else ""
    verdict += f" ({time.perf_counter() - start:.0f} s)"
    _write(options.output, _report(verification.describe(), verdict, rows))
    if options.json:
        _write(options.json, _as_json(verification.describe(), verdict, rows))
    print(f"\n{verdict}\n{options.output}")
    return 1 if failed else 0


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if (device.index or 0) >= count:
        raise UserError(f"--device {name}: torch sees {count} CUDA devices here")
    return torch.device("cuda", device.index or 0)


def _line(row: Row) -> str:
    """A row for the terminal, as soon as it is known."""
    return f"{row.status:<12}{row.claim:<38}{row.error:>8}{row.limit:>8}  {row.compared}"


def _one_line() -> str:
    found = dict(environment())
    names = ("effdense", "torch", "processor")
    return ", ".join([found[names[0]], f"torch {found[names[1]]}", found[names[2]]])


def _report(what: str, verdict: str, rows: Sequence[Row]) -> str:
    header = ("claim", "error", "limit", "", "compared")
    cells = [(r.claim, r.error, r.limit, r.status, r.compared) for r in rows]
    command = shlex.join(["python", "-m", "effdense", *sys.argv[1:]])
    return (
        f"# effdense verify\n\n{what}: **{verdict}**\n\n```\n{command}\n\n"
        f"{as_text(environment())}\n```\n\n{table(header, cells)}\n"
    )


def _as_json(what: str, verdict: str, rows: Sequence[Row]) -> str:
    found = {
        "what": what,
        "verdict": verdict,
        "failed": sum(row.failed for row in rows),
        "environment": dict(environment()),
        "rows": [vars(row) for row in rows],
    }
    return json.dumps(found, indent=1) + "\n"


def _check_writable(path: Path) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {folder}")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
