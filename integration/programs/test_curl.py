"""curl through ``toppy proxy``, ``toppy up`` and ``toppy exec``: large bodies, and a reload while
they are on their way.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from typing import IO

import pytest

from integration.operation import generations, wait_for_generations
from integration.processes import BIN, wait_until
from integration.programs.payload import MIB, blocks, digest, digest_of
from integration.programs.servers import Sites
from integration.programs.through import (
    SITE,
    Client,
    environment,
    in_one_process,
    local_port,
    need,
    ran,
)
from toppy.quic.choose import has_native_engine

pytestmark = in_one_process

_SMALL = 5 * MIB + 1
_REQUESTS = 200
_LARGE = (1024 if has_native_engine() else 64) * MIB
"""1 GiB; the other engine would take minutes."""


def curl(*arguments: str) -> list[str]:
    """A command line that nobody's configuration changes."""
    return [need("curl", "curl"), "--disable", "--silent", "--show-error", "--fail", *arguments]


def read_all(output: IO[bytes], pause_at: int, pause: Callable[[], None]) -> Iterator[bytes]:
    """What comes; ``pause`` is called once, in the middle."""
    count = 0
    while chunk := output.read(MIB):
        if count <= pause_at < count + len(chunk):
            pause()
        count += len(chunk)
        yield chunk


def reload_and_look_around(client: Client, look: Callable[[], None]) -> None:
    """A reload; then something new, while the old generation still has something to do."""
    before = client.gateway.status()["generation"]
    client.gateway.ask("POST", "/reload")
    assert generations(client.gateway) == {before: "draining", before + 1: "active"}
    look()
    assert generations(client.gateway) == {before: "draining", before + 1: "active"}


def wait_until_settled(client: Client) -> None:
    """Until the generation that was left has gone."""
    wait_for_generations(client.gateway, {client.gateway.status()["generation"]: "active"})


@pytest.mark.parametrize(
    ("proxy", "is_https"),
    [
        pytest.param("socks5h", True, id="socks5-https"),
        pytest.param("socks4a", False, id="socks4a-http"),
        pytest.param("http", True, id="connect-https"),
        pytest.param("http", False, id="forwarded-http"),
    ],
)
def test_bodies_arrive_whole_both_ways(
    proxy_port: int, sites: Sites, proxy: str, *, is_https: bool
) -> None:
    url = sites.https_url if is_https else sites.http_url
    common = ["--proxy", f"{proxy}://127.0.0.1:{proxy_port}", "--cacert", str(sites.ca)]
    done = subprocess.run(
        curl(*common, f"{url}/bytes/{_SMALL}"),
        env=environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert digest_of([done.stdout]) == digest(_SMALL)
    done = subprocess.run(
        curl(*common, "--upload-file", "-", f"{url}/digest"),
        input=b"".join(bytes(block) for block in blocks(_SMALL)),
        env=environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.decode() == digest(_SMALL)


def test_a_large_download_survives_a_reload(client: Client, proxy_port: int, sites: Sites) -> None:
    """Over HTTPS; curl writes no faster than this test reads, so that it is not over before."""
    wait_until_settled(client)
    common = ["--proxy", f"socks5h://127.0.0.1:{proxy_port}", "--cacert", str(sites.ca)]
    command = curl(*common, f"{sites.https_url}/bytes/{_LARGE}")

    def look() -> None:
        assert "toppy" in ran(curl(*common, f"{sites.https_url}/"))

    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None
        try:
            found = digest_of(
                read_all(process.stdout, _LARGE // 2, lambda: reload_and_look_around(client, look))
            )
        finally:
            process.kill()
    assert found == digest(_LARGE)
    wait_until_settled(client)


def test_a_large_upload_survives_a_reload(client: Client, sites: Sites) -> None:
    """Over HTTP, through ``toppy up``."""
    wait_until_settled(client)
    with local_port(client, f"{SITE}:{sites.http_port}") as port:
        url = f"http://127.0.0.1:{port}"

        def look() -> None:
            assert "toppy" in ran(curl(f"{url}/"))

        with subprocess.Popen(
            curl("--upload-file", "-", f"{url}/digest"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                for number, block in enumerate(blocks(_LARGE)):
                    if number == _LARGE // MIB // 2:
                        reload_and_look_around(client, look)
                    process.stdin.write(block)
                process.stdin.close()
                said = process.stdout.read()
            finally:
                process.kill()
        assert said.decode() == digest(_LARGE)
    wait_until_settled(client)


def test_no_request_fails_while_the_gateway_is_reloaded_again_and_again(
    client: Client, sites: Sites
) -> None:
    """Each on a connection of its own, eight at a time."""
    wait_until_settled(client)
    length = MIB + 1
    with local_port(client, f"{SITE}:{sites.http_port}") as port:
        command = curl(
            *(
                "--parallel",
                "--parallel-max",
                "8",
                "--no-progress-meter",
                "--header",
                "Connection: close",
            ),
            *("--output", "/dev/null", "--write-out", "%{http_code} %{size_download}\\n"),
            f"http://127.0.0.1:{port}/bytes/{length}?[1-{_REQUESTS}]",
        )
        before = client.gateway.status()["generation"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
            try:
                while process.poll() is None:
                    client.gateway.ask("POST", "/reload")
                assert process.stdout is not None
                lines = process.stdout.read().decode().splitlines()
            finally:
                process.kill()
    assert lines == [f"200 {length}"] * _REQUESTS
    assert process.returncode == 0
    assert client.gateway.status()["generation"] > before + 1
    wait_until_settled(client)


@pytest.mark.parametrize("is_upload", [False, True], ids=["download", "upload"])
def test_a_program_that_is_killed_leaves_no_tunnel_behind(
    client: Client, proxy_port: int, sites: Sites, *, is_upload: bool
) -> None:
    def are_open() -> bool:
        return bool(client.gateway.ask("GET", "/tunnels")["tunnels"])

    what = ("--upload-file", "-", f"{sites.http_url}/digest")
    if not is_upload:
        what = ("--output", "-", f"{sites.http_url}/bytes/{_LARGE}")
    command = curl("--proxy", f"socks5h://127.0.0.1:{proxy_port}", *what)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if is_upload:
                process.stdin.writelines(blocks(5 * MIB))
            else:
                process.stdout.read(5 * MIB)
            assert are_open()
        finally:
            process.kill()
    wait_until("the end of its tunnel", lambda: not are_open())


def test_exec_gives_a_program_its_way_and_returns_its_status(client: Client, sites: Sites) -> None:
    command = [str(BIN / "toppy"), "exec", "--config", str(client.config), "--"]
    there = curl("--cacert", str(sites.ca), f"{sites.https_url}/data.json")
    assert ran([*command, *there]) == '{"text": "all of it came"}'
    missing = curl("--cacert", str(sites.ca), f"{sites.https_url}/nothing")
    done = subprocess.run(
        [*command, *missing],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 22, done.stderr
    assert "404" in done.stderr
