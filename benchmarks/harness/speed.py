"""Speed of several providers: a process each, agreement first, then alternating rounds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from effdense.machine.measurement import process_environment

from .case import Case
from .gate import Disagreement, disagreement


class WorkerError(RuntimeError):
    """A provider's process failed or died; the message says of what."""


class WorkerProcess:
    """A :class:`harness.worker.Worker` in a fresh process with the allocator's defaults.

    Of this code, or of what lies in ``folder`` and is found by ``paths`` (PYTHONPATH).
    """

    def __init__(self, threads: int, folder: Path | None = None, paths: str | None = None) -> None:
        own = process_environment(threads)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=own if paths is None else own | {"PYTHONPATH": paths},
            cwd=folder,
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            WorkerError: where the request failed or the process died over it.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._cause_of_death())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _cause_of_death(self) -> str:
        code = self._process.wait()
        if code == -9:
            return "killed by SIGKILL, no memory left"
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        return f"exit status {code}" + (f": {said[-1][:300]}" if said else "")

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self._process.wait()
        self._log.close()


_DOING = {
    "setup": "building",
    "gradients": "comparing",
    "warm_up": "warming up",
    "sample": "timing",
}


class Race:
    """Providers on one case. Use as a context manager; ``failures`` says who fell out and why.

    ``told`` hears what is being done, such as "comparing naive".
    """

    def __init__(
        self,
        names: Sequence[str],
        case: Case,
        threads: int,
        told: Callable[[str], None] = lambda doing: None,
    ) -> None:
        self.case, self.threads = case, threads
        self.names, self._told = list(names), told
        self.failures: dict[str, str] = {}
        self.steps: dict[str, int] = {}
        self.expected: dict[str, float] = {}
        """Seconds that a sample of each will take, with the untimed step before it."""
        self.start_seconds = 0.0
        """What a process took until its network was built, on the average."""
        self._workers: dict[str, WorkerProcess] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Race:
        start = time.perf_counter()
        for name in self.names:
            self._workers[name] = self._stack.enter_context(WorkerProcess(self.threads))
        for name in list(self._workers):
            self._ask(name, "setup", provider=name, case=self.case.columns(), threads=self.threads)
        self.start_seconds = (time.perf_counter() - start) / max(1, len(self.names))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    @property
    def running(self) -> list[str]:
        return [name for name in self._workers if name not in self.failures]

    def _ask(self, name: str, do: str, **arguments: Any) -> dict[str, Any] | None:
        if name in self.failures:
            return None
        if do in _DOING:
            self._told(f"{_DOING[do]} {name}")
        try:
            return self._workers[name].ask(do, **arguments)
        except WorkerError as error:
            self.failures[name] = str(error)
            return None

    def disagreements(self, strict: bool = False) -> dict[str, Disagreement]:
        """How far each provider's loss and gradients are from the naive net's; see gate.py.

        Under autocast the naive net in float32 is the truth, and a provider may be twice
        as far from it as the naive net under the same autocast. ``strict`` compares in
        float64 instead, with a batch of at most four images, in processes of its own.
        """
        case = self.case
        if strict:
            case = dataclasses.replace(case, dtype="float64", batch_size=min(4, case.batch_size))
            with Race(self.running, case, self.threads, self._told) as race:
                found = race.disagreements()
                self.failures |= race.failures
            return found
        truth_case = dataclasses.replace(case, dtype="float32") if case.autocast else case
        with tempfile.TemporaryDirectory() as folder:
            truth = self._truth(truth_case, Path(folder) / "truth")
            found = {}
            for name in self.running:
                answer = self._gradients(name, Path(folder) / "gradients")
                if answer is not None:
                    found[name] = disagreement(truth, answer, case.dtype)
        if case.autocast and "naive" in found:
            found = {name: each.relative_to(found["naive"]) for name, each in found.items()}
        return found

    def _truth(self, case: Case, path: Path) -> tuple[float, dict[str, torch.Tensor]]:
        if case == self.case and "naive" in self.running:
            answer = self._gradients("naive", path)
            if answer is not None:
                return answer
            raise WorkerError(f"naive: {self.failures['naive']}")
        with WorkerProcess(self.threads) as worker:
            worker.ask("setup", provider="naive", case=case.columns(), threads=self.threads)
            loss = worker.ask("gradients", path=str(path))["loss"]
        return loss, torch.load(path, weights_only=True)

    def _gradients(self, name: str, path: Path) -> tuple[float, dict[str, torch.Tensor]] | None:
        answer = self._ask(name, "gradients", path=str(path))
        self._ask(name, "release")
        if answer is None:
            return None
        return answer["loss"], torch.load(path, weights_only=True)

    def warm_up(self, seconds: float, steps: int | None = None) -> float:
        """Settle ``self.steps``, a sample's: ``steps``, or as many as last ``seconds``.

        Returns the seconds that a round will take.
        """
        for name in self.running:
            answer = self._ask(name, "warm_up", seconds=seconds)
            self._ask(name, "release")
            if answer is not None:
                self.steps[name] = steps or answer["steps"]
                self.expected[name] = (self.steps[name] + 1) * answer["seconds"]
        return sum(self.expected[name] for name in self.running)

    def rounds(
        self, count: int, done: Callable[[str], None] = lambda name: None
    ) -> Iterator[dict[str, float]]:
        """Seconds per step of each provider, round by round; after :meth:`warm_up`.

        A provider that fails is missing from then on. Each round starts with another
        provider, so that none always follows the same one. ``done`` hears of each sample.
        """
        for i in range(count):
            names = self.running
            shift = i % max(1, len(names))
            times = {}
            for name in names[shift:] + names[:shift]:
                answer = self._ask(name, "sample", steps=self.steps[name])
                self._ask(name, "release")
                if answer is not None:
                    times[name] = answer["seconds"]
                done(name)
            yield times


def peaks_seconds(seconds: float, start: float) -> float:
    """What :func:`machine_peaks` takes, where a process starts in ``start`` seconds."""
    # a product and a copy, each of five samples, and the search for their length
    return start + 2 * 7 * max(seconds, 0.1)


def machine_peaks(case: Case, threads: int, seconds: float) -> dict[str, float]:
    """Measured here: ``flops`` per second of a matrix product, ``bytes`` per second of a copy."""
    with WorkerProcess(threads) as worker:
        return worker.ask(
            "peaks", device=case.device, dtype=case.dtype, threads=threads, seconds=seconds
        )
