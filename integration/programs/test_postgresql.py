"""psql through ``toppy up``: a session, and 100 MB in and out with COPY."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from functools import partial

import pytest

from integration.processes import wait_until
from integration.programs.payload import blocks, digest_of
from integration.programs.servers import PostgresServer
from integration.programs.through import (
    DATABASE,
    Client,
    environment,
    in_one_process,
    local_port,
    need,
    ran,
)

pytestmark = in_one_process

_ROWS = 25_000
_LINE_BYTES = 4_000


@pytest.fixture(scope="module")
def psql(client: Client, postgres: PostgresServer) -> Iterator[list[str]]:
    """A command line that reaches the server through the gateway."""
    program = need("psql", "postgresql-client")
    with local_port(client, f"{DATABASE}:{postgres.port}") as port:
        yield [
            *(program, "--no-psqlrc", "--quiet", "--tuples-only", "--no-align"),
            *("--set=ON_ERROR_STOP=1", "--host=127.0.0.1", f"--port={port}"),
            *(f"--username={postgres.user}", "--dbname=postgres", "--no-password"),
        ]


def lines() -> Iterator[bytes]:
    """100 MB of rows: a number and text, of which no two are alike."""
    (block,) = blocks(_LINE_BYTES // 2 - 4)
    text = block.hex().encode()
    for number in range(_ROWS):
        yield b"%d\t%s\n" % (number, text[number % 2000 :] + text[: number % 2000])


def test_a_session_with_transactions_and_notifications(psql: list[str]) -> None:
    said = ran(
        psql,
        stdin="""
        CREATE TABLE word (number int PRIMARY KEY, text text);
        LISTEN changes;
        BEGIN;
        INSERT INTO word SELECT n, 'word ' || n FROM generate_series(1, 1000) AS n;
        SAVEPOINT here;
        DELETE FROM word;
        ROLLBACK TO here;
        NOTIFY changes, 'a thousand';
        COMMIT;
        SELECT count(*), max(text) FROM word;
        """,
    )
    assert "1000|word 999\n" in said
    assert 'Asynchronous notification "changes" with payload "a thousand"' in said


def test_copy_carries_100_mb_in_and_out(psql: list[str]) -> None:
    ran([*psql, "--command=CREATE UNLOGGED TABLE load (number int, text text)"])
    copy_in = [*psql, "--command=COPY load FROM STDIN"]
    with subprocess.Popen(copy_in, stdin=subprocess.PIPE, env=environment()) as process:
        assert process.stdin is not None
        process.stdin.writelines(lines())
        process.stdin.close()
        assert process.wait(60) == 0
    assert ran([*psql, "--command=SELECT count(*) FROM load"]) == f"{_ROWS}\n"
    copy_out = [*psql, "--command=COPY load TO STDOUT"]
    with subprocess.Popen(copy_out, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        found = digest_of(iter(partial(process.stdout.read, 1 << 20), b""))
        assert process.wait(60) == 0
    assert found == digest_of(lines())


def test_tls_from_end_to_end_knows_the_server_by_its_name(
    psql: list[str], postgres: PostgresServer
) -> None:
    there = f"host={DATABASE} hostaddr=127.0.0.1 dbname=postgres"
    verified = f"{there} sslmode=verify-full sslrootcert={postgres.ca}"
    question = "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    without_host = [word for word in psql if not word.startswith("--host=")]
    assert ran([*without_host, f"--dbname={verified}", "--command", question]) == "TLSv1.3\n"


def test_a_cancelled_statement_ends_by_a_connection_of_its_own(psql: list[str]) -> None:
    """psql sends the request to cancel on a new connection, to the same local port."""
    is_running = (
        "--command=SELECT 1 FROM pg_stat_activity "
        "WHERE state = 'active' AND query = 'SELECT pg_sleep(60)'"
    )
    command = [*psql, "--command=SELECT pg_sleep(60)"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment()) as process:
        try:
            wait_until("the statement", lambda: ran([*psql, is_running]) == "1\n")
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert b"canceling statement due to user request" in said
