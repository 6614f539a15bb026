"""One run at a time in a work directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from pathlib import Path

from ..errors import UserError


class Lock:
    """A lock on ``folder``, held until it is released or the process has ended, however it ends.

    A POSIX record lock: loader processes, which are forks, don't inherit it, so that a killed
    run is not kept alive by an orphan; and it holds across machines on NFS.

    Raises:
        UserError: where another process holds it; says which. Where the file system has no
            locks. OSError: where the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._descriptor, 4096)
            self.release()
            # what POSIX has for a lock that another process holds; all else says nothing of one
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"cannot lock {folder}: {error.strerror}; choose a --work-dir on another file "
                    f"system, as without locks two runs could write into one folder"
                ) from None
            raise UserError(
                f"another run is at work in {folder}{_who(holder)}: choose another --work-dir, or "
                f"stop that run first"
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.write(
            self._descriptor,
            json.dumps({"process": os.getpid(), "machine": platform.node()}).encode(),
        )

    def release(self) -> None:
        """Let others have the folder."""
        os.close(self._descriptor)


def _who(holder: bytes) -> str:
    try:
        facts = json.loads(holder)
        return f" (process {facts['process']} on {facts['machine']})"
    except (ValueError, KeyError, TypeError):
        return ""
