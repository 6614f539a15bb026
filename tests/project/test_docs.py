"""The documentation names what there is; that it builds is `make check`'s business."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import effdense

ROOT = Path(__file__).resolve().parents[2]
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
