"""Peak memory of one training step, measured by a fresh process over its own start.

    python -m tests.helpers.measure_memory '{"model": "effdense", "depth": 100,
                                              "growth_rate": 12, "batch": 64, "save": "features"}'

prints one JSON object. ``peak`` is the highest resident memory during the step minus the
resident memory after imports and a tiny warm-up step, in bytes; ``state`` is what
parameters, gradients and optimiser state take of it; ``saved`` is the bytes of the
activations that autograd saved, each storage counted once.
"""

from __future__ import annotations

from typing import Any

from effdense.machine.measurement import answer, ask_fresh_process, resident_peak
from tests.helpers.launch import REPOSITORY


def measure(**job: Any) -> dict[str, int]:
    """The measurements of one job, from a fresh process."""
    found = ask_fresh_process(__name__, job, 1, [str(REPOSITORY)])
    if "error" in found:
        raise RuntimeError(f"measuring {job} failed: {found['error']}")
    return found


def main(job: dict[str, Any]) -> dict[str, int]:
    import torch

    import effdense
    from effdense import reference

    def build(depth: int) -> torch.nn.Module:
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
                    layer.norm1 = torch.nn.GroupNorm(1, layer.norm1.num_features)
                    layer.norm2 = torch.nn.GroupNorm(1, layer.norm2.num_features)
        if job["model"] == "converted":
            effdense.convert(model)
        return model

    def infer(model: torch.nn.Module, batch: int, size: int) -> int:
        with torch.inference_mode():
            model.eval()(torch.randn(batch, 3, size, size))
        return 0

    def train(model: torch.nn.Module, batch: int, size: int) -> int:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        images = torch.randn(batch, 3, size, size)
        own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), images]}
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(images).square().mean()
        loss.backward()
        optimizer.step()
        return sum(saved.values())

    torch.manual_seed(0)
    run = infer if job.get("eval") else train
    model: Any = None
    saved = 0

    def work() -> None:
        nonlocal model, saved
        model = build(job["depth"])
        saved = run(model, job["batch"], job.get("size", 32))

    found = resident_peak(work, lambda: run(build(10), 2, 8))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"peak": found.peak, "state": 3 * weights, "saved": saved}


if __name__ == "__main__":
    answer(main)
