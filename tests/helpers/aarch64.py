"""The compiled loops as aarch64 has them, called from here: cross-compiled, run by qemu.

Every call's memory goes there and comes back: all tensors that there are, the structures and
arrays that are handed in, at addresses where neither qemu nor its guest has anything. So the tests
of the loops, which know nothing of it, test aarch64's.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
import struct
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from effdense.backends import cpu_library

COMPILER = "aarch64-linux-gnu-gcc"
EMULATOR = next(filter(shutil.which, ("qemu-aarch64", "qemu-aarch64-static")), None)
_SMALL = 1 << 40
# of the file's two parts of fixed length
_INTEGERS, _DOUBLES = 24, 8


def missing() -> str:
    """What is not installed, as Debian's packages; empty where nothing is."""
    absent = [] if shutil.which(COMPILER) else ["gcc-aarch64-linux-gnu"]
    absent += [] if EMULATOR else ["qemu-user"]
    return " ".join(absent)


def program(real: str, folder: Path) -> Path:
    """replay.c with the loops of one type, for aarch64."""
    target = folder / f"replay-{real}"
    source = Path(__file__).with_name("replay.c")
    flags = ["-O3", "-static", "-fopenmp", *cpu_library._MATH, f"-DREAL={real}", "-Wall"]
    command = [COMPILER, *flags, "-I", str(cpu_library._SOURCES), "-o", str(target), str(source)]
    subprocess.run(command, check=True)
    return target


class Emulated:
    """Takes the place of :class:`effdense.backends.cpu_library.Library`."""

    def __init__(self, replay: Path) -> None:
        self._replay = replay
        self.called: set[str] = set()

    def call(self, name: str, *arguments: Any) -> None:
        self.called.add(name)
        regions: dict[int, int] = {}
        with warnings.catch_warnings():
            # of objects that warn when they are asked for their class
            warnings.simplefilter("ignore")
            alive = [each for each in gc.get_objects() if type(each) in _TENSORS]
        for tensor in [*alive, *(a for a in arguments if isinstance(a, torch.Tensor))]:
            if tensor.device.type == "cpu" and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage.nbytes():
                    regions[storage.data_ptr()] = storage.nbytes()
        integers, doubles, images = [], [], {}
        for argument in arguments:
            if isinstance(argument, float):
                doubles.append(argument)
                continue
            value = 0 if argument is None else argument
            if isinstance(argument, (ctypes.Structure, ctypes.Array)):
                value = ctypes.addressof(argument)
                images[value] = _there(argument)
            elif isinstance(argument, torch.Tensor):
                value = argument.data_ptr()
            elif isinstance(argument, ctypes.c_void_p):
                value = argument.value or 0
            integers.append(_place(value))
        assert len(integers) <= _INTEGERS
        assert len(doubles) <= _DOUBLES
        integers += [0] * (_INTEGERS - len(integers))
        doubles += [0.0] * (_DOUBLES - len(doubles))
        with tempfile.NamedTemporaryFile() as file:
            head = struct.pack("64s24q8d", name.encode(), *integers, *doubles)
            file.write(head + struct.pack("q", len(regions) + len(images)))
            for address, size in regions.items():
                file.write(struct.pack("qq", _place(address), size))
                file.write(ctypes.string_at(address, size))
            for address, image in images.items():
                file.write(struct.pack("qq", _place(address), len(image)) + image)
            file.flush()
            done = subprocess.run(
                [str(EMULATOR), str(self._replay), file.name], capture_output=True, text=True
            )
            if done.returncode != 0:
                raise RuntimeError(f"{name} on aarch64: {done.returncode} {done.stderr}")
            file.seek(len(head) + 8)
            for address, size in regions.items():
                file.seek(16, 1)
                ctypes.memmove(address, file.read(size), size)


_TENSORS = {torch.Tensor, torch.nn.Parameter}


def _place(value: int) -> int:
    """Where an address is there; numbers, which are small, stay."""
    return value if value < _SMALL else value % _SMALL + (1 << 45)


def _there(given: ctypes.Structure | ctypes.Array[Any]) -> bytes:
    """A structure's or an array's bytes, its pointers as they are there."""
    image = bytearray(bytes(given))
    for offset in _pointers(type(given)):
        (address,) = struct.unpack_from("Q", image, offset)
        struct.pack_into("Q", image, offset, _place(address))
    return bytes(image)


def _pointers(kind: Any) -> list[int]:
    """Where in a type its pointers are."""
    if kind is ctypes.c_void_p:
        return [0]
    if issubclass(kind, ctypes.Structure):
        return [
            getattr(kind, field[0]).offset + place
            for field in kind._fields_
            for place in _pointers(field[1])
        ]
    if issubclass(kind, ctypes.Array):
        size = ctypes.sizeof(kind._type_)
        return [i * size + place for i in range(kind._length_) for place in _pointers(kind._type_)]
    return []
