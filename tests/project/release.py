"""Build what a release uploads, and try it in clean environments.

    make dist
    make dist ARGS='--full --python python3.10 python3.13'

Builds the source archive from the tracked files, the wheel from the source archive, and looks
into the wheel. Then each of the two is installed into a fresh virtual environment, where
smoke.py runs, with the C compiler that there is and without any. By default the environment finds
torch and the like where this interpreter does, which takes seconds; with --full it installs every
dependency, for any interpreter.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Archives(NamedTuple):
    """The two files of a release."""

    source: Path
    wheel: Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python", nargs="+", default=[sys.executable], help="interpreters (default: this one)"
    )
    parser.add_argument(
        "--full", action="store_true", help="install the dependencies too, several GB"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="default: dist")
    args = parser.parse_args(argv)
    if args.python != [sys.executable] and not args.full:
        parser.error("another interpreter needs packages of its own: add --full")
    archives = build(args.output)
    strange = strangers(archives.wheel)
    if strange:
        print(f"{archives.wheel.name} must not hold {', '.join(strange)}", file=sys.stderr)
        return 1
    for python in args.python:
        for archive in archives:
            print(f"{archive.name}: {tried(archive, python, args.full)}", flush=True)
    return 0


def build(output: Path) -> Archives:
    """The archives of the tracked files as they are now, in ``output``.

    From a copy: what lies about in a working tree would find its way into them.
    """
    with tempfile.TemporaryDirectory() as folder:
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
            check=True,
            capture_output=True,
            text=True,
        )
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, Path(folder) / name)
        built = Path(folder) / "dist"
        run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built), folder])
        output.mkdir(parents=True, exist_ok=True)
        (source,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
        return Archives(*(Path(shutil.copy(path, output)) for path in (source, wheel)))


def strangers(wheel: Path) -> list[str]:
    """What a wheel holds at its top beside the package and its metadata.

    Above all no ``kernels``: that name belongs to another package.
    """
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    return sorted(top for top in tops if top != "effdense" and not top.endswith(".dist-info"))


def tried(archive: Path, python: str, full: bool = False) -> str:
    """What smoke.py says in a fresh environment into which ``archive`` was installed."""
    with tempfile.TemporaryDirectory() as folder:
        run([python, "-m", "venv", folder, *(() if full else ["--without-pip"])])
        own = Path(folder) / "bin" / "python"
        if full:
            run([str(own), "-m", "pip", "install", "--quiet", str(archive)])
        else:
            ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
            packages = run([str(own), "-c", ask])
            shared = [path for path in sys.path if path.endswith("site-packages")]
            (Path(packages.strip()) / "shared.pth").write_text("\n".join(shared))
            install = ["install", "--quiet", "--no-deps", "--no-build-isolation", str(archive)]
            # the environment has no pip: this interpreter's acts on it
            run([sys.executable, "-m", "pip", "--python", str(own), *install])
        # isolated: neither the script's folder nor PYTHONPATH leads to the clone
        smoke = [str(own), "-I", str(ROOT / "tests" / "project" / "smoke.py")]
        said = run(smoke, folder)
        nothing = {"CC": str(Path(folder) / "no-compiler"), "XDG_CACHE_HOME": folder}
        without = run(smoke, folder, nothing)
    if 'backend "torch"' not in without:
        raise SystemExit(f"without a C compiler torch's operations were not used: {without}")
    if not said.strip().endswith("effdense/__init__.py") or folder not in said:
        raise SystemExit(f"not the installed package was tried: {said}")
    return said.partition(folder)[0].rstrip(", \n") + '; without a C compiler backend "torch"'


def run(
    command: Sequence[str], folder: str | None = None, variables: Mapping[str, str] | None = None
) -> str:
    """What a command prints; where it fails, this program ends with what it said.

    Args:
        command: its words.
        folder: where it runs; here by default.
        variables: of its environment, beside ours.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**os.environ, **(variables or {})}
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
