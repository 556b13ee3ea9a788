"""What ``toppy udp`` says about its traffic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.cli.output import Traffic, describe, show_bits, summarize

COUNTS = st.integers(0, 1 << 62)


def test_the_summary_has_counts_of_both_directions() -> None:
    traffic = Traffic(peers=1, peers_total=2, out=3, out_bytes=40, back=5, back_bytes=60)
    assert summarize(traffic) == "2 peers, 3 datagrams (40 bytes) out, 5 datagrams (60 bytes) in"


def test_the_summary_names_the_reasons_of_drops() -> None:
    traffic = Traffic(drops={"too_many_peers": 2, "no_connection": 7})
    assert summarize(traffic).endswith(", dropped: no_connection 7, too_many_peers 2")


def test_the_live_line_has_rates_since_the_last_one() -> None:
    before = Traffic(out=100, out_bytes=10_000, back=50, back_bytes=1000)
    now = Traffic(peers=3, out=1100, out_bytes=1_260_000, back=50, back_bytes=1000)
    line = describe("connected", now, before, 0.5)
    assert line == "connected, 3 peers, out 2,000/s 20 Mbit/s, in 0/s 0 bit/s"


def test_the_live_line_ends_with_drops_and_the_problem() -> None:
    now = Traffic(drops={"queue_full": 1200, "too_large": 34})
    line = describe("waiting", now, now, 0.5, "no answer")
    assert line.endswith(", 1,234 dropped · no answer")


@pytest.mark.parametrize(
    ("per_second", "text"),
    [
        (0, "0 bit/s"),
        (999, "999 bit/s"),
        (999.4, "999 bit/s"),
        (999.9, "1 kbit/s"),
        (1200, "1.2 kbit/s"),
        (960e6, "960 Mbit/s"),
        (999.6e6, "1.0 Gbit/s"),
        (3.84e12, "3840.0 Gbit/s"),
    ],
)
def test_rates_have_three_digits_and_a_unit(per_second: float, text: str) -> None:
    assert show_bits(per_second) == text


@given(COUNTS, COUNTS, st.floats(0.001, 1e6))
def test_any_counts_make_one_line(out: int, back: int, elapsed_s: float) -> None:
    now = Traffic(out=out, out_bytes=out, back=back, back_bytes=back, drops={"too_large": out})
    for text in (summarize(now), describe("connected", now, Traffic(), elapsed_s)):
        assert "\n" not in text
        assert "e+" not in text
