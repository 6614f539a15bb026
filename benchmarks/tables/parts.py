"""What tables of kept results are made of: names, figures, and where they are from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from harness.case import Case
from harness.kept import source_of
from harness.results import Row, quantiles

from effdense.machine.environment import threads_in_words
from effdense.machine.tables import table

NAMES = {
    "naive": "naive (`effdense.reference`)",
    "naive-channels-last": "naive, channels-last",
    "torchvision": "torchvision",
    "torchvision-memory-efficient": "torchvision, `memory_efficient=True`",
    "checkpoint": "checkpointed (`torch.utils.checkpoint` per layer)",
    "compile": "`torch.compile` of naive",
    "compile-channels-last": "`torch.compile` of naive, channels-last",
    "compile-channels-last:max-autotune": "`torch.compile` of naive, channels-last, `max-autotune`",
    "effdense-bottlenecks": 'effdense, `save="bottlenecks"`',
    "effdense-features": 'effdense, `save="features"`',
    "effdense-input": 'effdense, `save="input"`',
    "effdense-slabs": 'effdense, `save="slabs"`',
    "effdense-step-in-backward": 'effdense, `save="features"`, steps in backward',
}


def middle_and_spread(rows: Sequence[Row]) -> tuple[float, float, float]:
    """(median, 20 %, 80 %): of samples, or as stated; where a median alone is, thrice that."""
    stated = {row["statistic"]: float(row["value"]) for row in rows if row["statistic"]}
    if "0.5" in stated:
        return stated["0.5"], stated.get("0.2", stated["0.5"]), stated.get("0.8", stated["0.5"])
    low, middle, high = quantiles([float(row["value"]) for row in rows])
    return middle, low, high


def spread(rows: Sequence[Row], digits: int = 2) -> str:
    if not rows:
        return ""
    middle, low, high = (f"{value:.{digits}f}" for value in middle_and_spread(rows))
    return middle if low == middle == high else f"{middle} [{low}, {high}]"


def seconds(rows: Sequence[Row]) -> str:
    """To three digits, as clocks and neighbours allow."""
    return spread(rows, 2 if rows and middle_and_spread(rows)[0] >= 1 else 3)


def threads_of(row: Row) -> str:
    """Such as "2 threads"; nothing where it isn't known."""
    return threads_in_words(row["threads"]) if row["threads"] else ""


def sources_of(rows: Iterable[Row]) -> str:
    """Where figures are from: each machine and revision, and a line for each run there."""
    found: dict[str, list[str]] = {}
    for row in {source_of(row): row for row in rows}.values():
        memory = f", {float(row['memory_bytes']) / 2**30:.1f} GiB" if row["memory_bytes"] else ""
        where = (
            f"{row['gpu'] or row['processor']}, {row['cores']} cores{memory}, "
            f"torch {row['torch']}, Python {row['python']}, "
            f"revision {row['git_revision'][:7]}, {row['date'][:10]}"
        )
        command = re.sub(r" --output \S+", "", row["command"])
        threads = f", {threads_of(row)}" if row["threads"] else ""
        found.setdefault(where, []).append(f"- `{command}`{threads}")
    return "\n\n".join("\n".join([f"{where}:", "", *runs]) for where, runs in found.items())


def with_sources(header: Sequence[str], cells: Sequence[Sequence[str]], rows: list[Row]) -> str:
    return f"{table(header, cells)}\n\n{sources_of(rows)}"


def network(case: Case) -> str:
    name = f"DenseNet-BC ({case.depth}, k {case.growth_rate})" if case.is_cifar else case.arch
    return f"{name}, {case.size}, batch {case.batch_size}"
