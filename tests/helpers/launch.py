"""Starting the project's scripts in processes of their own, and reading what they say."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
Launch = Callable[..., "subprocess.CompletedProcess[str]"]


def error_lines(process: subprocess.CompletedProcess[str]) -> list[str]:
    """What the run itself says went wrong; torchrun's own report is not counted."""
    return [line for line in process.stderr.splitlines() if line.startswith("error: ")]


def flags(**options: Any) -> list[object]:
    """The command line's spelling of options."""
    return [
        part for key, value in options.items() for part in (f"--{key}".replace("_", "-"), value)
    ]
