"""What the site shows besides docs/: the README as its front page, and the files beside it.

Pages link to files as they lie in the repository. Here links to other pages and to pictures
become the site's own, and links to what is not on the site, code above all, become their text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# names on the site of pages that lie beside docs/
BESIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
SHOWN = {".png", ".svg", ".csv"}
# a fenced block, or a link or picture
PART = re.compile(r"^```.*?^```$|(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    sources = {uri: source for source, uri in BESIDE.items()}
    sources |= {f.src_uri: f"docs/{f.src_uri}" for f in files.documentation_pages()}
    for source, uri in BESIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(root / source)))
    linked = {
        path
        for source in sources.values()
        for path in _linked(source, (root / source).read_text(encoding="utf-8"))
        if path.suffix in SHOWN and (root / path).is_file()
    }
    for path in sorted(linked):
        files.append(File.generated(config, str(path), abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    source = next((source for source, shown in BESIDE.items() if shown == uri), f"docs/{uri}")

    def link(found: re.Match[str]) -> str:
        picture, text, target, anchor = found.groups(default="")
        if not target or "://" in target:
            return found[0]
        path = _resolved(source, target)
        shown = BESIDE.get(str(path), str(path).removeprefix("docs/"))
        if files.get_file_from_path(shown) is None:
            return f"`{text}`" if "/" in target and "`" not in text else text
        return f"{picture}[{text}]({os.path.relpath(shown, os.path.dirname(uri) or '.')}{anchor})"

    return PART.sub(link, markdown)


def _linked(source: str, text: str) -> Iterator[PurePosixPath]:
    for found in PART.finditer(text):
        if found[3] and "://" not in found[3]:
            yield _resolved(source, found[3])


def _resolved(source: str, target: str) -> PurePosixPath:
    """The file in the repository that a page links to."""
    return PurePosixPath(os.path.normpath(PurePosixPath(source).parent / target))
