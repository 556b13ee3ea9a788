"""Host names to addresses, with a deadline: A and AAAA asked together, answers kept a short while.

Names are absolute: no search list is applied, so that what policy judged is what is asked for.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

import dns.asyncbackend
import dns.asyncresolver
import dns.exception
import dns.name
import dns.nameserver
import dns.rcode
import dns.rdatatype
import dns.resolver

from toppy.errors import ConfigError, TargetError

MAX_ADDRESSES: Final = 16
"""Of one name; a tunnel tries them in order, and further ones would not be reached."""
MAX_CACHED_NAMES: Final = 1024
MAX_CACHE_S: Final = 60.0
"""Upper bound of an answer's TTL here, so that a moved target is found again soon."""
MAX_LOOKUPS: Final = 256
"""At once; each has two sockets. Others wait, within their deadline."""
SECOND_FAMILY_S: Final = 0.25
"""How long an answer of one address family waits for the other. Some servers never answer AAAA.
RFC 8305 section 3 says 50 ms for a client that tries both; a tunnel is opened once."""

_HOSTS_FILE = Path("/etc/hosts")
_MAX_HOSTS_BYTES = 4 << 20
_MAX_ALIASES = 8
_TRIES = 3
_LOCALHOST = ("127.0.0.1", "::1")


class _Failure(IntEnum):
    """Why a query gave no address; the lowest one explains the name's failure best."""

    NAME_UNKNOWN = 0
    TIMEOUT = 1
    SERVER = 2
    NO_ADDRESS = 3


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Of one query."""

    addresses: tuple[str, ...] = ()
    ttl_s: float = 0.0
    failure: _Failure = _Failure.NO_ADDRESS
    details: str = ""


class Resolver:
    """Resolves through the given nameservers, or the system's when there are none.

    ``nameservers`` are ``address``, ``address:port`` or ``[address]:port``; the system's include
    its hosts file, read again when it changes. ``timeout_s`` bounds one ``resolve`` as a whole.
    ``clock`` gives monotonic seconds. Raises ``ConfigError`` for a malformed nameserver.
    """

    def __init__(
        self,
        nameservers: Sequence[str] = (),
        timeout_s: float = 3.0,
        *,
        clock: Callable[[], float] = time.monotonic,
        hosts_file: Path = _HOSTS_FILE,
    ) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._hosts = None if nameservers else _HostsFile(hosts_file)
        self._dns = _dns_resolver(nameservers)
        self._dns.timeout = timeout_s / _TRIES
        self._dns.lifetime = timeout_s
        self._cache: OrderedDict[str, tuple[tuple[str, ...], float]] = OrderedDict()
        self._under_way: dict[str, asyncio.Future[tuple[str, ...] | TargetError | None]] = {}
        self._lookups = asyncio.Semaphore(MAX_LOOKUPS)

    async def resolve(self, name: str) -> tuple[str, ...]:
        """The addresses of ``name`` in the order to try: IPv6 and IPv4 in turn (RFC 8305 section
        4), at most ``MAX_ADDRESSES``, never none.

        Raises ``TargetError`` with ``dns_timeout`` (504) or ``dns_error`` (502), RFC 9209 sections
        2.3.1 and 2.3.2. A numeric address is its own answer.
        """
        name = name.lower().removesuffix(".")
        known = self._without_asking(name)
        if known is not None:
            return known
        while True:
            cached = self._cached(name)
            if cached is not None:
                return cached
            under_way = self._under_way.get(name)
            if under_way is None:
                return await self._lead(name)
            # the same question is being asked: its answer is ours, unless its asker gives up
            answer = await asyncio.shield(under_way)
            if isinstance(answer, TargetError):
                raise TargetError(
                    str(answer), status=answer.status, proxy_status=answer.proxy_status
                )
            if answer is not None:
                return answer

    def _without_asking(self, name: str) -> tuple[str, ...] | None:
        try:
            return (str(ipaddress.ip_address(name)),)
        except ValueError:
            pass
        if self._hosts is not None:
            addresses = self._hosts.lookup(name)
            if addresses:
                return addresses
        if name == "localhost" or name.endswith(".localhost"):
            return _LOCALHOST  # RFC 6761 section 6.3: never asked for
        return None

    async def _lead(self, name: str) -> tuple[str, ...]:
        future = asyncio.get_running_loop().create_future()
        self._under_way[name] = future
        answer: tuple[str, ...] | TargetError | None = None
        try:
            answer = await self._lookup(name)
        except TargetError as error:
            answer = error
            raise
        finally:
            del self._under_way[name]
            future.set_result(answer)
        return answer

    async def _lookup(self, name: str) -> tuple[str, ...]:
        try:
            async with asyncio.timeout(self._timeout_s), self._lookups:
                outcomes = await self._ask_both(name)
        except TimeoutError:
            raise self._timed_out(name) from None
        addresses = _interleave([outcome.addresses for outcome in outcomes])
        if not addresses:
            raise self._error(name, min(outcomes, key=lambda outcome: outcome.failure))
        self._keep(name, addresses, min(o.ttl_s for o in outcomes if o.addresses))
        return addresses

    async def _ask_both(self, name: str) -> list[_Outcome]:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._ask(name, kind))
                for kind in (dns.rdatatype.AAAA, dns.rdatatype.A)
            ]
            done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if pending:
                is_found = any(task.result().addresses for task in done)
                await asyncio.wait(pending, timeout=SECOND_FAMILY_S if is_found else None)
            for task in tasks:
                task.cancel()  # nothing happens to one that is done
        return [task.result() for task in tasks if not task.cancelled()]

    async def _ask(self, name: str, kind: dns.rdatatype.RdataType) -> _Outcome:
        try:
            question = dns.name.from_text(name, dns.name.root)
            for _ in range(_MAX_ALIASES):
                answer = await self._dns.resolve(
                    question,
                    kind,
                    raise_on_no_answer=False,
                    search=False,
                    backend=dns.asyncbackend.get_backend("asyncio"),
                )
                if answer.rrset is not None:
                    addresses = tuple(
                        record.address for record in itertools.islice(answer.rrset, MAX_ADDRESSES)
                    )
                    return _Outcome(addresses, float(answer.chaining_result.minimum_ttl))
                if answer.canonical_name == question:
                    return _Outcome(details="it has no address (NODATA)")
                # a server that does not follow the alias itself
                question = answer.canonical_name
        except dns.resolver.NXDOMAIN:
            return _Outcome(failure=_Failure.NAME_UNKNOWN, details="it does not exist (NXDOMAIN)")
        except dns.exception.Timeout:
            return _Outcome(failure=_Failure.TIMEOUT)
        except dns.resolver.NoNameservers as error:
            return _Outcome(failure=_Failure.SERVER, details=_server_failure(error))
        except dns.exception.DNSException as error:
            details = f"it cannot be asked for ({type(error).__name__})"
            return _Outcome(failure=_Failure.SERVER, details=details)
        return _Outcome(failure=_Failure.SERVER, details="its chain of aliases is too long")

    def _timed_out(self, name: str) -> TargetError:
        return TargetError(
            f"no nameserver answered for {name} within {self._timeout_s:g} s",
            status=504,
            proxy_status="dns_timeout",
        )

    def _error(self, name: str, outcome: _Outcome) -> TargetError:
        if outcome.failure is _Failure.TIMEOUT:
            return self._timed_out(name)
        return TargetError(
            f"cannot resolve {name}: {outcome.details}", status=502, proxy_status="dns_error"
        )

    def _cached(self, name: str) -> tuple[str, ...] | None:
        entry = self._cache.get(name)
        if entry is None:
            return None
        addresses, expires = entry
        if self._clock() >= expires:
            del self._cache[name]
            return None
        self._cache.move_to_end(name)
        return addresses

    def _keep(self, name: str, addresses: tuple[str, ...], ttl_s: float) -> None:
        if ttl_s <= 0:
            return
        self._cache[name] = (addresses, self._clock() + min(ttl_s, MAX_CACHE_S))
        if len(self._cache) > MAX_CACHED_NAMES:
            self._cache.popitem(last=False)


class _HostsFile:
    """A hosts file, read again when its time or size changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version: tuple[int, int] | None = None
        self._names: dict[str, tuple[str, ...]] = {}

    def lookup(self, name: str) -> tuple[str, ...]:
        try:
            stat = self._path.stat()
            version = (stat.st_mtime_ns, stat.st_size)
            if version != self._version:
                with self._path.open("rb") as file:
                    text = file.read(_MAX_HOSTS_BYTES).decode("ascii", "replace")
                self._names = parse_hosts(text)
                self._version = version
        except OSError:
            self._names, self._version = {}, None
        return self._names.get(name, ())


def parse_hosts(text: str) -> dict[str, tuple[str, ...]]:
    """Names and their addresses from the text of a hosts file (hosts(5)), in the file's order.

    Lines that are not understood, and addresses with a zone, are skipped.
    """
    found: dict[str, dict[str, None]] = {}
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if len(words) < 2 or "%" in words[0]:
            continue
        try:
            address = str(ipaddress.ip_address(words[0]))
        except ValueError:
            continue
        for name in words[1:]:
            found.setdefault(name.lower().removesuffix("."), {})[address] = None
    return {name: tuple(addresses)[:MAX_ADDRESSES] for name, addresses in found.items()}


def parse_nameserver(text: str) -> tuple[str, int]:
    """``address``, ``address:port`` or ``[address]:port``; raises ``ConfigError``."""
    host, port_text = text, "53"
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            host = ""
        elif rest:
            port_text = rest[1:]
    elif text.count(":") == 1:
        host, _, port_text = text.partition(":")
    try:
        address = str(ipaddress.ip_address(host))
        port = int(port_text) if port_text.isascii() and port_text.isdigit() else 0
        if not 1 <= port <= 65535:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f'resolver.nameservers: "{text}" is not an address, with or without a port, '
            'such as "192.0.2.53", "192.0.2.53:5353" or "[2001:db8::53]:53"',
            key="resolver.nameservers",
        ) from None
    return address, port


def _dns_resolver(nameservers: Sequence[str]) -> dns.asyncresolver.Resolver:
    if nameservers:
        resolver = dns.asyncresolver.Resolver(configure=False)
        resolver.nameservers = [
            dns.nameserver.Do53Nameserver(*parse_nameserver(text)) for text in nameservers
        ]
        return resolver
    try:
        return dns.asyncresolver.Resolver()
    except dns.resolver.NoResolverConfiguration:
        # a container without resolv.conf: numeric targets work, names fail with a reason
        return dns.asyncresolver.Resolver(configure=False)


def _server_failure(error: dns.resolver.NoNameservers) -> str:
    errors = error.kwargs.get("errors") or []
    for _, _, _, reason, response in reversed(errors):
        if response is not None and response.rcode() != dns.rcode.NOERROR:
            return f"the nameserver failed ({dns.rcode.to_text(response.rcode())})"
        if isinstance(reason, OSError):
            return "no nameserver can be reached"
    return "the nameserver's answer is malformed" if errors else "there is no nameserver to ask"


def _interleave(families: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*families))
    return tuple(dict.fromkeys(address for address in in_turn if address))[:MAX_ADDRESSES]
