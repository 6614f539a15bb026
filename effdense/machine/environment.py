"""What the machine has, which versions run on it, and a record of both for results and reports."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ..version import __version__
from .memory import total_bytes

_PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "scikit-learn",
    "nvidia-ml-py",
)


def cache_folder(name: str) -> Path:
    """``$XDG_CACHE_HOME/effdense/NAME``, for what is made once per machine.

    Of a user without a home, as in some containers, a folder of this process alone.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    if not cache:
        try:
            cache = str(Path.home() / ".cache")
        except RuntimeError:
            cache = _own_folder()
    return Path(cache) / "effdense" / name


@lru_cache(maxsize=1)
def _own_folder() -> str:
    # nobody else may write where libraries are loaded from
    return tempfile.mkdtemp(prefix="effdense-")


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The CPU's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@lru_cache
def versions() -> dict[str, str]:
    """Versions of Python, the system and the packages that a result may depend on."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    # what runs, whatever was installed or built from these files before
    found["effdense"] = __version__
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def source_revision() -> str | None:
    """The git commit this package is run from, with "+changes" if it differs; None if none.

    None too when it is installed and merely lies inside some other repository.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def short_revision() -> str:
    """:func:`source_revision` for one line: twelve digits, and "+" for changes."""
    revision = source_revision()
    if revision is None:
        return "unknown"
    return revision[:12] + ("+" if revision.endswith("+changes") else "")


def environment(device: str, threads: int) -> dict[str, Any]:
    """What a figure depends on besides its case: machine, versions, revision, command."""
    import torch

    found = versions()
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "threads": threads,
        "memory_bytes": total_bytes(),
        "gpu": gpu,
        "os": f"{platform.system()} {platform.machine()}",
        "python": found["python"],
        "torch": torch.__version__,
        "torchvision": found.get("torchvision", ""),
        "triton": found.get("triton", ""),
        "effdense": found.get("effdense", ""),
        "cuda": torch.version.cuda or "",
        "git_revision": short_revision(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def threads_in_words(number: int | str) -> str:
    """Such as "1 thread", "1 or 2 threads"."""
    return f"{number} thread{'' if str(number) == '1' else 's'}"


def headline(environment: dict[str, Any]) -> str:
    """The environment in one line, for the top of a table."""
    gpu = f"{environment['gpu']}, " if environment["gpu"] else ""
    return (
        f"{gpu}{environment['processor']}, {threads_in_words(environment['threads'])} of "
        f"{environment['cores']} cores, {environment['memory_bytes'] / 2**30:.1f} GiB, "
        f"torch {environment['torch']}, Python {environment['python']}, "
        f"effdense {environment['effdense']} ({environment['git_revision']})"
    )
