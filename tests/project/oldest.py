"""Run the tests with the oldest versions that pyproject.toml claims, in an environment of its own.

    make oldest
    make oldest ARGS='tests/conversion -x'

Every requirement of the package, and of what its tests need, is installed at its lower bound,
for the oldest Python that is claimed; what they require in turn is as new as they allow. The
environment stays in ``.oldest`` and is made anew when a requirement has changed. Several GB are
downloaded for it. Options are those of pytest; without any, all tests run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.project.release import ROOT, run

PROJECT = "effdense"
FOLDER = ROOT / ".oldest"
EXTRAS = ("test", "packages", "volumes")


def oldest(requirements: Sequence[str], extras: Sequence[str] = ()) -> list[str]:
    """``name==lower bound`` of each requirement that holds here; of extras of ours, theirs.

    Raises:
        ValueError: for a requirement without a lower bound, which claims what nobody can try.
    """
    holding = [
        requirement
        for requirement in map(Requirement, requirements)
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]
    further = {name for each in holding if each.name == PROJECT for name in each.extras}
    if not further <= set(extras):
        return oldest(requirements, [*extras, *sorted(further - set(extras))])
    return [
        f"{requirement.name}=={lower_bound(requirement)}"
        for requirement in holding
        if requirement.name != PROJECT
    ]


def lower_bound(requirement: Requirement) -> str:
    """The version after ``>=``."""
    bounds = [part.version for part in requirement.specifier if part.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"{requirement} has no lower bound: add the oldest version that passes")
    return bounds[0]


def oldest_python(claimed: str) -> str:
    """The interpreter's name for the least version of ``Requires-Python``."""
    (least,) = [part.version for part in SpecifierSet(claimed) if part.operator == ">="]
    return f"python{least}"


def main(arguments: list[str]) -> int:
    package = metadata.metadata(PROJECT)
    pins = oldest(metadata.requires(PROJECT) or [], EXTRAS)
    interpreter = shutil.which(oldest_python(package["Requires-Python"]))
    if interpreter is None:
        named = oldest_python(package["Requires-Python"])
        print(f"error: {named} is claimed, and not on the PATH: install it", file=sys.stderr)
        return 2
    python = str(FOLDER / "bin" / "python")
    made_for = FOLDER / "pins.txt"
    if not made_for.exists() or made_for.read_text().split() != pins:
        shutil.rmtree(FOLDER, ignore_errors=True)
        run([interpreter, "-m", "venv", str(FOLDER)])
        install = [python, "-m", "pip", "install", "--quiet"]
        run([*install, *pins])
        run([*install, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)])
        made_for.write_text("\n".join(pins))
    print(*pins, sep="\n", flush=True)
    return subprocess.run([python, "-m", "pytest", "-n", "auto", *arguments], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
