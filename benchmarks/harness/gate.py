"""The correctness gate: no figure of speed from a provider that computes something else."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

# Relative error of the loss and of all gradients as one vector, and of one parameter's
# gradient, between two orders of summation of one network. In float32 a ReLU here and
# there falls the other way: between naive and naive-channels-last all gradients together
# differed by 0.8e-2 at depth 100 and by 1.6e-2 in densenet121, single parameters by up to
# 3.2e-2. What this catches is of the order of 1; a smaller error shows in float64.
_TOLERANCE = {
    "float64": (1e-9, 1e-8),
    "float32": (3e-2, 1e-1),
    "bfloat16": (3e-2, 1e-1),
    "float16": (3e-2, 1e-1),
}


class Disagreement(NamedTuple):
    """Relative errors of the loss, of the whole gradient, and of the worst parameter's."""

    loss: float
    gradient: float
    worst: float
    worst_parameter: str
    allowed: float
    allowed_worst: float

    @property
    def red(self) -> bool:
        # written so that a NaN is red
        return not (
            self.loss <= self.allowed
            and self.gradient <= self.allowed
            and self.worst <= self.allowed_worst
        )

    def relative_to(self, naive: Disagreement) -> Disagreement:
        """Allowed to be twice as far from the truth as the naive net in the same dtype."""
        return self._replace(
            allowed=self.allowed + 2 * max(naive.loss, naive.gradient),
            allowed_worst=self.allowed_worst + 2 * naive.worst,
        )

    def describe(self) -> str:
        return (
            f"loss off by {self.loss:.1e}, gradient by {self.gradient:.1e} (allowed "
            f"{self.allowed:.1e}), that of {self.worst_parameter or 'no parameter'} by "
            f"{self.worst:.1e} (allowed {self.allowed_worst:.1e})"
        )


def disagreement(
    truth: tuple[float, dict[str, Tensor]],
    found: tuple[float, dict[str, Tensor]],
    dtype: str,
) -> Disagreement:
    """Compare (loss, gradients by parameter name); a missing gradient is an error of 1.

    Parameters of other names are compared in their names' order, where they have the same shapes
    in it; providers.set_parameters draws them so too. A wrong match would not agree.
    """
    (true_loss, true_gradients), (loss, gradients) = truth, found
    names, others = sorted(true_gradients), sorted(gradients)
    if names != others and [true_gradients[name].shape for name in names] == [
        gradients[name].shape for name in others
    ]:
        gradients = {name: gradients[other] for name, other in zip(names, others, strict=True)}
    loss_error = abs(loss - true_loss) / max(abs(true_loss), 1e-12)
    norms = {name: gradient.norm().item() for name, gradient in true_gradients.items()}
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    squares, worst, worst_parameter = 0.0, 0.0, ""
    for name in sorted(true_gradients.keys() | gradients.keys()):
        if name not in gradients or name not in true_gradients:
            difference = norms.get(name, math.inf)
        elif gradients[name].shape != true_gradients[name].shape:
            difference = math.inf
        else:
            difference = (gradients[name] - true_gradients[name]).norm().item()
        squares += difference**2
        # A gradient that is itself rounding error has no relative error to speak of.
        error = difference / max(norms.get(name, 0.0), 1e-6 * total, 1e-300)
        if math.isnan(error) or error > worst:
            worst, worst_parameter = error, name
        if math.isnan(error):
            break
    allowed, allowed_worst = _TOLERANCE[dtype]
    whole = math.sqrt(squares) / max(total, 1e-300)
    return Disagreement(loss_error, whole, worst, worst_parameter, allowed, allowed_worst)
