"""Other packages' models as they come and converted."""

from __future__ import annotations

from harness.kept import Kept, case_of
from harness.packages import MODELS
from harness.results import mebibytes

from .memory import by_provider
from .parts import middle_and_spread, with_sources


def conversion(kept: Kept) -> str:
    """Other packages' models as they come and converted."""
    cells, sources = [], []
    for case in dict.fromkeys(case_of(row) for row in kept.of("conversion", "peak").rows):
        model = MODELS[case.arch]  # type: ignore[index]
        row = [f"`{model.line}`, {case.batch_size} x {case.size}"]
        for metric in ("peak", "inference peak", "training seconds", "inference seconds"):
            both = []
            for provider in ("original", "converted"):
                own = kept.of("conversion", metric, case).newest(provider=provider)
                sources += own
                both.append(middle_and_spread(own)[0] if own else None)
            if None in both:
                row.append("")
            elif "seconds" in metric:
                row.append(f"{both[0]:.2f} → {both[1]:.2f}")
            else:
                share = f" (1/{both[0] / both[1]:.1f})" if metric == "peak" else ""  # type: ignore
                row.append(f"{mebibytes(both[0])} → {mebibytes(both[1])}{share}")
        cells.append(row)
    header = ["model, input", "training step, MiB", "inference, MiB", "s/step", "s/inference"]
    return with_sources(header, cells, sources)


def volumes(kept: Kept) -> str:
    """Peaks of MONAI's network at large volumes."""
    found, cells, sources = kept.of("conversion", "peak", spatial_dims="3"), [], []
    cases = dict.fromkeys(case_of(row) for row in found.rows)
    for case in sorted(cases, key=lambda case: (case.image_size, case.batch_size)):
        names = ("original", "converted", "converted-slabs")
        own, rows = by_provider(found, case, names)
        if own[-1]:
            cells.append([f"{case.size}, batch {case.batch_size}", *own])
            sources += rows
    header = ["MONAI's DenseNet121, MiB", "as it comes", "converted", 'and `save="slabs"`']
    return with_sources(header, cells, sources)
