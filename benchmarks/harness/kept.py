"""Where results are kept: a folder for each machine, date and revision, a CSV file for each run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effdense.engine.records import write_atomically
from effdense.errors import UserError

from .results import ENVIRONMENT_COLUMNS

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "benchmarks" / "results"
ENVIRONMENT = "environment.json"


def machine(environment: Mapping[str, Any]) -> str:
    """Its GPU's name, or its processor's, as part of a file name."""
    name = re.sub(r"\((r|tm)\)", "", (environment["gpu"] or environment["processor"]).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def kept_folder(environment: Mapping[str, Any], folder: Path = KEPT) -> Path:
    """Where what is measured in this environment belongs: with what has been there, if anything.

    Raises:
        UserError: where nobody could measure it again.
    """
    revision = environment["git_revision"]
    if "+" in revision or revision == "unknown":
        raise UserError(
            f"results are kept of a revision that is there, got {revision!r}; commit and measure "
            "again"
        )
    own, short = machine(environment), revision[:7]
    # begun before midnight, perhaps, or gone on with
    begun = sorted(folder.glob(f"{own}-????-??-??-{short}"))
    return begun[-1] if begun else folder / f"{own}-{environment['date'][:10]}-{short}"


def note_environment(folder: Path, environment: Mapping[str, Any], **seconds: float) -> None:
    """Write of what machine a folder's results are, and what each took to measure.

    What differs from run to run, a command and its threads, is in the rows alone.
    """
    about = {name: environment[name] for name in ENVIRONMENT_COLUMNS}
    for name in ("command", "threads"):
        del about[name]
    content = {**about, "seconds": {**seconds_of(folder), **seconds}}
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(folder / ENVIRONMENT, lambda path: _write(path, text))


def seconds_of(folder: Path) -> dict[str, float]:
    """What each of a folder's results took to measure, where that is known."""
    path = folder / ENVIRONMENT
    if not path.exists():
        return {}
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    return found


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
