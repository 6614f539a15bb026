"""The training engine under ``train_ddp.py``.

``training`` is a run from its options to its weights: read it first. ``options`` and ``recipes``
say what a run is, ``data`` and ``normalization`` what it reads, ``tasks`` and ``scores`` what is
asked and how answers are judged, ``networks``, ``start``, ``freezing`` and ``trainer`` what learns
and ``distributed`` how its processes work together. ``resumption`` is how it survives, by what
``checkpoint`` writes, what ``signals`` hears and whom ``watchdog`` accuses. ``progress``,
``tensorboard``, ``plots`` and ``report`` show it, ``records`` and ``lock`` keep its folder,
``standings`` knows its best epoch, ``export`` hands its weights on.
"""

__all__ = [
    "checkpoint",
    "data",
    "distributed",
    "export",
    "networks",
    "options",
    "plots",
    "progress",
    "recipes",
    "records",
    "tasks",
    "telemetry",
    "trainer",
    "training",
]
