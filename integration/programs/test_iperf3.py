"""iperf3 through ``toppy up``: a control connection and the ones that it measures, side by side."""

from __future__ import annotations

import json

import pytest

from integration.programs.through import SPEED, Client, in_one_process, local_port, need, ran

pytestmark = in_one_process

_BYTES = 128_000_000


@pytest.mark.parametrize(
    ("options", "streams", "least"),
    [
        pytest.param((), 1, _BYTES, id="up"),
        pytest.param(("--reverse",), 1, _BYTES, id="down"),
        # it ends when the first of the four has sent its part
        pytest.param(("--bidir", "--parallel=2"), 4, 1, id="both"),
    ],
)
def test_it_measures_to_the_end_in_each_direction(
    client: Client, iperf3_port: int, options: tuple[str, ...], streams: int, least: int
) -> None:
    iperf3 = need("iperf3", "iperf3")
    with local_port(client, f"{SPEED}:{iperf3_port}") as port:
        said = ran(
            [
                *(iperf3, "--client", "127.0.0.1", "--port", str(port), "--json"),
                *(f"--bytes={_BYTES // streams}", *options),
            ]
        )
    end = json.loads(said)["end"]
    assert len(end["streams"]) == streams
    for stream in end["streams"]:
        # the far end stops counting when it is told so, whatever is still on its way
        assert 0 < stream["receiver"]["bytes"] <= stream["sender"]["bytes"]
    assert end["sum_sent"]["bytes"] >= least
