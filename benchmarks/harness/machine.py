"""What the machine has, what this process uses of it, and a record of both."""

from __future__ import annotations

import contextlib
import datetime
import platform
import resource
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from effdense.memory_sizes import available_bytes as available_bytes
from effdense.memory_sizes import peak_resident_bytes as peak_resident_bytes
from effdense.memory_sizes import private_bytes, total_bytes
from effdense.memory_sizes import resident_bytes as resident_bytes

from .case import usable_cores

ROOT = Path(__file__).resolve().parents[2]


def reset_peak_resident() -> bool:
    """Start the peak again from the present; False where the system doesn't let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


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


def environment(device: str, threads: int) -> dict[str, Any]:
    """What a figure depends on besides its case: machine, versions, revision, command."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": threads,
        "memory_bytes": total_bytes(),
        "gpu": _gpu(device),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **_versions(),
        "git_revision": _git_revision(),
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def headline(environment: dict[str, Any]) -> str:
    """The environment in one line, for the top of a table."""
    gpu = f"{environment['gpu']}, " if environment["gpu"] else ""
    return (
        f"{gpu}{environment['processor']}, {environment['threads']} threads of "
        f"{environment['cores']} cores, {environment['memory_bytes'] / 2**30:.1f} GiB, "
        f"torch {environment['torch']}, Python {environment['python']}, "
        f"effdense {environment['effdense']} ({environment['git_revision']})"
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu(device: str) -> str:
    if not device.startswith("cuda"):
        return ""
    import torch

    return torch.cuda.get_device_name(device)


@lru_cache
def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import effdense

    found = {"torch": torch.__version__, "effdense": effdense.__version__}
    for package in ("torchvision", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    found["cuda"] = torch.version.cuda or ""
    return found


@lru_cache
def _git_revision() -> str:
    """Short revision, with "+" where the library or its benchmarks have uncommitted changes."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        revision = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", "effdense", "kernels", "benchmarks")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision + ("+" if changed else "")
