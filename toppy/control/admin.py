"""What operators ask of the running gateway, through the unix socket of its runtime directory.

HTTP with JSON. A refusal says the cause and what to do next: ``{"error": "…"}``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from toppy.errors import ToppyError

ADMIN_SOCKET = "admin.sock"
_NO_STORE = {"cache-control": "no-store"}
_MAX_BODY_BYTES = 4096
_BODY_DEADLINE_S = 5.0

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

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "").split(", ")
            method = next(each for each in allowed if each != "HEAD")
            why = f"{request.url.path} is asked for with {method}, not with {request.method}"
        else:
            why = f"there is no {request.url.path} here; docs/operations.md lists what there is"
        return _refusal(why, error.status_code)

    return Starlette(
        exception_handlers={HTTPException: refuse},
        routes=[
            _route("GET", "/status", status),
            _route("POST", "/reload", reload),
            _route("POST", "/upgrade", upgrade),
            _route("POST", "/drain", drain),
            _route("GET", "/connections", connections),
            _route("GET", "/tunnels", tunnels),
            _route("POST", "/kick", kick),
            _route("POST", "/stop", stop),
        ],
    )


async def _read(request: Request, kind: type[_Wish]) -> _Wish:
    body = b""
    try:
        async with asyncio.timeout(_BODY_DEADLINE_S):
            async for part in request.stream():
                body += part
                if len(body) > _MAX_BODY_BYTES:
                    raise AdminError("the request is too long", status=400)
    except TimeoutError:
        raise AdminError(
            f"the request is not complete after {_BODY_DEADLINE_S:.0f} s", status=400
        ) from None
    except ClientDisconnect:
        raise AdminError("the request is not complete", status=400) from None
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AdminError(f"the request is not understood: {error}", status=400) from None


def _refusal(why: str, status: int) -> Response:
    # whatever else the client sends is not waited for
    headers = {**_NO_STORE, "connection": "close"}
    return JSONResponse({"error": why}, status_code=status, headers=headers)


def _route(method: str, path: str, answer: Callable[[Request], Awaitable[dict[str, Any]]]) -> Route:
    async def endpoint(request: Request) -> Response:
        try:
            return JSONResponse(await answer(request), headers=_NO_STORE)
        except ToppyError as error:
            return _refusal(str(error), error.status if isinstance(error, AdminError) else 409)

    return Route(path, endpoint, methods=[method])
