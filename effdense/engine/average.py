"""The moving average of a network's weights."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class MovingAverage(AveragedModel):
    """torch's average, buffers included, that copies nothing between host and device.

    torch's own sends the number of updates to the device at every one, though no average by
    decay asks for it, and the host waits for that copy.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        move = get_ema_multi_avg_fn(decay)
        super().__init__(network, multi_avg_fn=move, use_buffers=True)
        self._move = move

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move towards ``model``; the first time, become it."""
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        pairs = zip(
            chain(self.module.parameters(), self.module.buffers()),
            chain(model.parameters(), model.buffers()),
            strict=True,
        )
        for own, new in pairs:
            owns, news = by_dtype.setdefault(own.dtype, ([], []))
            owns.append(own.detach())
            news.append(new.detach())
        # a count in main memory
        first = bool(self.n_averaged == 0)
        for owns, news in by_dtype.values():
            if first:
                torch._foreach_copy_(owns, news)
            else:
                self._move(owns, news, self.n_averaged)
        self.n_averaged += 1
