"""What the values of a run's options may be, and which of them go together.

Importing this imports no torch: a mistaken value is answered at once.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UserError
from ..machine.sizes import parse_size
from .recipes import FILES, OWN, RECIPES


def check_types(options: Any) -> None:
    """See that the fields of a dataclass are of their types: in Python they may be anything.

    Raises:
        UserError: for the first that is not.
    """
    for name, hint in get_type_hints(type(options)).items():
        value = getattr(options, name)
        # what comes from Python has its own shape
        if options.data == OWN and name in ("data", "spatial_dims", "crop"):
            continue
        if not _fits(value, hint):
            raise UserError(f"{_flag(name)} must be {_words(hint)}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return type(value) in {type(one) for one in inside} and value in inside
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is tuple:
        each = inside[:1] * len(value) if isinstance(value, tuple) and ... in inside else inside
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    """What a value of the type is called."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, inside))
    if origin in (Union, types.UnionType):
        return " or ".join(_words(one) for one in inside)
    if origin is tuple:
        return f"{'several' if ... in inside else len(inside)}, each {_words(inside[0])}"
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    return {**names, Path: "a path", type(None): "None"}[hint]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


# What each value of these options must be, and how that is said. None is left out, and so is what
# a whole number can be at most, which is the same for all.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "epochs batch_size image_size depth growth_rate threads keep_checkpoints accumulate",
        lambda n: n >= 1,
        "at least 1",
    ),
    (
        "num_workers system_interval checkpoint_steps checkpoint_minutes max_skipped hang_timeout "
        "patience seed lr_batch_size",
        lambda n: n >= 0,
        "at least 0",
    ),
    ("ema momentum label_smoothing drop_rate", lambda x: 0 <= x < 1, "in [0, 1)"),
    ("val_fraction", lambda x: 0 < x < 1, "in (0, 1)"),
    ("lr head_lr_factor", lambda x: 0 < x < math.inf, "a positive number"),
    ("clip_grad weight_decay warmup_epochs", lambda x: 0 <= x < math.inf, "a number, at least 0"),
    ("weights freeze best_by image_column split_column", bool, "a name, and not empty"),
    ("model", lambda text: ":" in text.strip(":"), "MODULE:CALLABLE"),
    ("model_args", _is_object, "a JSON object such as '{\"spatial_dims\": 3}'"),
    (
        "milestones",
        lambda fractions: fractions and all(0 < one < 1 for one in fractions),
        "fractions between 0 and 1, at least one",
    ),
    ("label_columns", lambda names: names and all(names), "names of columns, at least one"),
    (
        "window",
        lambda ends: -math.inf < ends[0] < ends[1] < math.inf,
        "two numbers, the lower one first",
    ),
    ("spacing", lambda sizes: all(0 < s < math.inf for s in sizes), "three positive numbers"),
    ("crop", lambda sizes: all(0 < s <= LARGEST_SIZE for s in sizes), "three positive numbers"),
    ("channels", lambda n: n in (1, 3), "1 or 3"),
    # larger ones are slips, which would take all memory, or the machine's processes
    ("image_size growth_rate", lambda n: n <= LARGEST_SIZE, "at most 65,536"),
    ("depth", lambda n: n <= 10 * LARGEST_SIZE, "at most 655,360"),
    ("threads num_workers", lambda n: n <= 4096, "at most 4,096"),
)
LARGEST_SIZE = 65_536
# What whole numbers are kept as in tensors.
_LARGEST_INT = 2**63 - 1


def check(config: Any, world_size: int) -> None:
    """See that a run's values can be, alone and together.

    Args:
        config: its resolved options.
        world_size: processes in all.

    Raises:
        UserError: for what cannot be; names the option.
    """

    def require(met: bool, option: str, what: str) -> None:
        if not met:
            value = getattr(config, option)
            got = "" if value is None else f", got {value}"
            raise UserError(f"{_flag(option)} must be {what}{got}")

    for options, is_met, what in _RANGES:
        for option in options.split():
            value = getattr(config, option)
            # what comes from Python has no image size of a file's
            if value is not None and not (config.data == OWN and option in _OF_FILES):
                require(bool(is_met(value)), option, what)
    for option in vars(config):
        value = getattr(config, option)
        if isinstance(value, int):
            require(value <= _LARGEST_INT, option, f"at most {_LARGEST_INT:,}")
    if config.budget not in (None, "auto"):
        try:
            parse_size(config.budget)
        except ValueError as error:
            raise UserError(f"--budget {error}") from None
    require(not config.model_args or bool(config.model), "model_args", "left out without --model")
    against = {
        "--accumulate": config.accumulate > 1,
        "--clip-grad": config.clip_grad > 0,
        "--non-finite skip": config.non_finite == "skip",
        "--dtype float16": config.dtype == "float16",
        "--cuda-graphs on": config.cuda_graphs == "on",
        "several processes": world_size > 1,
    }
    found = [option for option, given in against.items() if given]
    if config.step_in_backward and found:
        raise UserError(
            f"--step-in-backward does not go with {found[0]}, which needs all gradients at once"
        )
    require(
        config.batch_size >= world_size,
        "batch_size",
        f"at least {world_size}, one image for each of the {world_size} processes",
    )
    if config.data != OWN:
        _check_data(config, require)


# What data from Python may have of a kind of its own.
_OF_FILES = ("image_size", "channels", "crop")


def _check_data(config: Any, require: Callable[[bool, str, str], None]) -> None:
    """What follows from the name of a data set."""
    volumes, files, data = config.spatial_dims == 3, config.data in FILES, config.data
    if volumes:
        require(config.augment in ("paper", "none"), "augment", "paper or none for volumes")
        grey = data in ("imagefolder", "csv") and config.channels == 1
        require(grey, "spatial_dims", "2 but for imagefolder and csv, and one channel")
    else:
        for option in ("spacing", "crop"):
            absent = getattr(config, option) is None
            require(absent, option, "three positive numbers, with --spatial-dims 3")
    if not files:
        for option, usual in {"channels": 3, "window": None, "normalization": "imagenet"}.items():
            as_usual = getattr(config, option) == usual
            require(as_usual, option, f"left out: {data} is no set of image files")
        sized = data == "fake" or config.image_size == RECIPES[data].image_size
        require(sized, "image_size", f"left out for {data}, whose images have one size")
    if data in ("digits", "fake"):
        trivial = config.augment == "trivial-augment"
        what = f"something else for {data}, which has no pictures of 8 bits"
        require(not trivial, "augment", what)
    listed = (config.table is None) == (data != "csv")
    require(listed, "table", "given with --data csv, and only then")
    one_class = config.task != "multilabel" or data == "csv"
    require(one_class, "task", f"left out: {data} has one class an image")
    normalized = config.normalization == "measured" or config.channels == 3
    require(normalized, "normalization", "measured for one channel")
    downloaded = not config.download or data in ("cifar10", "cifar100", "svhn")
    require(downloaded, "download", f"left out: {data} is not something to download")
