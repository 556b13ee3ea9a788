"""TCP to TCP by reading and writing, where there is no splice(2)."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Final

from toppy.net.tcp import reset_tcp
from toppy.net.tcp_relay import ByteCounters, Rate
from toppy.policy.token_bucket import TokenBucket

_READ_BYTES: Final = 256 << 10
"""What one direction holds at most."""


class CopyRelay:
    """See ``TcpRelay``. A reset is noticed when the socket is read from or written to."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    async def relay(
        self,
        client: socket.socket,
        target: socket.socket,
        rate: Rate | None,
        counters: ByteCounters,
    ) -> str:
        """See ``TcpRelay``."""

        def count_to_target(size: int) -> None:
            counters.to_target += size

        def count_to_client(size: int) -> None:
            counters.to_client += size

        problem = "cancelled"
        try:
            try:
                async with asyncio.TaskGroup() as directions:
                    up = directions.create_task(self._carry(client, target, rate, count_to_target))
                    down = directions.create_task(
                        self._carry(target, client, rate, count_to_client)
                    )
                problem = up.result() or down.result()
            except* OSError as errors:
                problem = str(errors.exceptions[0])
        finally:
            for sock in (client, target):
                if problem:
                    reset_tcp(sock)
                else:
                    sock.close()
        return problem

    async def _carry(
        self,
        source: socket.socket,
        sink: socket.socket,
        rate: Rate | None,
        count: Callable[[int], None],
    ) -> str:
        """To the source's end, which is passed on; returns why the sink takes no more, if that
        comes first. Raises ``OSError`` when the source is gone.
        """
        loop = asyncio.get_running_loop()
        bucket = rate.bucket(self._clock()) if rate is not None else None
        while True:
            most = _READ_BYTES
            if rate is not None and bucket is not None:
                most = min(most, await self._granted(rate, bucket))
            data = await loop.sock_recv(source, most)
            if bucket is not None:
                bucket.take(len(data), self._clock())
            try:
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return ""
                await loop.sock_sendall(sink, data)
            except OSError as error:
                # what the sink has sent before it went is still to be delivered
                return error.strerror or str(error)
            count(len(data))

    async def _granted(self, rate: Rate, bucket: TokenBucket) -> int:
        """Waits until enough may go."""
        while True:
            now = self._clock()
            granted = bucket.available(now)
            if granted >= rate.least:
                return granted
            await asyncio.sleep(rate.wait_s(bucket, now))

    def close(self) -> None:
        """See ``TcpRelay``."""
