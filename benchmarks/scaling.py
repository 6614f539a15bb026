"""Training with several processes: efficiency, time outside compute, bytes communicated.

    python benchmarks/scaling.py --processes 1 2 4
    python benchmarks/scaling.py --depth 250 --growth-rate 24 --processes 8 64 --on h100

Starts itself under torchrun once for each number of processes. Weak scaling keeps the
batch of each process, strong scaling the batch of all together. "outside compute" is what
a step takes longer than the same step without any communication.

On a CPU every process gets --threads threads whatever their number, so that one process
doesn't compete with four by using four times the cores; more threads than cores is said.

--on is a model on paper from published bandwidths. Its figures are no measurements
and are kept in a file of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar, Literal

from harness import counts, providers, roofline
from harness.case import Case, CaseOptions
from harness.devices import DEVICES, NETWORKS, DeviceName, LinkName
from harness.measure import predicted_peak
from harness.pictures import colour, describe
from harness.results import Recorder, Row
from tqdm import tqdm
from tyro.conf import arg

from effdense.commands import front_end
from effdense.errors import UserError
from effdense.machine.environment import headline, usable_cores
from effdense.machine.measurement import process_environment
from effdense.machine.memory import available_bytes
from effdense.machine.tables import table

DEFAULT = ("naive-channels-last", "effdense-bottlenecks", "effdense-features")
# Backward's share of a step, with which the reduction of gradients overlaps.
BACKWARD_SHARE = 2 / 3


class RunError(RuntimeError):
    """A run under torchrun failed; the message is what its processes said, or died of."""


@dataclass(frozen=True, kw_only=True)
class Options(CaseOptions):
    CIFAR_BATCH: ClassVar[int] = 16

    threads: int = 1
    """CPU threads of each process."""
    processes: Annotated[tuple[int, ...], arg(metavar="N")] = (1, 2, 4)
    """How many are compared; with --on, devices."""
    providers: Annotated[tuple[str, ...], providers.argument(DEFAULT)] = ()
    """What is compared."""
    modes: tuple[Literal["weak", "strong"], ...] = ("weak", "strong")
    """weak: the batch is that of each process; strong: of all together."""
    rounds: int = 5
    """Samples of each."""
    steps: Annotated[int | None, arg(help_behavior_hint="(default: enough for --seconds)")] = None
    """Of a sample."""
    seconds: float = 0.5
    """Shortest sample."""
    sync_batch_norm: bool = False
    """Synchronise batch norm over processes."""
    on: Annotated[DeviceName | None, arg(help_behavior_hint="(default: here)")] = None
    """A model on paper of so many of a device that isn't here; nothing is run."""
    network: LinkName = "ndr400"
    """Of --on, between machines."""
    per_machine: int = 8
    """Of --on, devices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on is not None:
            DEVICES[self.on].rate(self.dtype)
            return
        problem = unable(self, self.case)
        if problem:
            raise UserError(problem)

    @property
    def names(self) -> list[str]:
        return providers.selected(self.providers, DEFAULT, self.case)


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/scaling.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> None:
    case = options.case
    if options.on is not None:
        case = dataclasses.replace(case, device=options.on)
    path = options.output or Path("results") / (
        f"scaling{'-projection' if options.on else ''}-{case.label()}.csv"
    )
    with Recorder(path, "scaling", options.device, options.threads) as recorder:
        if options.on is not None:
            project(options, options.on, case, recorder)
        else:
            print(headline(recorder.environment))
            measure(options, case, recorder)
    print(f"\n{path}")


def unable(options: Options, case: Case) -> str | None:
    """Why these numbers of processes can't be run; None where they can."""
    most = max(options.processes)
    if "strong" in options.modes and any(case.batch_size % n for n in options.processes):
        return f"--batch-size {case.batch_size} can't be divided over {options.processes} processes"
    if case.device != "cpu":
        import torch

        if most > torch.cuda.device_count():
            return f"{most} processes need as many GPUs, torch sees {torch.cuda.device_count()}"
        return None
    weak = [predicted_peak(name, case) * most for name in options.names]
    free = available_bytes()
    if max(weak) > free:
        return (
            f"{most} processes need {max(weak) / 2**30:.1f} GiB, machine has "
            f"{free / 2**30:.1f} GiB free; use a smaller --batch-size"
        )
    return None


def measure(options: Options, case: Case, recorder: Recorder) -> None:
    answers: dict[tuple[str, str, int], dict[str, Any]] = {}
    failures = []
    work = list(itertools.product(options.modes, options.names, options.processes))
    for mode, name, processes in tqdm(work, desc="runs", file=sys.stderr, disable=None):
        share = case.batch_size // (processes if mode == "strong" else 1)
        own = dataclasses.replace(case, batch_size=share)
        common: dict[str, Any] = {"processes": processes}
        try:
            answer = launch(options, own, name, processes)
        except RunError as error:
            failures.append(f"{name}, {processes} processes: {error}")
            recorder.add(
                name,
                own,
                f"{mode} step time",
                None,
                "s",
                status="failed",
                detail=str(error),
                **common,
            )
            continue
        answers[mode, name, processes] = answer
        common["steps"] = answer["steps"]
        for i, (together, alone) in enumerate(
            zip(answer["together"], answer["alone"], strict=True)
        ):
            recorder.add(name, own, f"{mode} step time", together, "s", sample=i, **common)
            recorder.add(name, own, f"{mode} compute time", alone, "s", sample=i, **common)
        for kind, nbytes in answer["bytes"].items():
            recorder.add(name, own, f"communicated {kind}", nbytes, "B", **common)

    for mode in options.modes:
        print_mode(options, case, mode, answers)
    print("\n".join(failures))
    naive, shared = (counts.statistics_bytes(case, shared) for shared in (False, True))
    print(
        f"Synchronised batch norm would add, by formula: {naive / 1e3:,.0f} kB a step in the "
        f"naive net, {shared / 1e3:,.0f} kB in effdense."
    )


def print_mode(
    options: Options,
    case: Case,
    mode: str,
    answers: dict[tuple[str, str, int], dict[str, Any]],
) -> None:
    of = "per process" if mode == "weak" else "of all processes"
    print(f"\n{mode} scaling, {case.describe()} {of}; {options.threads} threads per process\n")
    rows = []
    for name in options.names:
        first: tuple[int, float] | None = None
        for n in options.processes:
            answer = answers.get((mode, name, n))
            if answer is None:
                continue
            step, compute = median(answer["together"]), median(answer["alone"])
            images = case.batch_size * (n if mode == "weak" else 1)
            rate = images / step
            # of as many processes as there are at least, usually one
            first = first or (n, rate)
            efficiency = rate / n / (first[1] / first[0])
            crowded = case.device == "cpu" and n * options.threads > usable_cores()
            rows.append(
                [
                    name,
                    f"{n}{' (more threads than cores)' if crowded else ''}",
                    f"{step:.3f}",
                    f"{rate:.1f}",
                    f"{100 * efficiency:.0f} %",
                    f"{100 * max(0.0, step - compute) / step:.0f} %",
                    f"{answer['bytes']['gradients'] / 1e6:.2f}",
                    f"{answer['bytes']['statistics'] / 1e3:.1f}",
                ]
            )
    header = ["provider", "processes", "s/step", "images/s", "efficiency", "outside compute"]
    print(table([*header, "gradients MB/step", "statistics kB/step"], rows))


def launch(options: Options, case: Case, name: str, processes: int) -> dict[str, Any]:
    """Rank 0's answer of one run under torchrun.

    Raises:
        RunError: where it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        request = {
            "provider": name,
            "case": case.columns(),
            "threads": options.threads,
            "rounds": options.rounds,
            "steps": options.steps,
            "seconds": options.seconds,
            "synchronise": options.sync_batch_norm,
            "answer": str(answer),
        }
        # a process that dies of a signal says where it was
        env = process_environment(options.threads) | {"PYTHONFAULTHANDLER": "1"}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += [f"--nproc_per_node={processes}", "-m", "harness.rank", json.dumps(request)]
        done = subprocess.run(torchrun, env=env, capture_output=True, text=True)
        if not answer.exists():
            raise RunError(reason(done.stderr) or f"exit status {done.returncode}")
        if done.returncode:
            # The answer is written whole when all is measured: only leaving can have failed.
            print(f"{name}, {processes} processes, measured, but failed to leave:")
            print(f"  {reason(done.stderr) or f'exit status {done.returncode}'}")
        return json.loads(answer.read_text())


def reason(stderr: str) -> str:
    """Why a run under torchrun failed, in a line: a process's exception, else its signal."""
    # torchrun's own exception, which is in every failure, says neither
    lines = [line.strip() for line in stderr.splitlines() if "ChildFailedError" not in line]
    for sign in ("Error", "Fatal", "terminate called", "Signal "):
        found = [line for line in lines if sign in line]
        if found:
            return found[0][:300]
    return ""


def project(options: Options, on: DeviceName, case: Case, recorder: Recorder) -> None:
    """Weak scaling on paper.

    Compute is the roofline of one device; gradients go once around a ring of all devices,
    2 (N - 1) / N of their bytes over the slowest link. Either all of it hides behind
    backward or none does: the truth lies between.
    """
    device = DEVICES[on]
    network = NETWORKS[options.network]
    print(f"PROJECTION, not a measurement: {case.describe()} per device, {device.name}")
    print(
        f"{options.per_machine} devices a machine at {device.link / 1e9:g} GB/s per direction, "
        f"machines at {network / 1e9:g} GB/s ({options.network}); {device.source}\n"
    )
    rows = []
    for name in options.names:
        try:
            operations = roofline.operations(name, case)
        except ValueError as error:
            print(error)
            continue
        compute = roofline.seconds(operations, device.rate(case.dtype), device.memory)
        for n in options.processes:
            slowest = device.link if n <= options.per_machine else min(device.link, network)
            reduction = 2 * (n - 1) / n * counts.gradient_bytes(case) / slowest
            hidden = compute + max(0.0, reduction - BACKWARD_SHARE * compute)
            low, high = compute / (compute + reduction), compute / hidden
            rows.append(
                [
                    name,
                    str(n),
                    f"{1e3 * compute:.2f}",
                    f"{1e3 * reduction:.2f}",
                    f"{100 * low:.0f} to {100 * high:.0f} %",
                ]
            )
            for metric, value in {
                "compute time": compute,
                "reduction time": reduction,
                "weak step time, overlapped": hidden,
                "weak step time, not overlapped": compute + reduction,
            }.items():
                recorder.add(
                    name,
                    case,
                    metric,
                    value,
                    "s",
                    kind="projection",
                    processes=n,
                    detail=f"{device.name}, {options.network}",
                )
    print(table(["provider", "devices", "compute ms", "reduction ms", "efficiency"], rows))


def draw(figure: Any, rows: list[Row]) -> None:
    """Efficiency against the number of processes."""
    axes = figure.subplots()
    rows = [row for row in rows if row["metric"].endswith("step time") and row["value"]]
    if not rows:
        raise ValueError("no measured step time to draw")
    counts = sorted({int(row["processes"]) for row in rows})
    for provider in dict.fromkeys(row["provider"] for row in rows):
        for metric, marker in (("weak step time", "o"), ("strong step time", "s")):
            own = [r for r in rows if r["provider"] == provider and r["metric"] == metric]
            times = {
                n: median([float(r["value"]) for r in own if int(r["processes"]) == n])
                for n in counts
                if any(int(r["processes"]) == n for r in own)
            }
            if not times:
                continue
            first = min(times)
            ideal = {n: first / n if metric.startswith("strong") else 1.0 for n in times}
            axes.plot(
                list(times),
                [100 * ideal[n] * times[first] / times[n] for n in times],
                marker=marker,
                color=colour(provider),
                linestyle="-" if marker == "o" else "--",
                label=f"{provider}, {metric.split()[0]}",
            )
    axes.set_xticks(counts)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("processes")
    axes.set_ylabel("scaling efficiency, %")
    axes.set_title(describe(rows[0]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
