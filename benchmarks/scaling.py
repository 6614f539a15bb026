"""Training with several processes: efficiency, time outside compute, bytes communicated.

    python benchmarks/scaling.py --processes 1 2 4
    python benchmarks/scaling.py --depth 250 --growth-rate 24 --project 8 64 --on h100

Starts itself under torchrun once for each number of processes. Weak scaling keeps the
batch of each process, strong scaling the batch of all together. "outside compute" is what
a step takes longer than the same step without any communication.

On a CPU every process gets --threads threads whatever their number, so that one process
doesn't compete with four by using four times the cores; more threads than cores is said.

--project is a model on paper from published bandwidths. Its figures are no measurements
and are kept in a file of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from harness import counts, providers, roofline
from harness.case import (
    Case,
    Parser,
    add_case_arguments,
    case_of,
    positive_int,
)
from harness.devices import DEVICES, NETWORKS
from harness.measure import predicted_peak
from harness.report import Recorder, table
from tqdm import tqdm

from effdense.machine.environment import headline, usable_cores
from effdense.machine.measurement import process_environment
from effdense.machine.memory import available_bytes

DEFAULT = ("naive-channels-last", "effdense-bottlenecks", "effdense-features")
# Backward's share of a step, with which the reduction of gradients overlaps.
BACKWARD_SHARE = 2 / 3


class RunError(RuntimeError):
    """A run under torchrun failed; the message is what its processes said, or died of."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    case = case_of(parser, args)
    args.providers = providers.selected(parser, args.providers, DEFAULT, case)
    if args.on and not args.project:
        parser.error("--on belongs to --project")
    if args.project:
        device = DEVICES[args.on or "h100"]
        if case.dtype not in device.flops:
            parser.error(f"no published {case.dtype} rate of {device.name}")
        case = dataclasses.replace(case, device=args.on or "h100")
    else:
        problem = objection(args, case)
        if problem:
            parser.error(problem)
    path = args.output or Path("results") / (
        f"scaling{'-projection' if args.project else ''}-{case.label()}.csv"
    )
    with Recorder(path, "scaling", args.device, args.threads) as recorder:
        try:
            if args.project:
                project(args, case, recorder)
            else:
                print(headline(recorder.environment))
                run(args, case, recorder)
        except KeyboardInterrupt:
            print(f"\ninterrupted; the rows so far are in {path}", file=sys.stderr)
            return 130
    print(f"\n{path}")
    return 0


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add_case_arguments(parser, depth=100, growth_rate=12, batch_size=16)
    # Every number of processes runs with the threads of one.
    parser.set_defaults(threads=1)
    parser.add_argument(
        "--processes",
        nargs="+",
        type=positive_int,
        default=[1, 2, 4],
        metavar="N",
        help="default: 1 2 4",
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        type=providers.provider_name,
        metavar="NAME",
        help=f"default: {' '.join(DEFAULT)}",
    )
    parser.add_argument(
        "--modes", nargs="+", choices=["weak", "strong"], default=["weak", "strong"]
    )
    parser.add_argument("--rounds", type=positive_int, default=5, help="default 5")
    parser.add_argument("--steps", type=positive_int, help="per sample")
    parser.add_argument("--seconds", type=float, default=0.5, help="shortest sample (default 0.5)")
    parser.add_argument(
        "--sync-batch-norm", action="store_true", help="synchronise batch norm over processes"
    )
    parser.add_argument(
        "--project", nargs="+", type=positive_int, metavar="N", help="on paper, for N devices"
    )
    parser.add_argument("--on", choices=sorted(DEVICES), help="the projection's device (h100)")
    parser.add_argument(
        "--network",
        choices=sorted(NETWORKS),
        default="ndr400",
        help="of the projection, between machines (default ndr400)",
    )
    parser.add_argument(
        "--per-machine", type=positive_int, default=8, help="of the projection: devices (8)"
    )
    parser.add_argument("--output", type=Path, metavar="CSV", help="default: results/scaling-*")
    return parser


def objection(args: argparse.Namespace, case: Case) -> str | None:
    """Why these numbers of processes can't be run; None where they can."""
    most = max(args.processes)
    if "strong" in args.modes and any(case.batch_size % n for n in args.processes):
        return f"--batch-size {case.batch_size} can't be divided over {args.processes} processes"
    if case.device != "cpu":
        import torch

        if most > torch.cuda.device_count():
            return f"{most} processes need as many GPUs, torch sees {torch.cuda.device_count()}"
        return None
    weak = [predicted_peak(name, case) * most for name in args.providers]
    free = available_bytes()
    if max(weak) > free:
        return (
            f"{most} processes need {max(weak) / 2**30:.1f} GiB, machine has "
            f"{free / 2**30:.1f} GiB free; use a smaller --batch-size"
        )
    return None


def run(args: argparse.Namespace, case: Case, recorder: Recorder) -> None:
    answers: dict[tuple[str, str, int], dict[str, Any]] = {}
    failures = []
    work = [(m, name, n) for m in args.modes for name in args.providers for n in args.processes]
    for mode, name, processes in tqdm(work, desc="runs", file=sys.stderr, disable=None):
        share = case.batch_size // (processes if mode == "strong" else 1)
        own = dataclasses.replace(case, batch_size=share)
        common = {"processes": processes}
        try:
            answer = launch(args, own, name, processes)
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

    for mode in args.modes:
        print_mode(args, case, mode, answers)
    print("\n".join(failures))
    naive, shared = (counts.statistics_bytes(case, shared) for shared in (False, True))
    print(
        f"Synchronised batch norm would add, by formula: {naive / 1e3:,.0f} kB a step in the "
        f"naive net, {shared / 1e3:,.0f} kB in effdense."
    )


def print_mode(
    args: argparse.Namespace,
    case: Case,
    mode: str,
    answers: dict[tuple[str, str, int], dict[str, Any]],
) -> None:
    of = "per process" if mode == "weak" else "of all processes"
    print(f"\n{mode} scaling, {case.describe()} {of}; {args.threads} threads per process\n")
    rows = []
    for name in args.providers:
        first: tuple[int, float] | None = None
        for n in args.processes:
            answer = answers.get((mode, name, n))
            if answer is None:
                continue
            step, compute = median(answer["together"]), median(answer["alone"])
            images = case.batch_size * (n if mode == "weak" else 1)
            rate = images / step
            # of as many processes as there are at least, usually one
            first = first or (n, rate)
            efficiency = rate / n / (first[1] / first[0])
            crowded = case.device == "cpu" and n * args.threads > usable_cores()
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


def launch(args: argparse.Namespace, case: Case, name: str, processes: int) -> dict[str, Any]:
    """Rank 0's answer of one run under torchrun.

    Raises:
        RunError: where it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        request = {
            "provider": name,
            "case": case.columns(),
            "threads": args.threads,
            "rounds": args.rounds,
            "steps": args.steps,
            "seconds": args.seconds,
            "synchronise": args.sync_batch_norm,
            "answer": str(answer),
        }
        # a process that dies of a signal says where it was
        env = process_environment(args.threads) | {"PYTHONFAULTHANDLER": "1"}
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


def project(args: argparse.Namespace, case: Case, recorder: Recorder) -> None:
    """Weak scaling on paper.

    Compute is the roofline of one device; gradients go once around a ring of all devices,
    2 (N - 1) / N of their bytes over the slowest link. Either all of it hides behind
    backward or none does: the truth lies between.
    """
    device = DEVICES[args.on or "h100"]
    network = NETWORKS[args.network]
    print(f"PROJECTION, not a measurement: {case.describe()} per device, {device.name}")
    print(
        f"{args.per_machine} devices a machine at {device.link / 1e9:g} GB/s per direction, "
        f"machines at {network / 1e9:g} GB/s ({args.network}); {device.source}\n"
    )
    rows = []
    for name in args.providers:
        try:
            operations = roofline.operations(name, case)
        except ValueError as error:
            print(error)
            continue
        compute = roofline.seconds(operations, device.flops[case.dtype], device.memory)
        for n in args.project:
            slowest = device.link if n <= args.per_machine else min(device.link, network)
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
                    detail=f"{device.name}, {args.network}",
                )
    print(table(["provider", "devices", "compute ms", "reduction ms", "efficiency"], rows))


if __name__ == "__main__":
    sys.exit(main())
