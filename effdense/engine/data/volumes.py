"""Volumes of CT and MR: NIfTI by MONAI's reader, and NumPy's files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from .pixels import Window, windowed

VOLUMES = (".nii", ".nii.gz", ".npy")


class VolumeReader:
    """Reads a file as (1, X, Y, Z) in float32: NIfTI's axes to the right, front and top.

    Args:
        spacing: what NIfTI is resampled to, millimetres along each axis; None: as it is.
        window: the values that become 0 and 255; None: they stay what they are.

    Raises:
        UserError: where MONAI or nibabel is missing.
    """

    def __init__(self, spacing: Sequence[float] | None, window: Window | None) -> None:
        try:
            import nibabel  # noqa: F401
            from monai import transforms
        except ImportError as error:
            raise UserError(
                f"--spatial-dims 3 reads volumes with MONAI and nibabel: {error}; "
                f"pip install 'effdense[volumes]'"
            ) from None
        steps: list[Any] = [
            transforms.LoadImage(
                reader="NibabelReader", image_only=True, ensure_channel_first=True
            ),
            # the labels are what they have been; to be named since MONAI 1.5
            transforms.Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
        ]
        if spacing is not None:
            steps.append(transforms.Spacing(tuple(spacing)))
        self._nifti, self._spacing, self._window = transforms.Compose(steps), spacing, window

    def __call__(self, path: Path) -> Tensor:
        """The volume.

        Raises:
            UserError: for a file that is no single volume. Anything else: it cannot be read.
        """
        if path.suffix == ".npy":
            if self._spacing is not None:
                raise UserError(f"{path} does not say its spacing: leave out --spacing")
            volume = torch.from_numpy(np.load(path).astype(np.float32)).unsqueeze(0)
        else:
            volume = torch.as_tensor(self._nifti(str(path)).numpy(), dtype=torch.float32)
        if volume.ndim != 4 or len(volume) != 1:
            shape = tuple(volume.shape[1:] if len(volume) == 1 else volume.shape)
            raise UserError(f"{path} is not one volume of three axes, but {shape}")
        return volume if self._window is None else windowed(volume, self._window)


def centred(shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """The middle of a volume, zeros where it ends before."""
    from monai.transforms import ResizeWithPadOrCrop

    return partial(_applied, ResizeWithPadOrCrop(tuple(shape)))


def drawn(shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """A part of a volume, mirrored along any of its axes, as torch's global generator draws."""
    from monai import transforms

    steps = [
        transforms.SpatialPad(tuple(shape)),
        transforms.RandSpatialCrop(tuple(shape), random_size=False),
        *(transforms.RandFlip(prob=0.5, spatial_axis=axis) for axis in range(3)),
    ]
    return partial(_applied, transforms.Compose(steps))


def _applied(transform: Any, volume: Tensor) -> Tensor:
    if hasattr(transform, "set_random_state"):
        transform.set_random_state(int(torch.randint(2**31, ())))
    # without what MONAI remembers of it
    return torch.from_numpy(transform(volume).numpy().copy())
