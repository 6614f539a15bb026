"""The commands of ``effdense``, a file each.

A command's module has ``Options``, a dataclass (see ``front_end``), and ``run``, which takes one
and returns the exit status. ``network`` is the MODEL argument of several, ``measure`` and
``verification`` are parts of verify.
"""

__all__ = ["env", "front_end", "train"]

COMMANDS = {
    "train": "train a DenseNet, as train_ddp.py does",
    "recipes": "list the data sets of train, and the defaults that each brings",
    "evaluate": "test a run's network on a folder of images",
    "predict": "classify images with a run's network",
    "export": "write a run's network as ONNX, checked against torch",
    "plot": "redraw the curves from the CSV files of one run, or overlay several",
    "plan": "choose what each dense block saves, so that training fits a memory budget",
    "graph": "draw a network's compute graph with the bytes that each node keeps for backward",
    "convert-report": "list what effdense.convert would make linear in a model, what not, and why",
    "verify": "hold a network against its naive twin, measure both, and write a report",
    "env": "list versions, devices and what the backends' self-checks say, for bug reports",
}
