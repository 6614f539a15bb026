"""A run's weights for others: the safetensors format, and its network used on images.

The format, of https://github.com/huggingface/safetensors: the length of the header in 8 bytes,
little-endian; the header in JSON, for each tensor its dtype, shape and where its bytes are; the
bytes. No code runs when it is read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .data.image_files import Preparation, image_preparation
from .networks import build
from .records import read_config

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    contents, end = [], 0
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().flatten()
        content = flat.view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(content)],
        }
        contents.append(content)
        end += len(content)
    described = json.dumps(header, separators=(",", ":")).encode()
    # the bytes begin at a multiple of 8
    described += b" " * (-len(described) % 8)
    return struct.pack("<Q", len(described)) + described + b"".join(contents)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: if it is missing or is not one.
    """
    try:
        content = bytearray(path.read_bytes())
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        tensors = {}
        for name, about in header.items():
            begin, end = (8 + length + offset for offset in about["data_offsets"])
            dtype, shape = _DTYPES[about["dtype"]], about["shape"]
            if end - begin != math.prod(shape) * dtype.itemsize or end > len(content):
                raise ValueError
            piece = content[begin:end]
            flat = torch.frombuffer(piece, dtype=dtype) if piece else torch.empty(0, dtype=dtype)
            tensors[name] = flat.view(shape)
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no weights: there is no {path.name}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise UserError(f"cannot read {path}: it is not a safetensors file") from None
    return tensors


@dataclass(frozen=True)
class Trained:
    """The network of a finished run, in eval mode, and what it takes and says."""

    network: nn.Module
    prepare: Preparation
    classes: Sequence[str]


def trained(work_dir: Path) -> Trained:
    """Build the network of a run with its final weights.

    Raises:
        UserError: if there is no finished run in ``work_dir``.
    """
    recorded = read_config(work_dir)
    options, classes = recorded["options"], recorded["classes"]
    prepare = image_preparation(options["data"], options["image_size"])
    network = build(options, len(classes), prepare.channels)
    network.load_state_dict(read_safetensors(work_dir / "model.safetensors"))
    return Trained(network.eval(), prepare, classes)


def images_in(paths: Sequence[Path]) -> list[Path]:
    """The image files among ``paths`` and in the folders among them, in order.

    Raises:
        UserError: if there are none.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found = []
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [p for p in inside if p.suffix.lower() in IMG_EXTENSIONS and p.is_file()]
    if not found:
        raise UserError(f"there is no image in {', '.join(map(str, paths))}")
    return found


@torch.no_grad()
def predictions(
    model: Trained, paths: Sequence[Path], batch_size: int = 64
) -> Iterator[tuple[Path, Tensor]]:
    """Each image's class probabilities (classes,).

    Raises:
        UserError: for a file that cannot be read as an image.
    """
    for begin in range(0, len(paths), batch_size):
        some = paths[begin : begin + batch_size]
        images = torch.stack([model.prepare(path) for path in some])
        yield from zip(some, model.network(images).softmax(1), strict=True)


def evaluated(model: Trained, folder: Path, batch_size: int = 64) -> tuple[float, float, int]:
    """Mean loss, error in per cent and number of the images in ``folder``/CLASS/.

    Raises:
        UserError: where a folder is not named after one of the run's classes.
    """
    numbers = {name: number for number, name in enumerate(model.classes)}
    paths = images_in([folder])
    for path in paths:
        name = path.relative_to(folder).parts[0]
        if name not in numbers or path.parent == folder:
            raise UserError(
                f"{path} is not in a folder of {folder} that is named after one of the run's "
                f"classes, {', '.join(list(numbers)[:5])}{', ...' if len(numbers) > 5 else ''}"
            )
    loss = wrong = 0.0
    for path, probabilities in predictions(model, paths, batch_size):
        label = numbers[path.relative_to(folder).parts[0]]
        loss -= float(probabilities[label].clamp_min(1e-30).log())
        wrong += int(probabilities.argmax()) != label
    return loss / len(paths), 100 * wrong / len(paths), len(paths)
