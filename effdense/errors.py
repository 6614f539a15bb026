"""What may go wrong in a run, and how the command line says so.

Importing this imports no torch: a mistyped option is answered at once.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

# torchrun ends the other processes within a second of the first one's exit.
_GRACE_SECONDS = 10.0


def spelled_shape(channels: int, dimensions: int) -> str:
    """An input's shape as torch's documentation spells it: (N, 3, H, W) for 3 channels, 4-D."""
    spatial = {3: "L", 4: "H, W", 5: "D, H, W"}.get(dimensions, "*")
    return f"(N, {channels}, {spatial})"


class UserError(ValueError):
    """A mistake of the user's, whose message says how to mend it; exit status 2."""


class TrainingError(RuntimeError):
    """A run that cannot go on, such as a loss that is not a number; exit status 1."""


class Interrupted(RuntimeError):
    """A run that was told to stop and can be gone on with; exit status 75.

    That is EX_TEMPFAIL of sysexits.h, "try again later": what a batch system should requeue.
    """

    work_dir: str = ""
    """The folder of the run, on the process that speaks."""


REQUEUE_STATUS = 75


def first_line(said: BaseException | str) -> str:
    """The first line of a message, at most 300 characters; of an exception without, its kind."""
    lines = str(said).strip().splitlines() or [type(said).__name__]
    return lines[0][:300]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn :class:`UserError` and :class:`TrainingError` into one line on standard error.

    Both are raised on every process at the same point (see
    :func:`effdense.engine.distributed.all_or_none`), so rank 0 speaks for all. The others wait
    until the launcher, which sees rank 0 end, ends them: torchrun would otherwise stop rank 0
    as soon as any of them is gone, perhaps before it has spoken. One that nobody ends, because
    rank 0 is well or on another machine, speaks for itself.

    Any other exception is a defect: its traceback is printed and, where there are several
    processes, this one ends at once, without the clean-up that could wait for a process that
    is stuck in a collective.
    """
    try:
        yield
    except (UserError, TrainingError) as error:
        status = 2 if isinstance(error, UserError) else 1
        message = " ".join(str(error).split())
        if speaks_for_all():
            sys.stdout.flush()
            print(f"error: {message}", file=sys.stderr, flush=True)
        else:
            time.sleep(_GRACE_SECONDS)
            print(f"error: {message}", file=sys.stderr, flush=True)
        _exit(status)
    except Interrupted as error:
        # Every process ends by itself, with the same status, after rank 0 has spoken.
        if speaks_for_all():
            sys.stdout.flush()
            print(error, file=sys.stderr, flush=True)
        _exit(REQUEUE_STATUS)
    except KeyboardInterrupt:
        if speaks_for_all():
            print("interrupted", file=sys.stderr, flush=True)
        _exit(130)
    except BrokenPipeError:
        # whoever read, such as head, has read enough; Python's own flush at exit would say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(1)
    except Exception:
        traceback.print_exc()
        _exit(1)


def speaks_for_all() -> bool:
    """Whether this process is rank 0, the one that prints."""
    return int(os.environ.get("RANK", "0")) == 0


def _exit(status: int) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
