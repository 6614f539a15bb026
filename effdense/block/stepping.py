"""An optimizer's step taken in backward, parameter by parameter, so that gradients never all live.

NOTE [ steps in backward ]
Every parameter is stepped when its gradient is complete: by the dense block as soon as a layer's
backward is done, elsewhere when autograd has added up its gradient. Then the gradient is freed.
Each step is the optimizer's own, on its own state, of one parameter alone: optimizers that treat
parameters one by one give the bits of the ordinary step. A parameter with a hook of somebody
else's on its gradient waits for autograd, which calls it. What needs all gradients at once (a
norm to clip by, a sum over several backwards, a check that all are finite) can't be had.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

# Those whose step of a parameter depends on no other.
_OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)

_steps: Any = WeakTensorKeyDictionary()


class StepInBackward:
    """An optimizer whose steps are taken in backward; see :func:`step_in_backward`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        # without the hooks that the user may have set on the whole step
        self._alone = copy.copy(optimizer)
        self._groups = {
            id(parameter): number
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        self._stepped: set[int] = set()
        self._handles: list[Any] = [
            optimizer.register_step_post_hook(lambda *_: self._stepped.clear())
        ]
        self._parameters: list[nn.Parameter] = []

    def add(self, parameter: nn.Parameter) -> None:
        """Have a parameter stepped from now on."""
        _steps[parameter] = self
        self._parameters.append(parameter)
        self._handles.append(parameter.register_post_accumulate_grad_hook(self._accumulated))

    def remove(self) -> None:
        """Leave gradients in ``.grad`` again, for the ordinary step."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._parameters:
            _steps.pop(parameter, None)

    def __call__(self, parameter: Tensor, gradient: Tensor) -> None:
        """Step one parameter.

        Raises:
            RuntimeError: where this gradient is not all there is: see :func:`step_in_backward`.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                "effdense: steps in backward are for one process: among several, gradients would "
                "have to be averaged first (remove the steps, or train in one process)"
            )
        if id(parameter) in self._stepped or parameter.grad is not None:
            raise RuntimeError(
                "effdense: a parameter got a second gradient before optimizer.step(): steps in "
                "backward allow no accumulation and no parameter that two modules share; call "
                "optimizer.step(), which then does nothing else, after every backward"
            )
        self._stepped.add(id(parameter))
        # what load_state_dict and schedulers change
        self._alone.state = self._optimizer.state
        group = self._optimizer.param_groups[self._groups[id(parameter)]]
        self._alone.param_groups = [{**group, "params": [parameter]}]
        parameter.grad = gradient
        try:
            type(self._alone).step(self._alone)
        finally:
            parameter.grad = None

    def _accumulated(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        # there is none where the dense block has used it up
        if gradient is not None:
            self(parameter, gradient)


def step_in_backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> StepInBackward:
    """Step each of ``optimizer``'s parameters in backward, as soon as its gradient is complete.

    The gradient is freed then, so the gradients of a network are never all alive. Parameters end
    with the bits of the ordinary step. Go on calling ``optimizer.step()`` after every backward:
    it marks the end of a step, and does nothing else. Learning rates may be changed between
    steps, as by a scheduler. Hooks on parameters (``register_hook``) see and change gradients as
    ever; ``torch.autograd.grad`` steps nothing.

    Args:
        model: what is trained; not wrapped for several processes.
        optimizer: SGD, Adam, AdamW or RMSprop of torch.optim, of the model's parameters.

    Returns:
        An object whose ``remove()`` undoes it.

    Raises:
        ValueError: for another optimizer, one with ``differentiable=True``, or a model under
            DistributedDataParallel. (Clipping gradients, adding them up over several backwards
            and torch.amp.GradScaler can't be had with it: in float16 dense blocks raise a
            ValueError, and a second gradient before ``optimizer.step()`` is a RuntimeError.)
    """
    if type(optimizer) not in _OPTIMIZERS:
        known = ", ".join(kind.__name__ for kind in _OPTIMIZERS)
        raise ValueError(
            f"steps in backward are known to be exact for {known} of torch.optim, "
            f"not for {type(optimizer).__name__}"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError("an optimizer with differentiable=True can't step in backward")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "steps in backward are for one process: DistributedDataParallel averages gradients "
            "after backward has made them"
        )
    own = {id(parameter) for parameter in model.parameters()}
    steps = StepInBackward(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in own:
                steps.remove()
                raise ValueError("the optimizer has parameters that are not the model's")
            if parameter in _steps:
                steps.remove()
                raise ValueError("a parameter of the model is stepped in backward already")
            if parameter.requires_grad:
                steps.add(parameter)
    return steps


class Step(NamedTuple):
    """Steps one parameter by the gradient that it is given."""

    by: StepInBackward
    parameter: Tensor

    def __call__(self, gradient: Tensor) -> None:
        self.by(self.parameter, gradient)

    def is_due(self) -> bool:
        """Whether the present backward pass would add to ``.grad``, unseen by anybody.

        Else the gradient is autograd's: somebody's hook may change it, and torch.autograd.grad
        and ``backward(inputs=...)`` leave the parameters alone that they aren't asked for.
        """
        # one of the latter is ours
        if self.parameter._backward_hooks or len(_after_accumulation(self.parameter)) > 1:
            return False
        try:
            with torch.enable_grad():
                node = torch.autograd.graph.get_gradient_edge(self.parameter).node
            return bool(torch._C._will_engine_execute_node(node))
        except RuntimeError:
            # frozen since forward, or what torch.autograd.grad is to return
            return False


def _after_accumulation(parameter: Any) -> Any:
    return parameter._post_accumulate_grad_hooks or ()


def steps_of(tensors: Sequence[Tensor | None]) -> tuple[Step | None, ...] | None:
    """What steps each of a block's tensors in backward; None where nothing does."""
    if not _steps:
        return None
    by = [None if t is None else _steps.get(t) for t in tensors]
    if not any(by):
        return None
    pairs = zip(by, tensors, strict=True)
    return tuple(
        None if not step or tensor is None else Step(step, tensor) for step, tensor in pairs
    )
