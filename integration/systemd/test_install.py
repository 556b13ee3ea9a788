"""``make install`` and ``make uninstall``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from integration.systemd.service import CONFIG, PROJECT, UNIT, Service

pytestmark = [pytest.mark.xdist_group("systemd"), pytest.mark.timeout(400)]


def make(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        cwd=directory,
    )


def files_under(root: Path) -> list[str]:
    """What is there, without the insides of the program's own directory."""
    found = (path.relative_to(root) for path in root.rglob("*") if not path.is_dir())
    return sorted({str(path).partition("/toppy/lib")[0] for path in found})


@pytest.fixture
def package(sources: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A wheel of toppy. What toppy needs is left out: nothing is started here."""
    monkeypatch.setenv("PIP_NO_DEPS", "1")
    (wheel,) = (sources / "docker" / "wheels").glob("toppy-*.whl")
    return f"PACKAGE={wheel}"


def test_a_package_is_made_with_destdir_and_removed_again(
    tmp_path: Path, sources: Path, package: str
) -> None:
    root = tmp_path / "package root"
    where = [f"DESTDIR={root}", "PREFIX=/usr", f"PYTHON={sys.executable}"]
    done = make(sources, "install", *where, "OLDER_SYSTEMD=1", package)
    assert done.returncode == 0, done.stderr
    units = root / "usr/lib/systemd/system"
    for name in ("toppy", "toppy-gw"):
        link = root / "usr/bin" / name
        assert link.readlink() == Path("../lib/toppy/bin") / name
        assert link.read_text().startswith("#!/usr/lib/toppy/bin/python\n")
    assert "ExecStart=/usr/bin/toppy-gw run" in (units / UNIT).read_text()
    assert "/usr/local" not in (units / UNIT).read_text()
    assert (units / f"{UNIT}.d/older-systemd.conf").exists()
    assert (root / "usr/lib/sysusers.d/toppy-gw.conf").exists()
    assert (root / "usr/lib/tmpfiles.d/toppy-gw.conf").exists()
    # no file remembers where it was made
    made_at = str(root).encode()
    for path in root.rglob("*"):
        assert path.is_dir() or path.is_symlink() or made_at not in path.read_bytes(), path

    (units / "other.service").touch()
    assert make(sources, "uninstall", *where).returncode == 0
    assert files_under(root) == [
        "etc/toppy/gateway.toml",
        "etc/toppy/gateway.toml.example",
        "usr/lib/systemd/system/other.service",
    ]


def test_another_prefix_has_its_unit_where_systemd_looks_and_a_configuration_is_kept(
    tmp_path: Path, sources: Path, package: str
) -> None:
    unit = tmp_path / "usr/local/lib/systemd/system" / UNIT
    dropin = unit.with_name(f"{UNIT}.d") / "older-systemd.conf"
    for path in (tmp_path / CONFIG, dropin):
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    where = [f"DESTDIR={tmp_path}", "PREFIX=/opt/gateway", f"PYTHON={sys.executable}"]
    assert make(sources, "install", *where, "OLDER_SYSTEMD=0", package).returncode == 0
    assert "ExecStart=/opt/gateway/bin/toppy-gw run" in unit.read_text()
    assert (tmp_path / CONFIG).read_text() == "mine"
    assert (tmp_path / CONFIG).with_name("gateway.toml.example").exists()
    assert not dropin.parent.exists()


def test_an_old_python_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    root = tmp_path / "root"
    done = make(PROJECT, "install", f"DESTDIR={root}", f"PYTHON={python}")
    assert done.returncode != 0
    assert "Python 3.11 or later" in done.stderr
    assert not root.exists()


def test_installed_files_belong_to_root_and_the_commands_work(installed: Service) -> None:
    machine = installed.machine
    facts = machine.do("stat", "--format=%a %U %G", "/etc/toppy", "/usr/local/lib/toppy")
    assert facts.splitlines() == ["750 root toppy-gw", "755 root root"]
    assert machine.do("find", "/usr/local/lib/toppy", "!", "-user", "root") == ""
    assert machine.do("toppy-gw", "--version").startswith("toppy-gw ")
    assert machine.do("toppy", "--version").startswith("toppy ")


def test_unit_is_what_systemd_understands(installed: Service) -> None:
    done = installed.machine.run("systemd-analyze", "verify", UNIT)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_first_start_says_what_to_do(first_start: str) -> None:
    # so `make install` has made no secret
    assert "cannot read /etc/toppy/server.pem" in first_start
    assert "toppy-gw init /etc/toppy" in first_start


def test_init_gives_the_service_its_secrets_and_keeps_the_others(configured: Service) -> None:
    facts = configured.machine.do("sh", "-c", "stat --format='%n %a %U' /etc/toppy/*")
    lines = map(str.split, facts.splitlines())
    modes = {Path(name).name: f"{mode} {user}" for name, mode, user in lines}
    assert modes == {
        "ca-key.pem": "600 root",
        "ca.pem": "644 root",
        "client.toml": "600 root",
        "gateway.toml": "644 root",
        "gateway.toml.example": "644 root",
        "server-key.pem": "600 toppy-gw",
        "server.pem": "644 root",
        "token": "600 toppy-gw",
    }
    again = configured.machine.run("toppy-gw", "init", "/etc/toppy")
    assert again.returncode != 0
    assert "nothing was written" in again.stderr
