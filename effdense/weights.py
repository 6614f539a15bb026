"""Weights from files of many kinds, read without running anybody's code.

safetensors, of https://github.com/huggingface/safetensors: the length of the header in 8 bytes,
little-endian; the header in JSON, for each tensor its dtype, shape and where its bytes are; the
bytes.

What ``torch.save`` wrote may name any function to be called on loading. State dicts need none;
for pickled modules and checkpoints that hold other objects, those are replaced by inert ones
that keep what would have been their state, in which the tensors are found.
"""

from __future__ import annotations

import collections
import json
import math
import operator
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError, first_line

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
_NO_WEIGHTS = "it is not what torch.save or safetensors writes"
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Under which checkpoints keep a state dict, and what wrappers put before its names.
_KEYS = ("state_dict", "model_state_dict", "model", "network", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.")


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


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; nothing of any other file.

    Raises:
        UserError: if it is missing.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            # a file of another kind may mean anything by its first bytes
            header = json.loads(file.read(length)) if length < os.path.getsize(path) else {}
        return dict(header.get("__metadata__", {}))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, TypeError, AttributeError, struct.error, RecursionError):
        return {}


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
            dtype, shape = _DTYPES[about["dtype"]], [operator.index(n) for n in about["shape"]]
            if min([begin - 8 - length, *shape]) < 0 or end > len(content):
                raise ValueError
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError
            piece = content[begin:end]
            flat = torch.frombuffer(piece, dtype=dtype) if piece else torch.empty(0, dtype=dtype)
            tensors[name] = flat.view(shape)
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no weights: there is no {path.name}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, struct.error, RecursionError):
        raise UserError(f"cannot read {path}: it is not a safetensors file") from None
    except RuntimeError as error:
        # sizes that no tensor has
        raise UserError(f"cannot read {path}: {first_line(error)}") from None
    return tensors


def read_weights(source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A state dict from a file, or from a run's work directory.

    Args:
        source: a safetensors file; what ``torch.save`` made of a state dict, of a checkpoint
            that holds one (``{"state_dict": ...}``, ``{"model": ...}``) or of a module; or a
            directory with ``model.safetensors``. Prefixes of wrappers (``module.``) are taken
            off.

    Raises:
        UserError: where there is none; the message says what there is.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix == ".safetensors":
        return _without_prefix(read_safetensors(path))
    try:
        _refuse_archive(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        found = _inertly_loaded(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:
        raise UserError(f"cannot read {path}: {_NO_WEIGHTS} ({first_line(error)})") from None
    state = _state_in(found)
    if state is None:
        kind = f"a {type(found).__name__}"
        if isinstance(found, Mapping):
            kind = f"entries {', '.join(map(repr, list(found)[:6]))}"
        raise UserError(f"{path} holds {kind}, and no state dict among them")
    return _without_prefix(state)


# Old files lack the counters; the thresholds of torchxrayvision's published models are no weights.
_PASSED_OVER = ("num_batches_tracked", "op_threshs")
# torchvision's published files carry the names of its first release (norm.1, conv.2).
_FIRST_RELEASE = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)$")


def fitted(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], head: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of one network for another that differs from it in no more than may differ.

    That is the channels of the first convolution; two spatial dimensions where three are wanted;
    the number of classes; and names, where all tensors have the same kinds and shapes in the same
    order.

    Args:
        state: the weights.
        wanted: the state dict of the network that is to have them.
        head: the name of its classifier there.

    Returns:
        A state dict of the names and shapes of ``wanted``, and what is to be said about it.

    Raises:
        ValueError: where they differ in more; says in what.
    """
    state = {_FIRST_RELEASE.sub(r"\1\2", name): tensor for name, tensor in state.items()}
    said: list[str] = []
    names = [name for name in wanted if not name.endswith(_PASSED_OVER)]
    found = [name for name in state if not name.endswith(_PASSED_OVER)]
    body = [name for name in names if not name.startswith(f"{head}.")]
    own_head = next((name.rpartition(".")[0] for name in reversed(found)), head)
    if set(found) & set(body) != set(body):
        in_order = [name for name in found if not name.startswith(f"{own_head}.")]
        if [_kind(name) for name in in_order] == [_kind(name) for name in body]:
            heads = {f"{own_head}.{part}": f"{head}.{part}" for part in ("weight", "bias")}
            renamed = {**dict(zip(in_order, body, strict=True)), **heads}
            state = {renamed.get(name, name): tensor for name, tensor in state.items()}
            found = [renamed.get(name, name) for name in found]
            said.append(f"the weights are matched in their order: {in_order[0]} is {body[0]}, ...")
    first = next((name for name in names if wanted[name].dim() > 2), None)
    shaped = {
        name: _shaped(state[name], wanted[name].shape, name == first)
        for name in found
        if name in wanted
    }
    for name in names:
        if name.startswith(f"{head}.") and (
            name not in shaped or shaped[name].shape != wanted[name].shape
        ):
            if name.endswith(".weight"):
                before = f"for {len(shaped[name])} classes" if name in shaped else "without a head"
                said.append(
                    f"the weights are {before}, the {head.rpartition('.')[2]} for "
                    f"{len(wanted[name])} stays as initialised"
                )
            shaped[name] = wanted[name]
    differing = [
        name
        for name in [*names, *found]
        if name not in wanted or name not in shaped or shaped[name].shape != wanted[name].shape
    ]
    if differing:
        raise ValueError(
            f"the weights are those of {_described(state)}, not of {_described(wanted)}; "
            f"the first difference is {differing[0]}"
        )
    counters = {name: tensor for name, tensor in state.items() if name not in found}
    kept = {name: counters.get(name, tensor) for name, tensor in wanted.items()}
    return {**kept, **shaped}, said


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _shaped(tensor: Tensor, shape: torch.Size, is_first: bool) -> Tensor:
    """A weight as a network of other channels or of one dimension more wants it, if it can be."""
    if tensor.dim() == 4 and len(shape) == 5:
        # what is the same in every slice is answered as in 2-D: Carreira and Zisserman,
        # "Quo Vadis, Action Recognition?", CVPR 2017, section 2.4
        tensor = tensor.unsqueeze(2).expand(-1, -1, shape[2], -1, -1) / shape[2]
    if is_first and tensor.dim() == len(shape) and tensor.shape[1] != shape[1]:
        tensor = for_channels(tensor, shape[1])
    return tensor


def for_channels(weight: Tensor, channels: int) -> Tensor:
    """A first convolution's weight for another number of channels, as timm adapts it.

    One channel is as if repeated to all the old ones; for more, the old are repeated in turn and
    scaled so that the sum stays what it was.
    """
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    before = weight.shape[1]
    times = -(-channels // before)
    repeated = weight.repeat(1, times, *[1] * (weight.dim() - 2))[:, :channels]
    return repeated * (before / channels)


def _described(state: Mapping[str, Tensor]) -> str:
    """A state dict in a few words."""
    layers: dict[str, set[str]] = {}
    for name in state:
        found = re.search(r"features\.denseblock(\d+)\.denselayer(\d+)\.", name)
        if found:
            layers.setdefault(found[1], set()).add(found[2])
    if not layers:
        return f"something else ({len(state)} tensors, the first {next(iter(state), None)})"
    counts = ", ".join(str(len(layers[block])) for block in sorted(layers, key=int))
    last = state.get("features.denseblock1.denselayer1.conv2.weight")
    if last is None:
        last = state.get("features.denseblock1.denselayer1.conv1.weight")
    growth = "" if last is None else f" of {last.shape[0]} features"
    return f"a DenseNet with blocks of {counts} layers{growth}"


def _state_in(found: Any) -> dict[str, Tensor] | None:
    if isinstance(found, _Inert):
        return _state_of(found.__dict__) or None
    if not isinstance(found, Mapping):
        return None
    for key in _KEYS:
        if key in found and not isinstance(found[key], Tensor):
            state = _state_in(found[key])
            if state is not None:
                return state
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    return tensors if tensors and len(tensors) == len(found) else None


def _state_of(own: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a module from its attributes."""
    state = {}
    for held in ("_parameters", "_buffers"):
        for name, tensor in (own.get(held) or {}).items():
            if isinstance(tensor, Tensor):
                state[prefix + name] = tensor.detach()
    for name, child in (own.get("_modules") or {}).items():
        if isinstance(child, _Inert):
            state |= _state_of(child.__dict__, f"{prefix}{name}.")
    return state


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while state:
        prefix = next((p for p in _PREFIXES if all(n.startswith(p) for n in state)), None)
        if prefix is None:
            break
        state = {name[len(prefix) :]: tensor for name, tensor in state.items()}
    return state


class _Inert:
    """In place of an object whose class is not loaded: its state, and nothing done with it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.__dict__.update({str(name): value for name, value in part.items()})

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def append(self, *args: Any) -> None:
        """What pickles of list subclasses ask for."""

    extend = __setitem__ = append


class _InertUnpickler(pickle.Unpickler):
    """Makes tensors and the containers of a state dict; anything else is inert."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
            ("torch", "Size"): torch.Size,
            ("builtins", "set"): set,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name)
        return type(name, (_Inert,), {})


class _InertPickle:
    """What ``torch.load`` asks of a pickle module."""

    Unpickler = _InertUnpickler
    UnpicklingError = pickle.UnpicklingError
    __name__ = "inert"

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _InertUnpickler(file, **options).load()


def _inertly_loaded(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", pickle_module=_InertPickle, weights_only=False)
    except Exception as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"cannot read {path}: {_NO_WEIGHTS} ({said})") from None


def _refuse_archive(path: Path) -> None:
    """Refuse what unpacks to more than it is, or holds code, before anything is unpacked."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.filename.split("/")[1:2] == ["constants.pkl"] for entry in entries):
        raise UserError(
            f"cannot read {path}: it is a TorchScript archive, whose code is not run here; save "
            "its state_dict() by torch.save"
        )
    unpacked = sum(entry.file_size for entry in entries)
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or unpacked > path.stat().st_size:
        raise UserError(
            f"cannot read {path}: it unpacks to {unpacked:,} bytes, which torch.save's files, "
            "being no larger than they are, don't; save it again by torch.save"
        )
