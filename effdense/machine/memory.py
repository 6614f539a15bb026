"""Memory that the machine has, and that this process takes."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path


def available_bytes(device: str = "cpu") -> int:
    """What a new process can take of a device's memory now, control groups respected."""
    if device != "cpu":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return min([_available_of_machine(), *_available_of_groups()])


def total_bytes(device: str = "cpu") -> int:
    """All memory of a device that this machine or control group has."""
    if device != "cpu":
        import torch

        return torch.cuda.mem_get_info(device)[1]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(limit for limit, _ in groups())])


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return _status_bytes("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Most resident memory of this process since its start or the last reset.

    On Linux not ``ru_maxrss``: that one survives exec, so a child of a large process
    would start with its parent's figure.
    """
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    import resource  # there is none on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def limit_memory(nbytes: int) -> None:
    """Make allocations beyond ``nbytes`` more than now fail in this process.

    Raises:
        OSError: where the system has no such limit.
    """
    private = _status_bytes("VmData")
    if private is None:
        raise OSError("memory can only be limited on Linux")
    import resource  # there is none on Windows

    limit = private + nbytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def volunteer_for_the_oom_killer() -> None:
    """When the machine runs out, this process is to die rather than whoever started it."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _available_of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _available_of_groups() -> list[int]:
    return [max(0, limit - used) for limit, used in groups()]


def groups(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """(limit, use) in bytes of every control group this process is in that has a limit.

    File cache that the kernel would give back is not counted as used.
    """
    found: list[tuple[int, int]] = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        # Inside a container the path may be the host's; the group's own files are at the root.
        for folder in dict.fromkeys([group, *group.parents]):
            if folder != base and base not in folder.parents:
                break
            limit, used = _read_int(folder / names[0]), _read_int(folder / names[1])
            # v1 writes "no limit" as a number near 2^63
            if limit is None or used is None or limit > 1 << 60:
                continue
            found.append((limit, used - _cache_bytes(folder / "memory.stat", names[2])))
    return found


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _cache_bytes(path: Path, field: str) -> int:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == field:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
