"""Image files as they are: what PIL opens, as a tensor that has lost nothing it should keep."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError

IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
Window = tuple[float, float]
"""The values that become 0 and 255; what lies outside is cut off."""


def pixels(
    image: Any, name: Callable[[], object], channels: int = 3, window: Window | None = None
) -> Tensor:
    """A PIL image as (channels, H, W), from 0 to 255: bytes, or float32 where it has more than 8
    bits or a window is asked for. It is turned as its EXIF data say.

    Raises:
        UserError: for values of which nobody knows what is black and white.
    """
    from PIL import ImageOps
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2 import functional

    # before it is decoded
    colours = re.search(r"\b(LA|RGBA?|RGBX|CMYK);16", str(getattr(image, "tile", "")))
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if colours and image.format != "PNG":
        raise UserError(
            f"{name()} has 16 bits for each of its colours, of which only 8 can be read here but "
            f"from PNG: write it as PNG, which keeps all 16, or in 8 bits"
        )
    if colours:
        # PIL would drop half of the bits
        image.fp.seek(0)
        content = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
        mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
        values = decode_image(content, mode, apply_exif_orientation=True)
        return windowed(values.float(), window or (0, 65535))
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F") or deep:
        if window is None and not deep:
            raise UserError(
                f"{name()} holds {'floats' if image.mode == 'F' else '32-bit numbers'}: say with "
                f"--window LOW HIGH which of them are black and white"
            )
        values = torch.from_numpy(np.asarray(image).astype(np.float32)).unsqueeze(0)
        return windowed(values, window or (0, 65535)).expand(channels, -1, -1)
    values = functional.pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
    return values if window is None else windowed(values.float(), window)


def windowed(values: Tensor, window: Window) -> Tensor:
    """``window`` stretched over 0 to 255."""
    low, high = window
    return ((values - low) * (255 / (high - low))).clamp(0, 255)


def read_pixels(path: Path, channels: int = 3, window: Window | None = None) -> Tensor:
    """:func:`pixels` of a file.

    Raises:
        UserError: as there. Anything else: it cannot be read.
    """
    from PIL import Image

    with Image.open(path) as image:
        return pixels(image, lambda: path, channels, window)
