"""The tables of the documentation: each a function of what is kept, by the name in its page."""

from __future__ import annotations

from collections.abc import Callable

from harness.kept import Kept

from . import memory, packages, runs, speed

TABLES: dict[str, Callable[[Kept], str]] = {
    "readme": memory.peaks(memory.FRONT, memory.SIX),
    "memory": memory.peaks(memory.DEEP),
    "memory-thousand": memory.peaks(memory.THOUSAND),
    "memory-others": memory.other_peaks,
    "steps-in-backward": memory.steps_in_backward,
    "volumes": packages.volumes,
    "predictions": memory.predictions,
    "timelines": memory.timelines,
    "buckets": memory.buckets,
    "growth": memory.growth,
    "speed": speed.speed,
    "shares": speed.shares,
    "compiled": speed.compiled,
    "ratios": speed.ratios,
    "revisions": speed.revisions,
    "scaling": speed.scaling,
    "convergence": runs.convergence,
    "conversion": packages.conversion,
    "plans": speed.plans,
    "estimates": memory.estimates,
    "sync-bytes": runs.sync_bytes,
    "precision": runs.precision,
    "installation": runs.installation,
    "waiting": speed.waiting,
    "kills": runs.kills,
    "soak": runs.soak,
}
