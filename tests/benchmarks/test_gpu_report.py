"""``python -m benchmarks.gpu`` where there is no GPU: it runs, and says what it did not run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu import __main__ as command
from gpu import networks, page, speed, targets
from gpu import sheet as sheets
from gpu import tests as tests_section
from gpu.sheet import Row, Sheet, rows_of

from tests.helpers.launch import REPOSITORY

# What a machine with torch, Triton and pytest alone has not; nor has anybody installed effdense.
WITHOUT = """
import sys

from importlib.machinery import PathFinder

NAMES = {"tyro", "torchvision", "matplotlib", "yaml", "tqdm", "pynvml", "sklearn"}

class WithoutThem:
    find_distributions = PathFinder.find_distributions

    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in NAMES else PathFinder.find_spec(name, path, target)

def kind(finder):
    return getattr(finder, "__name__", type(finder).__name__)

sys.meta_path[:] = [
    WithoutThem if f is PathFinder else f
    for f in sys.meta_path if "editable" not in kind(f).lower()
]
"""


@pytest.mark.slow
def test_the_command_runs_with_nothing_but_torch_and_triton(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(tmp_path)
    sections = ["environment", "operations", "checks", "memory", "speed", "sanitizer"]
    options = ["--device", "cpu", "--minutes", "8", "--output", str(tmp_path / "report")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *options, "--sections", *sections],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert list(found) == ["run", *sections, "targets"]
    assert all(row["verdict"] != "fail" for rows in found.values() for row in rows)
    verdicts = {name: {row["verdict"] for row in rows} for name, rows in found.items()}
    assert "pass" in verdicts["operations"]
    assert {"predicted", "skipped"} <= verdicts["memory"]
    assert {"measured", "skipped"} <= verdicts["speed"]
    # a ratio of tiny networks on a processor would be taken for one
    assert verdicts["targets"] == {"skipped"}
    whats = {row["what"]: row for row in found["checks"]}
    assert whats["two runs with --deterministic"]["verdict"] == "pass"
    assert whats["launches of a layer, features"]["verdict"] == "pass"
    html = (tmp_path / "report" / "report.html").read_text()
    assert "Images a second: (16, k4) batch 4, float32" in html
    assert "figures mean nothing" in html


ROWS = {
    "environment": [Row("environment", "torch", "said", note="2.14")],
    "speed": [
        Row("(1, 2) <3>, float32", "naive, channels last", "measured", 100.0, "images/s"),
        Row("(1, 2) <3>, float32", "naive, compiled with graphs", "measured", 150.0, "images/s"),
        Row("(1, 2) <3>, float32", "effdense features, graphs", "measured", 330.0, "images/s"),
        Row("other", "naive, channels last", "measured", 100.0, "images/s"),
        Row("other", "effdense features", "fail", note="OutOfMemoryError: & more"),
    ],
    "memory": [
        Row("prediction", "a", "predicted", 100.0, "MiB"),
        Row("prediction", "a", "measured", 103.0, "MiB"),
    ],
}


class Well(HTMLParser):
    """Tags are closed in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.seen.append(tag)
        assert tag not in ("script", "link", "img")
        if tag not in ("meta", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_beside_it() -> None:
    html = page.html(ROWS)
    parser = Well()
    parser.feed(html)
    assert parser.open == []
    assert parser.seen.count("svg") == 2
    assert "&lt;3&gt;" in html
    assert "<3>" not in html
    assert "OutOfMemoryError: &amp; more" in html.partition("What does not hold")[2]
    assert "figures mean nothing" not in html
    # what was predicted looks otherwise than what was measured
    assert html.count("stroke-dasharray") == 1
    assert "0 checks hold, 1 do not, 0 were not run, 5 figures were measured" in html


def test_targets_are_against_the_best_naive_network() -> None:
    first, second = targets.rows(ROWS["speed"], "cuda")
    assert (first.verdict, first.value) == ("pass", 2.2)
    assert "effdense features, graphs against naive, compiled with graphs" in first.note
    assert second.verdict == "skipped"
    assert targets.rows(ROWS["speed"][:1] + ROWS["speed"][2:3], "cuda")[0].value == 3.3
    slow = [
        *ROWS["speed"][:2],
        Row(ROWS["speed"][0].group, "effdense x", "measured", 299, "images/s"),
    ]
    assert targets.rows(slow, "cuda")[0].verdict == "fail"
    # figures of a processor are neither
    on_processor = targets.rows(ROWS["speed"], "cpu")[0]
    assert (on_processor.verdict, on_processor.value) == ("skipped", None)


def test_a_sheet_keeps_its_rows_and_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, now = tmp_path / "rows" / "a.jsonl", [100.0]
    monkeypatch.setattr(sheets, "time", SimpleNamespace(monotonic=lambda: now[0]))
    sheet = Sheet(path, 5.0)
    sheet.measured("g", "w", 1.5, "MiB", "note")
    now[0] += 4
    assert sheet.left() == 1
    assert sheet.has_time("g", "quick", 1.0)
    now[0] += 0.5
    assert not sheet.has_time("g", "slow", 1.0)
    sheet.failed("g", "f", ValueError("first\nsecond"))
    with path.open("a") as file:
        # the process ended while it wrote
        file.write('{"group": "g", "wh')
    assert rows_of(path) == [
        Row("g", "w", "measured", 1.5, "MiB", "note"),
        Row("g", "slow", "skipped", note="no time left"),
        Row("g", "f", "fail", note="ValueError: first"),
    ]


@pytest.mark.parametrize("network", networks.FULL, ids=lambda network: network.name)
def test_each_way_takes_the_networks_it_is_given(network: networks.Network) -> None:
    ways = {way.name: way for way in speed.WAYS if way.takes(network) and not way.compiled}
    assert any(name.startswith("naive") for name in ways)
    for way in ways.values():
        if way.save is None:
            with torch.device("meta"):
                assert way.build(network)(torch.empty(network.shape)).shape[0] == network.batch
    # a rival is measured as it is fastest
    assert ("naive, channels first" in ways) == (network.dims == 3)
    assert ("torchvision, memory efficient" in ways) == network.name.startswith("densenet121 batch")


@pytest.mark.slow
def test_a_section_that_breaks_leaves_its_rows(tmp_path: Path, monkeypatch: Any) -> None:
    """And one that hangs is ended."""
    Sheet(tmp_path / "row", 9).measured("g", "w", 1.0, "s")
    # without torch, whose import alone may take seconds while others use the machine
    writes = "import shutil, sys; shutil.copy(*sys.argv[1:])\n"
    ends = {"checks": "raise ValueError('broken here')", "memory": "import time; time.sleep(60)"}
    run = subprocess.run

    def instead(command: list[str], **options: Any) -> Any:
        section = command[command.index("--section") + 1]
        path = tmp_path / "rows" / f"{section}.jsonl"
        code = [sys.executable, "-c", writes + ends[section], str(tmp_path / "row"), str(path)]
        return run(code, **{**options, "timeout": 60 if section == "checks" else 4})

    monkeypatch.setattr(subprocess, "run", instead)
    options = ["--device", "cpu", "--output", str(tmp_path), "--sections", *ends]
    assert command.main(options) == 1
    found = json.loads((tmp_path / "report.json").read_text())
    for section, note in (("checks", "ValueError: broken here"), ("memory", "did not keep")):
        assert [row["what"] for row in found[section]] == ["w", section, "time"]
        assert note in found[section][1]["note"]


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.device.a" name="good[cuda]"/>
<testcase classname="tests.device.a" name="bad[cuda]"><failure message="1 != 2"/></testcase>
<testcase classname="tests.device.a" name="no[cuda]"><skipped message="why"/></testcase>
</testsuite></testsuites>"""
SKIPPED = """<testsuites><testsuite>
<testcase classname="tests.device.a" name="no[cuda]"><skipped message="why"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("found", "verdicts"),
    [
        # of other tests a row together, and one for each that fails
        (JUNIT, ["pass", "fail", "skipped", "fail", "fail"]),
        (SKIPPED, ["skipped", "skipped"]),
        ("<testsuites><testsuite/></testsuites>", ["fail", "fail"]),
        (None, ["fail", "fail"]),
    ],
)
def test_tests_are_counted(
    found: str | None, verdicts: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    def instead(command: list[str], **options: Any) -> Any:
        (path,) = [word.partition("=")[2] for word in command if word.startswith("--junitxml=")]
        if found is not None:
            Path(path).write_text(found)
        return subprocess.CompletedProcess(command, 1, "said", "")

    monkeypatch.setattr(subprocess, "run", instead)
    sheet = Sheet(tmp_path / "rows.jsonl", 100)
    tests_section.run(sheet, torch.device("cpu"), True)
    assert [row.verdict for row in rows_of(tmp_path / "rows.jsonl")] == verdicts


@pytest.mark.slow
def test_every_subject_has_tests_for_gpus() -> None:
    files = tests_section.FILES.values()
    listed = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu"]
    done = subprocess.run(
        [*listed, "tests/device", *files], cwd=REPOSITORY, capture_output=True, text=True
    )
    counts = dict(re.findall(r"(tests/\S+): (\d+)", done.stdout))
    assert counts.keys() == {"tests/device/test_on_a_device.py", *files}, done.stdout + done.stderr
    assert sum(map(int, counts.values())) > 500


def test_what_was_not_run_is_said_with_its_reasons() -> None:
    rows = {
        "run": [Row("run", "device", "said", note="cpu, no GPU")],
        "checks": [Row("checks", "a", "skipped", note="no GPU")],
        "speed": [
            Row("one", "b", "skipped", note="no GPU"),
            Row("one", "c", "skipped", note="no time left"),
            Row("section", "time", "said", 1234.5, "s"),
        ],
        "memory": [Row("section", "time", "said", 0.5, "s")],
    }
    html = page.html(rows)
    assert "<title>effdense without a GPU</title>" in html
    assert "figures mean nothing" in html
    left_out = html.partition("What was not run, and why")[2].partition("</ul>")[0]
    assert "<li>no GPU: What must hold on a device (1), Speed (1)</li>" in left_out
    assert "<li>no time left: Speed (1)</li>" in left_out
    assert "Took 1,234 s." in html
    # whose it is, also where it is alone
    alone = page.html({"targets": targets.rows(ROWS["speed"][:3], "cuda")})
    assert "(1, 2) &lt;3&gt;, float32" in alone.partition("<h2>Targets</h2>")[2]
    # a section that left nothing says so
    assert "Nothing was found in its time." in html.partition("<h2>Memory</h2>")[2]
    run = [Row("run", "device", "said", note="cuda")]
    assert "<h1>effdense on a GPU</h1>" in page.html({**ROWS, "run": run})
    card = [Row("environment", "measured on", "said", note="A Card (cuda:0)")]
    named = page.html({**ROWS, "run": run, "environment": card})
    assert "<h1>effdense on A Card (cuda:0)</h1>" in named
    tiny = [*run, Row("run", "networks", "said", note="tiny")]
    assert "Run on tiny networks: figures mean nothing" in page.html({**ROWS, "run": tiny})


def test_a_report_names_no_folders_of_who_ran_it(tmp_path: Path) -> None:
    home = Path.home()
    sheet = Sheet(tmp_path / "rows.jsonl", 5.0)
    sheet.failed("g", "w", OSError(f"{REPOSITORY}/kernels/a.py and {home}/b, not {home}less/c"))
    (row,) = rows_of(tmp_path / "rows.jsonl")
    assert row.note == f"OSError: ./kernels/a.py and ~/b, not {home}less/c"


def test_the_data_are_json_a_row_a_line(tmp_path: Path) -> None:
    sheet = Sheet(tmp_path / "rows.jsonl", 5.0)
    sheet.check("g", "nan", False, float("nan"), "at most 1")
    sheet.check("g", "inf", False, float("inf"))
    rows = rows_of(tmp_path / "rows.jsonl")
    assert [(row.value, row.note) for row in rows] == [(None, "nan; at most 1"), (None, "inf")]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = sheets.as_json({"checks": rows, "empty": []})
    found = json.loads(text, parse_constant=refuse)
    assert [row["what"] for row in found["checks"]] == ["nan", "inf"]
    assert found["empty"] == []
    assert sum("verdict" in line for line in text.splitlines()) == 2


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("mps", "--device expects cuda, cuda:N or cpu, got mps"),
        ("cuda:x", "--device expects cuda, cuda:N or cpu, got cuda:x"),
        ("cuda", "torch sees no GPU here"),
        ("cuda:2", "--device cuda:2: torch sees 2 GPUs, the last is cuda:1"),
    ],
)
def test_a_device_that_is_not_there(
    device: str, said: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    count = 2 if device == "cuda:2" else 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert command.main(["--device", device, "--output", str(tmp_path / "report")]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not (tmp_path / "report").exists()


def test_the_command_itself_leaves_the_gpu_to_its_sections(
    tmp_path: Path, monkeypatch: Any
) -> None:
    def asked(*anything: Any) -> None:
        raise AssertionError("a process that holds a GPU's context takes its memory, or all of it")

    for name in ("get_device_name", "get_device_properties", "set_device", "init"):
        monkeypatch.setattr(torch.cuda, name, asked)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(command, "_all_sections", lambda options: {"speed": ROWS["speed"][:3]})
    assert command.main(["--device", "cuda:0", "--output", str(tmp_path)]) == 0
    found = {
        row["what"]: row["note"]
        for row in json.loads((tmp_path / "report.json").read_text())["run"]
    }
    assert (found["device"], found["networks"]) == ("cuda:0", "full size")
