"""What an image is built from where no registry can be reached: a base image, wheels, sources.

The slow parts are kept in the user's cache directory: a minimal Debian, and the wheels of what
toppy needs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from integration.cgroup import CannotStartError
from integration.docker.engine import Engine

PROJECT = Path(__file__).parents[2]
BASE_IMAGE = "toppy-base:test"
IMAGE = "toppy:dev"
"""As docker/compose.yaml calls it."""
_SUITE, _PYTHON = "trixie", "3.13"
_INCLUDE = "python3,python3-venv"
_GLIBC = ("2_17", "2_28", "2_34", "2_39", "2_41")
"""manylinux tags that this Debian can run."""
_PARTS = ("toppy", "docker", "pyproject.toml", "README.md", "LICENSE", "Makefile", ".dockerignore")
_DEADLINE_S = 240.0


def make_base_image(engine: Engine) -> None:
    """Import a minimal Debian with Python. Raises ``CannotStartError``."""
    with _cache() as cache:
        archive = cache / f"{_SUITE}-python.tar"
        if not archive.exists():
            if shutil.which("mmdebstrap") is None:
                raise CannotStartError("mmdebstrap, for a base image, is not installed")
            draft = cache / f"{_SUITE}-python.draft.tar"
            _run(
                *("mmdebstrap", "--quiet", "--variant=minbase", f"--include={_INCLUDE}"),
                *(_SUITE, str(draft), _debian_mirror()),
            )
            draft.replace(archive)
        engine.docker("import", str(archive), BASE_IMAGE)


def make_context(directory: Path) -> None:
    """Copy what the image is built from to ``directory``, wheels and all. Raises
    ``CannotStartError``.
    """
    copy_project(directory)
    with _cache() as cache:
        wheels = directory / "docker" / "wheels"
        for wheel in _dependencies(cache):
            shutil.copy(wheel, wheels)
        # always the same place, so that cargo compiles again only what has changed
        source = cache / "source"
        shutil.rmtree(source, ignore_errors=True)
        copy_project(source)
        target = PROJECT / "toppy" / "quic" / "native" / "target"
        try:
            _run(
                *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
                # the engine is built against Python's stable interface, so it fits the base image's
                "--config-settings=--build-option=--py-limited-api=cp311",
                *("--wheel-dir", str(wheels), str(source)),
                CARGO_TARGET_DIR=str(target if target.exists() else cache / "cargo"),
            )
        except CannotStartError as error:
            raise AssertionError(f"toppy's own wheel: {error}") from None


def copy_project(directory: Path) -> None:
    """The sources, without what was built from them."""
    directory.mkdir(parents=True, exist_ok=True)
    for part in _PARTS:
        if (PROJECT / part).is_dir():
            ignored = shutil.ignore_patterns("target", "*.so", "__pycache__", "*.whl")
            shutil.copytree(PROJECT / part, directory / part, ignore=ignored)
        else:
            shutil.copy2(PROJECT / part, directory / part)


def _dependencies(cache: Path) -> list[Path]:
    """Wheels of what toppy needs, for the base image's Python."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    needed: list[str] = project["dependencies"]
    digest = hashlib.sha256("\n".join([_PYTHON, *sorted(needed)]).encode()).hexdigest()[:16]
    folder = cache / f"wheels-{digest}"
    if not folder.exists():
        draft = cache / "wheels-draft"
        shutil.rmtree(draft, ignore_errors=True)
        pip = (sys.executable, "-m", "pip")
        # has no wheel on the index; pip downloads for another Python only what has
        sdnotify = next(name for name in needed if name.startswith("sdnotify"))
        _run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(draft), sdnotify)
        _run(
            *(*pip, "download", "--quiet", "--only-binary=:all:", f"--python-version={_PYTHON}"),
            *("--implementation=cp", f"--abi=cp{_PYTHON.replace('.', '')}"),
            *("--abi=abi3", "--abi=none", f"--find-links={draft}", f"--dest={draft}"),
            *(f"--platform=manylinux_{glibc}_{os.uname().machine}" for glibc in _GLIBC),
            *(f"--platform=manylinux2014_{os.uname().machine}", *needed),
        )
        draft.replace(folder)
    return sorted(folder.glob("*.whl"))


def _debian_mirror() -> str:
    """The one that this host uses."""
    places = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    for place in places:
        text = place.read_text(errors="replace") if place.is_file() else ""
        found = re.search(r"^(?:URIs:|deb(?: \[.*?\])?)\s+(https?://\S+/debian/?)\s", text, re.M)
        if found:
            return found[1]
    return "http://deb.debian.org/debian"


@contextlib.contextmanager
def _cache() -> Iterator[Path]:
    """The cache directory, for this process alone."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(base) / "toppy" / "integration-docker"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield cache


def _run(*arguments: str, **environ: str) -> None:
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        timeout=_DEADLINE_S,
        check=False,
        env={**os.environ, **environ},
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
        raise CannotStartError(f"{' '.join(arguments[:4])}: {said[-1]}")
