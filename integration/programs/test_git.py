"""git over HTTP through ``toppy proxy``, and over ssh by way of ``toppy ssh-proxy``."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from integration.programs.payload import MIB, blocks
from integration.programs.servers import Sites, SshServer
from integration.programs.through import SHELL, in_one_process, need, ran

pytestmark = in_one_process

_IDENTITY = {
    "GIT_AUTHOR_NAME": "a developer",
    "GIT_AUTHOR_EMAIL": "developer@lan.test",
    "GIT_COMMITTER_NAME": "a developer",
    "GIT_COMMITTER_EMAIL": "developer@lan.test",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
}
"""Nothing of the user's own configuration."""


def git(*arguments: str | Path, directory: Path, environ: dict[str, str] | None = None) -> str:
    """Run git in a directory, with its own home there."""
    settings = {**_IDENTITY, "HOME": str(directory), **(environ or {})}
    return ran([need("git", "git"), *arguments], directory=directory, environ=settings)


@pytest.fixture
def repository(sites: Sites, tmp_path: Path) -> str:
    """The name of a bare repository with three commits, one of them large."""
    work = tmp_path / "work"
    git("init", "--quiet", "--initial-branch=main", work, directory=tmp_path)
    for number, size in enumerate((100, 8 * MIB, 5000)):
        with (work / f"file{number}").open("wb") as file:
            file.writelines(blocks(size))
        git("add", ".", directory=work)
        git("commit", "--quiet", "-m", f"commit {number}", directory=work)
    name = f"{tmp_path.name}.git"
    git("clone", "--quiet", "--bare", work, sites.git_root / name, directory=tmp_path)
    git("config", "http.receivepack", "true", directory=sites.git_root / name)
    return name


def commit_more(clone: Path) -> str:
    """A commit of 4 MiB on top; its name."""
    with (clone / "file1").open("wb") as file:
        file.writelines(bytes(block)[::-1] for block in blocks(4 * MIB))
    git("commit", "--quiet", "-a", "-m", "another", directory=clone)
    return git("rev-parse", "HEAD", directory=clone).strip()


@pytest.mark.parametrize("proxy", ["socks5h", "http"])
def test_clone_and_push_over_https(
    proxy_port: int, sites: Sites, repository: str, tmp_path: Path, proxy: str
) -> None:
    clone = tmp_path / "clone"
    environ = {"GIT_SSL_CAINFO": str(sites.ca)}
    url = f"{sites.https_url}/git/{repository}"
    option = ("-c", f"http.proxy={proxy}://127.0.0.1:{proxy_port}")
    git(*option, "clone", "--quiet", url, clone, directory=tmp_path, environ=environ)
    assert len(git("log", "--format=%H", directory=clone).split()) == 3
    head = commit_more(clone)
    git(*option, "push", "--quiet", "origin", "main", directory=clone, environ=environ)
    assert git("rev-parse", "main", directory=sites.git_root / repository).strip() == head
    git("fsck", "--full", "--strict", directory=sites.git_root / repository)


def test_clone_and_push_over_ssh(
    ssh_server: SshServer, sites: Sites, repository: str, tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    ssh = [need("ssh", "openssh-client"), "-F", str(ssh_server.config)]
    environ = {"GIT_SSH_COMMAND": shlex.join(ssh)}
    path = sites.git_root / repository
    url = f"{SHELL}:{path}"
    git("clone", "--quiet", url, clone, directory=tmp_path, environ=environ)
    assert len(git("log", "--format=%H", directory=clone).split()) == 3
    head = commit_more(clone)
    git("push", "--quiet", "origin", "main", directory=clone, environ=environ)
    assert git("rev-parse", "main", directory=path).strip() == head
