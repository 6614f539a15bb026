"""Figures measured in processes of their own, and what becomes of processes that fail."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import memory
import pytest
import scaling
import throughput
import torch
from harness import child, measure, results, worker
from harness.case import Case
from harness.speed import Race

from effdense.machine import measurement
from effdense.machine import memory as memory_sizes
from effdense.machine.measurement import (
    MMAP_THRESHOLD,
    fresh_process,
    in_fresh_process,
    peak_memory,
    process_environment,
)

SMALL = Case("densenet_bc", depth=22, growth_rate=6, batch_size=2, image_size=8)
# some hundred MiB in a second
MIDDLE = Case("densenet_bc", depth=40, growth_rate=12, batch_size=32, image_size=32)
SMALL_ARGUMENTS = ["--depth", "22", "--growth-rate", "6", "--batch-size", "2"]
SMALL_ARGUMENTS += ["--image-size", "8", "--threads", "1"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_resident_peak_agrees_with_what_the_system_says_of_the_process():
    request = {"provider": "naive", "case": MIDDLE.columns(), "steps": 1}
    # What /usr/bin/time does: wait for the process and ask the system for its largest size.
    # From a small process, because a child starts with its parent's figure.
    program = (
        "import resource, subprocess, sys\n"
        "out = subprocess.run(sys.argv[1:], capture_output=True, text=True, check=True).stdout\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, out)"
    )
    command = [sys.executable, "-c", program, *fresh_process(child.training, 1, **request)]
    env = process_environment(1) | {"MALLOC_MMAP_THRESHOLD_": MMAP_THRESHOLD}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    kibibytes, answer = done.stdout.split(maxsplit=1)
    answer = json.loads(answer)
    assert answer["baseline"] + answer["peak"] == pytest.approx(int(kibibytes) * 1024, rel=0.05)
    live = measure.predicted_live("naive", MIDDLE)
    assert live <= answer["peak"] < measure.predicted_peak("naive", MIDDLE)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory can only be limited on Linux")
def test_a_provider_that_runs_out_of_memory_is_a_row():
    found = measure.memory(
        "naive", MIDDLE, steps=1, threads=1, live=False, force=True, memory_limit=200 << 20
    )
    assert found.status == "out of memory", found.detail
    assert found.peak is None
    assert found.detail


def test_a_killed_process_is_an_answer(monkeypatch):
    killed = subprocess.CompletedProcess([], -signal.SIGKILL, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: killed)
    answer = in_fresh_process(child.training, 1)
    assert answer["out_of_memory"]
    assert "SIGKILL" in answer["error"]


def test_what_would_not_fit_is_not_attempted(monkeypatch):
    monkeypatch.setattr(measure, "in_fresh_process", lambda *args, **_: pytest.fail("attempted"))
    monkeypatch.setattr(measure, "available_bytes", lambda device: 24 << 30)
    large = Case("densenet_bc", 250, 24, 256, 32)
    found = measure.memory("naive", large, steps=1, threads=1)
    assert found.status == "does not fit"
    # eight times the 10,657 MiB of batch 32, less the parameters' part
    assert found.detail.startswith("needs 8")
    assert "machine has 24.0 GiB" in found.detail
    assert found.predicted == measure.predicted_peak("naive", large)
    limited = measure.memory("naive", large, steps=1, threads=1, memory_limit=1 << 30)
    assert "limit is 1.0 GiB" in limited.detail
    attempted = []

    def attempt(*arguments, **named):
        attempted.append(named)
        return {"error": "no", "out_of_memory": False}

    monkeypatch.setattr(measure, "in_fresh_process", attempt)
    assert measure.memory("naive", large, steps=1, threads=1, force=True).status == "failed"
    assert attempted


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [[], ["--spatial-dims", "3", "--no-strict"]], ids=["2-D", "3-D"]
)
def test_race_of_two_providers(tmp_path, capsys, options):
    output = tmp_path / "race.csv"
    arguments = ["--providers", "naive", "effdense-features", "--rounds", "2", "--steps", "20"]
    arguments += ["--seconds", "0.01", "--output", str(output)]
    throughput.main([*SMALL_ARGUMENTS, *arguments, *options])
    out = capsys.readouterr().out
    assert "all compute what the naive net computes" in out
    assert "x naive" in out
    rows = results.read(output)
    machine = {row["metric"]: float(row["value"]) for row in rows if row["provider"] == "machine"}
    assert machine["foretold time"] > 0
    assert machine["time"] > 0
    samples = [row for row in rows if row["metric"] == "step time"]
    assert len(samples) == 4
    assert all(float(row["value"]) > 0 and row["kind"] == "measured" for row in samples)


def test_an_untimed_step_goes_before_a_sample(monkeypatch):
    steps = []
    own: Any = worker.Worker()
    own.job = SimpleNamespace(x=torch.zeros(1), step=lambda: steps.append("untimed"))

    def timed(step, count, gpu):
        steps.append(count)
        return 6.0

    monkeypatch.setattr(worker, "timed", timed)
    assert own.sample(steps=3) == {"seconds": 2.0}
    assert steps == ["untimed", 3]


def test_what_a_race_will_take_is_what_its_samples_take() -> None:
    """Of a machine whose steps take what they took in the warm-up, exactly."""
    seconds = {"naive": 3.0, "effdense-features": 0.4}
    told: list[str] = []
    race, clock = Race(list(seconds), SMALL, 1, told.append), [0.0]

    class Worker:
        def __init__(self, name: str) -> None:
            self.step = seconds[name]

        def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
            if do == "sample":
                # and an untimed one
                clock[0] += (arguments["steps"] + 1) * self.step
            return {"seconds": self.step, "steps": 2}

    race._workers = {name: Worker(name) for name in seconds}  # type: ignore[misc]
    foretold = 5 * race.warm_up(seconds=0.5)
    samples: list[str] = []
    assert len(list(race.rounds(5, samples.append))) == 5
    assert foretold == pytest.approx(clock[0])
    assert sum(race.expected[name] for name in samples) == pytest.approx(foretold)
    assert told[0] == "warming up naive"
    assert told[-1].startswith("timing ")


@pytest.mark.slow
def test_a_provider_that_dies_leaves_the_race():
    with Race(["naive", "effdense-features"], SMALL, threads=1) as race:
        assert 0 < race.warm_up(seconds=0.2, steps=1) < 60
        race._workers["effdense-features"]._process.kill()
        times = list(race.rounds(1))
    assert "SIGKILL" in race.failures["effdense-features"]
    assert list(times[0]) == ["naive"]


@pytest.mark.slow
def test_scaling_counts_what_two_processes_communicate(tmp_path, capsys):
    output = tmp_path / "scaling.csv"
    arguments = ["--processes", "2", "--modes", "weak", "--providers", "effdense-features"]
    arguments += ["--sync-batch-norm"]
    arguments += ["--rounds", "1", "--steps", "20", "--output", str(output)]
    scaling.main([*SMALL_ARGUMENTS, *arguments])
    rows = results.read(output)
    gradients, statistics = (
        [int(row["value"]) for row in rows if row["metric"] == f"communicated {kind}"]
        for kind in ("gradients", "statistics")
    )
    assert gradients == [scaling.counts.gradient_bytes(SMALL)]
    # and the count of positions in each of three blocks, in int64
    assert statistics == [scaling.counts.statistics_bytes(SMALL, shared=True) + 3 * 8]
    assert any(row["metric"] == "weak step time" and float(row["value"]) > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("measured", [False, True])
def test_scaling_says_what_a_process_died_of(tmp_path, monkeypatch, capsys, measured):
    rank = tmp_path / "harness" / "rank.py"
    rank.parent.mkdir()
    (rank.parent / "__init__.py").touch()
    answer = "pathlib.Path(json.loads(sys.argv[1])['answer']).write_text('{}')"
    rank.write_text(
        "import json, os, pathlib, sys\n" + (f"{answer}\n" if measured else "") + "os.abort()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = scaling.Options(
        depth=22, growth_rate=6, batch_size=2, image_size=8, processes=(1,), threads=1
    )
    if measured:
        assert scaling.launch(options, SMALL, "naive", 1) == {}
        said = capsys.readouterr().out
    else:
        with pytest.raises(scaling.RunError) as failure:
            scaling.launch(options, SMALL, "naive", 1)
        said = str(failure.value)
    assert "Fatal Python error: Aborted" in said


def test_depth_search_ends_at_the_budget(monkeypatch):
    case = Case("densenet_bc", 22, 12, 8, 32)
    budget = 2 << 30
    depth = memory.max_depth("effdense-features", case, budget)
    assert depth is not None
    at, beyond = (
        measure.predicted_peak("effdense-features", Case("densenet_bc", d, 12, 8, 32))
        for d in (depth, depth + 6)
    )
    assert at <= budget < beyond
    assert memory.max_depth("effdense-features", case, 1 << 20) is None


def test_available_memory_respects_control_groups(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/outer/inner\n")
    inner = tmp_path / "root" / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("100\n")
    outer = inner.parent
    (outer / "memory.max").write_text("4000\n")
    (outer / "memory.current").write_text("1500\n")
    (outer / "memory.stat").write_text("anon 1000\ninactive_file 500\n")
    assert memory_sizes.groups(tmp_path / "root", own) == [(4000, 1000)]


def test_what_a_process_takes_of_a_gpu() -> None:
    running: list[Any] = []
    nvml = SimpleNamespace(nvmlDeviceGetComputeRunningProcesses=lambda handle: running)
    gpu = SimpleNamespace(nvml=nvml, handle=None)
    assert child.bytes_of_process(gpu, 7) is None
    running.append(SimpleNamespace(pid=9, usedGpuMemory=90))
    # a container's own numbers
    assert child.bytes_of_process(gpu, 7) == 90
    running.append(SimpleNamespace(pid=7, usedGpuMemory=70))
    assert child.bytes_of_process(gpu, 7) == 70
    assert child.bytes_of_process(gpu, 8) is None
    assert child.bytes_of_process(SimpleNamespace(nvml=None), 7) is None
    # the driver has no such function
    assert child.bytes_of_process(SimpleNamespace(nvml=object(), handle=None), 7) is None


def test_a_gpu_is_measured_that_is_not_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as torch is told: what asks for memory or a time names the work's device."""
    current, asked = ["cuda:0"], []

    @contextmanager
    def device(name: Any) -> Iterator[None]:
        before, current[0] = current[0], str(name)
        yield
        current[0] = before

    def told(what: str, value: Any = None) -> Any:
        def call(name: Any = None, **_: Any) -> Any:
            asked.append((what, str(name or current[0])))
            return value

        return call

    class Event:
        def __init__(self, **_: Any) -> None:
            self.record = told("record")
            told("event")()

        def elapsed_time(self, end: Event) -> float:
            return 5.0

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "set_device", lambda name: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(measurement, "_settle", lambda warm_up, device: None)
    for what in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, what, told(what))
    monkeypatch.setattr(torch.cuda, "memory_allocated", told("allocated", 3))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", told("highest", 7))
    assert measurement.timed(told("work"), 2, "cuda:1") == 0.005
    assert measurement.peak_memory(told("work"), lambda: None, "cuda:1") == (3, 4)
    assert {place for what, place in asked if what != "work"} == {"cuda:1"}
    assert [what for what, _ in asked].count("work") == 3


def test_a_gpu_may_be_named_without_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users name it, and as torch.cuda.set_device does not take it."""
    used: list[str] = []

    def device(name: str) -> Any:
        used.append(name)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", device)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *where: None)
    monkeypatch.setattr(measurement, "_settle", lambda warm_up, device: warm_up())
    allocated = iter((10, 30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *where: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *where: next(allocated))
    done: list[str] = []
    found = peak_memory(lambda: done.append("work"), lambda: done.append("warm up"), "cuda")
    assert (used, done) == (["cuda"], ["warm up", "work"])
    assert found == measurement.Peak(10, 20)
