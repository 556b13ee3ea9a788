"""Workers of an earlier control plane: what they hold, and where they listen."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import cast

import pytest

from tests.control.stage import FakeProcess
from toppy.config.gateway import GatewayConfig, parse_gateway_config
from toppy.control import found_workers
from toppy.control.found_workers import as_it_listens, find_workers
from toppy.control.listeners import close_all
from toppy.control.saved_state import FORMAT, SavedState, SavedWorker
from toppy.net import steering
from toppy.system.processes import Process


def saved(
    *, rows: tuple[int, ...] = (6, 6), slots: tuple[int, ...] = (), is_steered: bool | None = True
) -> SavedState:
    return SavedState(
        format=FORMAT,
        reset_key=b"",
        token_key=b"",
        certificate_chain_pem=b"",
        private_key_pem=b"",
        generation=1,
        generation_active=1,
        revision=1,
        started_at=0.0,
        worker_deaths=0,
        socket_rows=rows,
        past={},
        workers=tuple(SavedWorker(slot, 1, slot, 1, 1, 0.0, "s") for slot in slots),
        generations=(),
        is_steered=is_steered,
    )


def held(monkeypatch: pytest.MonkeyPatch, counts: list[int]) -> list[int]:
    """Each worker that is found holds so many descriptors; all that were handed over."""
    given: list[int] = []
    left = list(counts)

    def find(_: SavedWorker, __: str) -> tuple[Process, socket.socket, list[int]]:
        descriptors = []
        for _number in range(left.pop(0)):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                descriptors.append(sock.detach())
        given.extend(descriptors)
        return (
            cast(Process, FakeProcess(is_child=False)),
            socket.socket(socket.AF_UNIX),
            descriptors,
        )

    monkeypatch.setattr(found_workers, "find_saved_worker", find)
    return given


@pytest.mark.parametrize(
    ("counts", "most"), [([8], 4), ([8, 12], 6), ([12, 8], 6), ([12, 12], 6), ([7, 8], 4), ([7], 0)]
)
def test_a_worker_from_before_the_sockets_became_more_is_taken_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, counts: list[int], most: int
) -> None:
    given = held(monkeypatch, counts)
    inherited: dict[str, socket.socket] = {}
    slots = tuple(range(len(counts)))
    found = find_workers(saved(slots=slots), str(tmp_path), inherited)
    assert [known.slot for known, _, _ in found] == list(slots)
    assert sorted(inherited) == [f"quic.{row}.{index}" for row in (0, 1) for index in range(most)]
    kept = {sock.fileno() for sock in inherited.values()}
    for descriptor in given:
        if descriptor not in kept:
            with pytest.raises(OSError, match="Bad file"):
                os.fstat(descriptor)
    close_all(inherited)
    for _, _, line in found:
        line.close()


def config(*addresses: str, is_steered: bool = True) -> GatewayConfig:
    listen = ", ".join(f'"{address}"' for address in addresses)
    text = f"[listen]\nquic = [{listen}]\nsteering = {str(is_steered).lower()}\n"
    text += '[auth]\ntoken = "12345678"\n'
    return parse_gateway_config(text, "gateway.toml", {}).config


def test_workers_that_go_on_keep_their_addresses_and_their_steering(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steering, "is_supported", lambda: True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        here = f"127.0.0.1:{sock.getsockname()[1]}"
        theirs = {"quic.0.0": sock}
        for same in (config(here), config("127.0.0.1:0")):
            assert as_it_listens(same, saved(), theirs) is same
            assert as_it_listens(same, saved(is_steered=None), theirs) is same
        for other in (config("127.0.0.1:1"), config("127.0.0.2:0"), config(here, "127.0.0.2:0")):
            assert as_it_listens(other, saved(), theirs).listen.quic == (here,)
        unsteered = as_it_listens(config(here, is_steered=False), saved(), theirs)
        assert unsteered.listen.steering is True
        monkeypatch.setattr(steering, "is_supported", lambda: False)
        same = config(here)
        assert as_it_listens(same, saved(is_steered=False), theirs) is same
