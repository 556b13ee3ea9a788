"""What operators ask of the running gateway, through the unix socket of its runtime directory.

HTTP with JSON. A refusal says the cause and what to do next: ``{"error": "…"}``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from toppy.errors import ToppyError

ADMIN_SOCKET = "admin.sock"
_NO_STORE = {"cache-control": "no-store"}
_MAX_BODY_BYTES = 4096

_Wish = TypeVar("_Wish", bound=msgspec.Struct)


class AdminError(ToppyError):
    """An operator's wish cannot be granted. ``status`` is the HTTP status of the answer."""

    def __init__(self, message: str, *, status: int = 409) -> None:
        super().__init__(message)
        self.status = status


class ReloadWish(msgspec.Struct, forbid_unknown_fields=True):
    policy_only: bool = False


class DrainWish(msgspec.Struct, forbid_unknown_fields=True):
    what: str
    timeout_s: float | None = None


class KickWish(msgspec.Struct, forbid_unknown_fields=True):
    what: str


class Operations(Protocol):
    """What an operator can do; each answer is a JSON object. Raises ``ToppyError``."""

    def status(self) -> dict[str, Any]: ...

    async def reload(self, *, policy_only: bool) -> dict[str, Any]: ...

    async def upgrade(self) -> dict[str, Any]: ...

    def drain(self, what: str, timeout_s: float | None) -> dict[str, Any]: ...

    async def connections(self) -> dict[str, Any]: ...

    async def tunnels(self) -> dict[str, Any]: ...

    async def kick(self, what: str) -> dict[str, Any]: ...

    def stop(self) -> dict[str, Any]: ...


def admin_app(operations: Operations) -> Starlette:
    """See ``docs/operations.md`` for each path."""

    async def status(_: Request) -> dict[str, Any]:
        return operations.status()

    async def reload(request: Request) -> dict[str, Any]:
        wish = await _read(request, ReloadWish)
        return await operations.reload(policy_only=wish.policy_only)

    async def upgrade(_: Request) -> dict[str, Any]:
        return await operations.upgrade()

    async def drain(request: Request) -> dict[str, Any]:
        wish = await _read(request, DrainWish)
        return operations.drain(wish.what, wish.timeout_s)

    async def connections(_: Request) -> dict[str, Any]:
        return await operations.connections()

    async def tunnels(_: Request) -> dict[str, Any]:
        return await operations.tunnels()

    async def kick(request: Request) -> dict[str, Any]:
        wish = await _read(request, KickWish)
        return await operations.kick(wish.what)

    async def stop(_: Request) -> dict[str, Any]:
        return operations.stop()

    return Starlette(
        routes=[
            _route("GET", "/status", status),
            _route("POST", "/reload", reload),
            _route("POST", "/upgrade", upgrade),
            _route("POST", "/drain", drain),
            _route("GET", "/connections", connections),
            _route("GET", "/tunnels", tunnels),
            _route("POST", "/kick", kick),
            _route("POST", "/stop", stop),
        ]
    )


async def _read(request: Request, kind: type[_Wish]) -> _Wish:
    body = await request.body()
    if len(body) > _MAX_BODY_BYTES:
        raise AdminError("the request is too long", status=400)
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AdminError(f"the request is not understood: {error}", status=400) from None


def _route(method: str, path: str, answer: Callable[[Request], Awaitable[dict[str, Any]]]) -> Route:
    async def endpoint(request: Request) -> Response:
        try:
            return JSONResponse(await answer(request), headers=_NO_STORE)
        except ToppyError as error:
            status = error.status if isinstance(error, AdminError) else 409
            return JSONResponse({"error": str(error)}, status_code=status, headers=_NO_STORE)

    return Route(path, endpoint, methods=[method])
