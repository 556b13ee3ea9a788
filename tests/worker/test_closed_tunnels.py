"""Ends of tunnels on their way to the audit log: in order, bounded, said until they are heard."""

from __future__ import annotations

from dataclasses import dataclass, field

from toppy.wire.ipc_message import MAX_MESSAGE_BYTES, ClosedTunnel, ClosedTunnels, encode_message
from toppy.worker.closed_tunnels import ClosedTunnelQueue


def closed(number: int, reason: str = "it was idle") -> ClosedTunnel:
    return ClosedTunnel(
        connection=number,
        quarter_stream_id=0,
        source="192.0.2.1",
        host="a.example",
        port=53,
        subject="alice",
        rule="dns",
        reason=reason,
        duration_s=1.5,
        datagrams_to_target=1,
        bytes_to_target=2,
        datagrams_to_client=3,
        bytes_to_client=4,
        drops=5,
    )


@dataclass
class Channel:
    """What was said; ``takes`` more messages are taken."""

    said: list[ClosedTunnels] = field(default_factory=list)
    takes: int = 1000

    def send(self, message: ClosedTunnels) -> bool:
        if not self.takes:
            return False
        self.takes -= 1
        self.said.append(message)
        return True

    @property
    def connections(self) -> list[int]:
        return [tunnel.connection for message in self.said for tunnel in message.tunnels]


def queue_of(count: int, *, most: int = 10_000) -> ClosedTunnelQueue:
    queue = ClosedTunnelQueue(most=most)
    for number in range(1, count + 1):
        queue.add(closed(number))
    return queue


def test_what_has_ended_is_said_once_with_its_numbers() -> None:
    queue, channel = queue_of(2), Channel()
    queue.send(channel.send, 0.0)
    queue.add(closed(3))
    queue.send(channel.send, 0.1)
    queue.send(channel.send, 0.2)
    assert [message.first for message in channel.said] == [1, 3]
    assert channel.connections == [1, 2, 3]


def test_what_is_acknowledged_is_forgotten() -> None:
    queue, channel = queue_of(3), Channel()
    queue.send(channel.send, 0.0)
    queue.acknowledge(2)
    assert len(queue) == 1
    queue.acknowledge(1)  # late
    assert len(queue) == 1
    queue.acknowledge(99)
    assert len(queue) == 0
    queue.add(closed(4))
    queue.send(channel.send, 0.1)
    assert channel.said[-1].first == 4


def test_what_is_not_acknowledged_for_long_is_said_again() -> None:
    queue, channel = queue_of(2), Channel()
    queue.send(channel.send, 0.0)
    queue.acknowledge(1)
    queue.send(channel.send, 4.9)
    assert channel.connections == [1, 2]
    queue.send(channel.send, 5.0)
    assert channel.connections == [1, 2, 2]
    assert channel.said[-1].first == 2


def test_a_new_control_plane_hears_everything_that_waits() -> None:
    queue, channel = queue_of(3), Channel()
    queue.send(channel.send, 0.0)
    queue.acknowledge(1)
    queue.say_again()
    queue.send(channel.send, 0.1)
    assert channel.connections == [1, 2, 3, 2, 3]


def test_what_the_channel_does_not_take_is_said_the_next_time() -> None:
    queue, channel = queue_of(2), Channel(takes=0)
    queue.send(channel.send, 0.0)
    channel.takes = 1
    queue.send(channel.send, 0.5)
    assert channel.connections == [1, 2]


def test_many_go_in_messages_of_a_bounded_size() -> None:
    queue, channel = ClosedTunnelQueue(), Channel()
    for number in range(500):
        queue.add(closed(number, "x" * 1000))
    queue.send(channel.send, 0.0)
    assert channel.connections == list(range(500))
    assert len(channel.said) > 5
    assert all(len(encode_message(message)) < MAX_MESSAGE_BYTES for message in channel.said)


def test_what_there_is_no_room_for_is_counted_and_the_count_is_said() -> None:
    queue, channel = queue_of(5, most=3), Channel()
    assert queue.is_full
    queue.send(channel.send, 0.0)
    assert (channel.connections, channel.said[0].lost) == ([1, 2, 3], 2)
    queue.acknowledge(3)
    assert len(queue) == 0
    queue.send(channel.send, 0.1)
    assert len(channel.said) == 1
    queue.lost += 1
    queue.send(channel.send, 0.2)
    assert (channel.said[-1].tunnels, channel.said[-1].lost) == ((), 3)
