"""loops/ as a loaded library: compiled on this machine at first use, then cached.

The compiler is ``$CC``, else cc, gcc or clang, with ``-march=native``; the cache is
"effdense/loops" in the user's cache directory (``$XDG_CACHE_HOME``, else ~/.cache), one
file per source, compiler command and processor, written whole or not at all. Where
there is no compiler, :func:`load` says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..errors import first_line
from ..machine.environment import cache_folder

_SOURCES = Path(__file__).parent / "loops"
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
# Neither changes a result: nobody reads errno or traps, and loops vectorise without them.
_MATH = ("-fno-math-errno", "-fno-trapping-math")
_REAL = {torch.float32: "float", torch.float64: "double"}

DTYPES = tuple(_REAL)
"""The matrices there are loops for."""


class CannotLoad(Exception):
    """Why there are no compiled loops on this machine."""


class Library:
    """The functions of loops/ for one type."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._library = functions
        self._functions: dict[str, Any] = {}

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function.

        Numbers are 64-bit integers or doubles; tensors, structures, arrays, addresses (which
        are integers too) and None are pointers. What an argument is never changes.
        """
        function = self._functions.get(name)
        if function is None:
            function = getattr(self._library, name)
            function.argtypes = [_KINDS.get(type(a), ctypes.c_void_p) for a in arguments]
            function.restype = None
            # last: another thread may be waiting for it
            self._functions[name] = function
        given = [a if type(a) in _AS_GIVEN else _pointer(a) for a in arguments]
        if torch.autograd._profiler_enabled():
            # no operation of torch's, so a profiler wouldn't see it
            shapes = [tuple(a.shape) for a in arguments if isinstance(a, torch.Tensor)]
            with torch.profiler.record_function(f"effdense::{name}", str(shapes)):
                function(*given)
        else:
            function(*given)


_KINDS = {int: ctypes.c_int64, float: ctypes.c_double}
_AS_GIVEN = {int, float, type(None), ctypes.c_void_p}


def _pointer(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return ctypes.byref(value) if isinstance(value, ctypes.Structure) else value


@functools.cache
def load(dtype: torch.dtype) -> Library:
    """The library for matrices of ``dtype``.

    Raises:
        CannotLoad: without a working C compiler with OpenMP.
    """
    try:
        return Library(ctypes.CDLL(str(_compiled(_REAL[dtype]))))
    except OSError as error:
        raise CannotLoad(f"the compiled loops can't be loaded: {error}") from error


def is_compiled(dtype: torch.dtype) -> bool:
    """Whether :func:`load` need not compile, or cannot."""
    with contextlib.suppress(CannotLoad):
        return _target(_REAL[dtype])[0].exists()
    return True


def _target(real: str) -> tuple[Path, list[str]]:
    """Where the library is kept, and the command that makes it but for its files."""
    compiler = find_compiler()
    if not compiler:
        raise CannotLoad("there is no C compiler (cc, gcc or clang on PATH, or $CC)")
    command = [*compiler, *_FLAGS, *_MATH, f"-DREAL={real}"]
    identity = [
        *[path.read_text() for path in sorted(_SOURCES.glob("*.[ch]"))],
        *command,
        _processor(),
    ]
    key = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]
    return cache_folder("loops") / f"{real}-{key}.so", command


def _compiled(real: str) -> Path:
    target, command = _target(real)
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        directory = tempfile.mkdtemp(dir=target.parent)
    except OSError:
        # Nothing can be kept: compiled for this process, and left to the system's cleaning.
        directory = tempfile.mkdtemp(prefix="effdense-")
        target = Path(directory) / target.name
    made = Path(directory) / "made.so"
    try:
        subprocess.run(
            [*command, "-o", made, _SOURCES / "loops.c"], check=True, capture_output=True, text=True
        )
        made.replace(target)
    except subprocess.CalledProcessError as error:
        said = first_line(error.stderr or f"exit status {error.returncode}")
        raise CannotLoad(f"{command[0]} failed: {said}") from error
    except OSError as error:
        raise CannotLoad(f"{command[0]} or the cache failed: {error}") from error
    finally:
        if Path(directory) != target.parent:
            shutil.rmtree(directory, ignore_errors=True)
    return target


def compilers() -> list[str]:
    """Command lines of C compilers that may be there, the preferred first."""
    chosen = os.environ.get("CC")
    return [chosen] if chosen else ["cc", "gcc", "clang"]


def find_compiler() -> list[str]:
    """The words that call the first of them that is there ("ccache gcc" are two); none if none."""
    for line in compilers():
        # a path may have spaces in it
        for words in ([line], line.split()):
            path = shutil.which(words[0]) if words else None
            if path is not None:
                return [path, *words[1:]]
    return []


def _processor() -> str:
    """What ``-march=native`` depends on, for caches that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    seen = {line.partition(":")[0].strip(): line for line in lines if line.startswith(fields)}
    return platform.machine() + "".join(seen.values())
