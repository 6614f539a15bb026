"""What is in a compiled kernel: registers, memory, instructions; and a record of what was found.

A compilation takes seconds and all of the audit hours. What one gave is therefore written down
at once, under a key of everything that it depends on: the kernel's source and that of all it
calls, types, constants and alignments, options, target, Triton, its assembler, and this file's
own reading. An audit that is interrupted goes on where it was, and one after a change compiles
what the change touched.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend


class Call(NamedTuple):
    """One kernel start, as the JIT would see it."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    matrices: tuple[str, ...]
    options: dict[str, int]

    def key(self) -> str:
        return repr(tuple(self))


def _kernel(call: Call) -> Any:
    return getattr(importlib.import_module(call.module), call.kernel)


def compile_call(call: Call, target: GPUTarget) -> Any:
    """The compiled kernel of ``call``, with the attributes the JIT would infer."""
    kernel = _kernel(call)
    attributes = [["tt.divisibility", 16]]
    if target.backend == "hip":
        # what is inferred for storages of less than 2 GiB
        attributes.append(["tt.pointer_range", 32])
    attrs = {(kernel.arg_names.index(name),): attributes for name in call.divisible}
    constants = {(kernel.arg_names.index(name),): v for name, v in call.constants.items()}
    source = ASTSource(kernel, call.signature, constants, attrs)
    return triton.compile(source, target=target, options=call.options)


class MachineCode(NamedTuple):
    """Of one compiled kernel.

    ``stack`` is bytes of a thread's own memory, ``spills`` instructions that reach it;
    ``shared`` bytes of a program; ``matrix`` the matrix unit's instruction, empty where there is
    none; ``loads`` and ``stores`` instructions that move 128 bits.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    matrix: str
    loads: int
    stores: int


def read(compiled: Any, target: GPUTarget) -> MachineCode:
    """What ``triton.compile`` made for ``target``."""
    if target.backend == "cuda":
        return _of_cuda(compiled.asm["cubin"], compiled.metadata.shared)
    return _of_hip(compiled.asm["amdgcn"], compiled.metadata.shared)


def _of_cuda(cubin: bytes, shared: int) -> MachineCode:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        # at once: the tool takes 0.2 s to start, half of what a compilation does
        command = [str(tool), "-res-usage", "-sass", file.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        usage, _, sass = done.stdout.partition("\tcode for ")
    registers, stack = (
        int(m.group(1)) if (m := re.search(rf"{name}:(\d+)", usage)) else -1
        for name in ("REG", "STACK")
    )
    assert registers > 0, usage
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    matrix = re.search(r"\b(UTC\w*MMA|HGMMA|HMMA)\b", sass)
    loads = len(re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*128|\bUTMALDG|\bUBLKCP", sass))
    stores = len(re.findall(r"\bSTG\.[\w.]*128|\bUTMASTG", sass))
    found = matrix.group(1) if matrix else ""
    return MachineCode(registers, stack, spills, shared, found, loads, stores)


def _of_hip(assembly: str, shared: int) -> MachineCode:
    def value(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly).group(1))  # type: ignore[union-attr]

    matrix = re.search(r"\b(v_s?mfma)_", assembly)
    loads = len(re.findall(r"\b(?:global|buffer)_load_dwordx4", assembly))
    stores = len(re.findall(r"\b(?:global|buffer)_store_dwordx4", assembly))
    # a scalar register that "spills" moves to a lane of a vector register; memory is
    # touched only where the scratch segment has a size
    stack, spills = value("private_segment_fixed_size"), value("vgpr_spill_count")
    found = matrix.group(1) if matrix else ""
    return MachineCode(value("vgpr_count"), stack, spills, shared, found, loads, stores)


def key_of(call: Call, target: GPUTarget) -> str:
    """Of one compilation, with all that it depends on.

    Triton's ``cache_key`` is a hash of the kernel's source and of all functions it calls, its
    backend's one of the target and the assembler.
    """
    parts = (
        *(triton.__version__, make_backend(target).hash(), target),
        *(sorted(get_cache_invalidating_env_vars().items()), _kernel(call).cache_key, call.key()),
    )
    own = Path(__file__).read_bytes()
    return hashlib.sha256("\n".join(map(str, parts)).encode() + own).hexdigest()


class Record:
    """What was found before, by key, in a file of which each line is one finding."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._found: dict[str, MachineCode] = {}
        for key, values in self._lines():
            # a line of other fields, or cut short with the process that wrote it
            with suppress(TypeError):
                self._found[key] = MachineCode(**values)

    def _lines(self) -> Iterable[tuple[str, dict[str, Any]]]:
        with suppress(OSError):
            for line in self.file.read_text().splitlines():
                with suppress(ValueError):
                    key, values = json.loads(line)
                    yield key, values

    def get(self, key: str) -> MachineCode | None:
        return self._found.get(key)

    def add(self, key: str, found: MachineCode) -> None:
        """Keep ``found``, on disk as well where that can be written."""
        self._found[key] = found
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # one write a line, so that several audits may add to the file
            with self.file.open("a") as file:
                file.write(json.dumps([key, found._asdict()]) + "\n")
