"""Peak memory of a training step or of inference, measured in a fresh process over its start."""

from __future__ import annotations

from typing import Any

import torch

import effdense
from effdense import reference
from effdense.machine.measurement import in_fresh_process, measure_training, peak_memory
from effdense.memory.timeline import Training


def measure(**job: Any) -> dict[str, int]:
    """The measurements of one job, from a fresh process.

    ``peak`` is the highest resident memory over that after imports and a tiny warm-up step, in
    bytes; ``state`` is what parameters, gradients and optimiser state take of it; ``saved`` is
    the bytes of the activations that autograd saved, each storage counted once.
    """
    found = in_fresh_process(_measured, 1, job=job)
    if "error" in found:
        raise RuntimeError(f"measuring {job} failed: {found['error']}")
    return found


class _Training(Training):
    """Counts what autograd saves."""

    saved: dict[int, int]

    def loss(self) -> torch.Tensor:
        own = {p.untyped_storage().data_ptr() for p in [*self.model.parameters(), self.x]}
        self.saved = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                self.saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return super().loss()


def _measured(job: dict[str, Any]) -> dict[str, int]:
    torch.manual_seed(0)
    shape = job["batch"], 3, *[job.get("size", 32)] * 2
    built: list[_Training] = []

    def build() -> _Training:
        built.append(_training(_model(job, job["depth"]), shape))
        return built[-1]

    def warm_up() -> None:
        _training(_model(job, 10), (2, 3, 8, 8)).step()

    def infer() -> None:
        with torch.inference_mode():
            _model(job, job["depth"]).eval()(torch.randn(shape))

    if job.get("eval"):
        return {"peak": peak_memory(infer, warm_up).peak, "state": 0, "saved": 0}
    peak = measure_training(build, warm_up)["peak"]
    weights = sum(p.numel() * p.element_size() for p in built[0].model.parameters())
    return {"peak": peak, "state": 3 * weights, "saved": sum(built[0].saved.values())}


def _training(model: torch.nn.Module, shape: tuple[int, ...]) -> _Training:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return _Training(model, optimizer, torch.randn(shape), None)


def _model(job: dict[str, Any], depth: int) -> torch.nn.Module:
    if job["model"] == "densenet121" and depth == job["depth"]:
        return effdense.densenet121(save=job["save"])
    if job["model"] in ("effdense", "densenet121"):
        ours = effdense.densenet_bc(depth, job["growth_rate"], save=job["save"])
        ours.offload = job.get("offload", False)
        return ours
    model = reference.densenet_bc(depth, job["growth_rate"])
    if job.get("group_norm"):
        for layer in model.modules():
            if isinstance(layer, reference.DenseLayer):
                for name in ("norm1", "norm2"):
                    width: Any = layer.get_submodule(name).num_features
                    setattr(layer, name, torch.nn.GroupNorm(1, width))
    if job["model"] == "converted":
        effdense.convert(model)
    return model
