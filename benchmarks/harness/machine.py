"""Limits that a measurement sets its process; for what the machine has: effdense.machine."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

from effdense.machine.environment import environment as environment
from effdense.machine.environment import headline as headline
from effdense.machine.memory import available_bytes as available_bytes
from effdense.machine.memory import private_bytes


def limit_memory(nbytes: int) -> None:
    """Make allocations beyond ``nbytes`` more than now fail in this process."""
    private = private_bytes()
    if private is None:
        raise OSError("memory can only be limited on Linux")
    limit = private + nbytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def volunteer_for_the_oom_killer() -> None:
    """When the machine runs out, this process is to die rather than whoever started it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
