"""Whether products of float32 are computed in TF32.

The block's products stand for convolutions, so they follow the convolutions' switch: torch
computes these in TF32 unless told otherwise, and matrix products not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def tf32_convolutions() -> bool:
    """Whether convolutions of float32 on a GPU may round their operands to TF32.

    Read once per forward. torch 2.9 and newer keep the answer in ``fp32_precision``, where
    settings of the old switch show too; to read the old one raises once a new one was set.
    """
    convolutions = getattr(torch.backends.cudnn, "conv", None)
    found = getattr(convolutions, "fp32_precision", None)
    if found is None:
        return bool(torch.backends.cudnn.allow_tf32)
    return bool(found == "tf32")


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Inside, convolutions and matrix products of float32 may round to TF32, or may not.

    Settings are as before after.

    The old switches are not touched where there are new ones: to read or write one of them
    raises where the user mixed them.
    """
    convolutions = getattr(torch.backends.cudnn, "conv", None)
    products = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(convolutions, "fp32_precision") else "allow_tf32"
    owners = (
        (convolutions, products) if name == "fp32_precision" else (torch.backends.cudnn, products)
    )
    words: tuple[Any, Any] = ("ieee", "tf32") if name == "fp32_precision" else (False, True)
    before = [getattr(owner, name) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, name, words[tf32])
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            setattr(owner, name, value)
