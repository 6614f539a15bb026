"""A step that is put back where something in it was not finite: by the device, without waiting."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# the bits of a NaN are numbers as good as any
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Undo:
    """Tensors as they are now, to be put back unless a tensor says that what came since holds.

    It takes their memory once more while it lives, and a few launches for all of them.

    Args:
        tensors: of one device; changed in place from now on.
    """

    @torch.no_grad()
    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._before = [tensor.detach().clone() for tensor in self._tensors]

    @torch.no_grad()
    def unless(self, holds: Tensor, new: Iterable[Tensor] = ()) -> None:
        """Put all back where ``holds`` () is false.

        Args:
            holds: on the device of the tensors.
            new: made since then, of zeros that were changed; they are zeros again.
        """
        known = {id(tensor) for tensor in self._tensors}
        fresh = [t for t in new if id(t) not in known and t.device == holds.device]
        by_size: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for tensor, before in zip(self._tensors, self._before, strict=True):
            pair = by_size.setdefault(tensor.element_size(), ([], []))
            pair[0].append(_bits(tensor))
            pair[1].append(_bits(before))
        for tensor in fresh:
            by_size.setdefault(tensor.element_size(), ([], []))[0].append(_bits(tensor))
        for size, (now, kept) in by_size.items():
            factor = holds.to(_BITS[size])
            # there is no foreach of where; by whole numbers the sum of one and nothing is exact
            torch._foreach_mul_(now, factor)
            if kept:
                torch._foreach_mul_(kept, 1 - factor)
                torch._foreach_add_(now[: len(kept)], kept)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(_BITS[tensor.element_size()])
