"""The documentation names what there is; that it builds is `make check`'s business."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import bench
import pytest
from harness import roofline
from harness.case import Case

import effdense
from effdense.kernels import traffic

ROOT = Path(__file__).resolve().parents[2]
# the columns of docs/traffic.md, after naive and checkpointed
SAVED = ("bottlenecks", "features", "input")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def test_the_api_reference_is_exactly_what_the_package_exports() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    documented = re.findall(r"^::: effdense\.(\w+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(effdense.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    own = [target for target in targets if "://" not in target]
    missing = [target for target in own if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_lead_to_them(page: Path) -> None:
    """With the anchors that both GitHub and the site make of headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text):
        if "://" not in target:
            other = (page.parent / target) if target else page
            assert anchor in anchors(other), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles]
    return {word.replace(" ", "-") for word in words}


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_shown_whole(page: Path) -> None:
    """What docs/site.css shows without wrapping in a window of 1280 pixels."""
    code = re.findall(r"^```.*?^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert [line for block in code for line in block.splitlines() if len(line) > 90] == []


def tracked() -> set[Path]:
    """The repository's files, relative to its root."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    if not files:
        pytest.skip("no clone of git's")
    return {Path(path) for path in files.splitlines()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """By their path in the repository or in the package, or by their name alone."""
    paths = tracked()
    known = {str(path) for path in paths} | {path.name for path in paths}
    known |= {str(path.relative_to("effdense")) for path in paths if path.parts[0] == "effdense"}
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_0-9]+\.(?:py|c|h|png|svg))`", page.read_text())
    # what commands write
    written = {"loss.png", "error.png", "images-per-second.png", "memory.png", "graph.svg"}
    assert set(named) <= known | written


def test_every_fault_has_its_test() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    table = page[page.index("| fault |") :].partition("\n\n")[0].splitlines()[2:]
    named = [name for row in table for name in re.findall(r"`(\w+)`", row.split("|")[3])]
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "engine").glob("test_*.py"))
    assert len(named) >= len(table) > 10
    assert [name for name in named if not re.search(rf"^def test_\w*{name}", tests, re.M)] == []


def test_the_names_in_contributing_are_in_the_code() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    code = " ".join(re.findall(r"`([^`]+)`", prose))
    named = set(re.findall(r"\w+", re.sub(r"\S+\.(?:py|md)\b", "", code)))
    sources = [path for path in tracked() if path.suffix in (".py", ".c", ".toml", "")]
    known = set(re.findall(r"\w+", " ".join((ROOT / path).read_text() for path in sources)))
    assert named - known <= {"NAME_reference", "Unreleased"}


def test_the_traffic_of_kernels_is_as_they_say() -> None:
    assert traffic.markdown() in (ROOT / "docs" / "traffic.md").read_text()


def test_the_messages_in_troubleshooting_are_said() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"^\*\*(.*?)\*\*", text, re.MULTILINE | re.DOTALL)
    headings += re.findall(r"^\| (\".*?) \|", text, re.MULTILINE)
    quoted = {message for heading in headings for message in re.findall(r'"([^"]+)"', heading)}
    sources = (path for path in tracked() if path.parts[0] in ("effdense", "kernels"))
    code = "".join((ROOT / path).read_text() for path in sources if path.suffix == ".py")
    others = {
        "Expected more than 1 value per channel",
        "only 0-dimensional arrays can be converted",
    }
    parts = [part for message in quoted - others for part in message.split("…")]
    assert len(parts) > 8
    assert [part for part in parts if part not in code] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "case"),
    [
        ("DenseNet-BC (100, k 12), 64", Case("densenet_bc", 100, 12, 64, 32)),
        ("DenseNet-BC (250, k 24), 64", Case("densenet_bc", 250, 24, 64, 32)),
        ("densenet121, 224x224, 32", Case("densenet121", 0, 0, 32, 224)),
    ],
)
def test_the_bytes_of_a_step_are_the_roofline_s(row: str, case: Case) -> None:
    text = (ROOT / "docs" / "traffic.md").read_text()
    said = re.findall(r"([\d.]+) GB", text[text.index(f"| {row} |") :].partition("\n")[0])
    providers = ["naive", "checkpoint", *(f"effdense-{m}" for m in SAVED)]
    # plain autograd's operations are counted by taking a step, which takes seconds where it is deep
    skipped = 2 if case.depth > 100 else 0
    for provider, gigabytes in list(zip(providers, said, strict=True))[skipped:]:
        counted = sum(operation.nbytes for operation in roofline.operations(provider, case))
        assert f"{counted / 1e9:.1f}" == gigabytes, provider


def test_every_promise_is_held() -> None:
    """By a test that is there, or by a command of the Makefile or of effdense."""
    text = (ROOT / "docs" / "promises.md").read_text()
    rows = re.findall(r"^\| (?!promise|---)(.*) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) > 8
    for promise, holders in rows:
        files = re.findall(r"`((?:tests|benchmarks)/\S+\.py)`", holders)
        assert files, promise
        assert all((ROOT / path).is_file() for path in files), holders
    assert all((ROOT / path).is_file() for path in re.findall(r"`(tests/\S+\.py)`", text))
    said = {float(number) for number in re.findall(r"at least\s(1\.\d+)\s+times", text)}
    assert said == set(bench.FLOORS.values())


def test_the_changelog_is_in_its_form() -> None:
    """Keep a Changelog 1.1.0: versions, newest first, with their kinds of changes, in order."""
    kinds = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    title, *versions = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert title.startswith("# Changelog\n")
    assert versions[0].startswith("[Unreleased]\n")
    for version in versions:
        assert re.match(r"\[(Unreleased|\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d)", version)
        _, *parts = re.split(r"^### ", version, flags=re.MULTILINE)
        named = [part.partition("\n")[0] for part in parts]
        assert named == [kind for kind in kinds if kind in named]
        for part in parts:
            lines = part.splitlines()[1:]
            assert all(re.match(r"- \S|  \S|$", line) for line in lines)
            assert any(line.startswith("- ") for line in lines)
