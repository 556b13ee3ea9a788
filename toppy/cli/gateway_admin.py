"""Asks the running gateway, through the unix socket of its runtime directory."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from toppy.config.gateway import GatewayConfig
from toppy.control.admin import ADMIN_SOCKET
from toppy.control.settings import SYSTEM_CONFIG, config_path, runtime_directory
from toppy.errors import ConfigError, ToppyError

EXIT_FAILURE = 1
EXIT_WRONG_USAGE = 2

_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 15.0
"""The gateway gives its workers five seconds for a list."""
_RELOAD_TIMEOUT_S = 65.0
"""The gateway's own deadlines end well before; with ``reload.when_full = "wait"`` they need not."""
_TRIAL_TIMEOUT_S = 45.0
"""The gateway gives new code 30 s to come up."""
_UPGRADE_TIMEOUT_S = 60.0
"""For the new code's own reload, after the trial."""
_GONE_AFTER_S = 5.0
"""An upgrade whose process has ended, and in whose place no other answers, has failed."""
_STOP_TIMEOUT_S = 10.0
"""The gateway promises five."""
_POLL_INTERVAL_S = 0.05
_MAX_SHOWN_CHARACTERS = 300

_DEFAULT_RUNTIME_DIR: str = GatewayConfig.model_fields["runtime_dir"].default
_RUNTIME_DIR = re.compile(r"^[ \t]*runtime_dir[ \t]*=.*$", re.MULTILINE)
_FIRST_TABLE = re.compile(r"^[ \t]*\[", re.MULTILINE)


class NoGatewayError(ToppyError):
    """Nobody answers at the socket."""

    retryable = True


class RefusedError(ToppyError):
    """The gateway answered that it cannot, or has failed."""

    def __init__(self, message: str, *, exit_code: int = EXIT_FAILURE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def find_runtime_dir(config: str | None, environ: Mapping[str, str]) -> Path:
    """Where the gateway has its socket; ``config`` is the ``--config`` flag.

    A file that has become wrong while the gateway runs still says where it is. Raises
    ``ConfigError`` when it does not, or when nothing is there.
    """
    path = config_path(config, environ)
    try:
        return runtime_directory(path, environ)
    except ConfigError:
        named = environ.get("TOPPY_GW_RUNTIME_DIR") or _named_in(path)
        if not named:
            raise
        directory = (path.absolute().parent if path is not None else Path.cwd()) / named
        if os.path.exists(directory / ADMIN_SOCKET):  # noqa: PTH110  # False where denied
            return directory
        if path is None:
            raise ConfigError(
                f"which gateway? {SYSTEM_CONFIG} does not exist; name the gateway's file with "
                "--config FILE or TOPPY_GW_CONFIG"
            ) from None
        raise


def _named_in(path: Path | None) -> str:
    """``runtime_dir`` of a file of which other lines may be no TOML at all, or the default; empty:
    the file cannot be read, or its line is wrong.
    """
    if path is None:
        return _DEFAULT_RUNTIME_DIR
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    table = _FIRST_TABLE.search(text)
    line = _RUNTIME_DIR.search(text, 0, table.start() if table else len(text))
    if line is None:
        return _DEFAULT_RUNTIME_DIR
    try:
        value = tomllib.loads(line[0])["runtime_dir"]
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""


class GatewayAdmin:
    """The operator's commands. Each raises ``ToppyError`` with what to tell the operator.

    ``now`` is the time of day in seconds since 1970, as the gateway has it.
    """

    def __init__(
        self,
        runtime_dir: Path,
        *,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._path = runtime_dir / ADMIN_SOCKET
        self._now = now
        self._sleep = sleep

    def status(self) -> dict[str, Any]:
        """Generations, workers, counters."""
        return self._ask("GET", "/status")

    def connections(self) -> dict[str, Any]:
        """Every open connection."""
        return self._ask("GET", "/connections")

    def tunnels(self) -> dict[str, Any]:
        """Every open tunnel."""
        return self._ask("GET", "/tunnels")

    def reload(self, *, policy_only: bool) -> dict[str, Any]:
        """Until the next generation serves."""
        return self._ask("POST", "/reload", {"policy_only": policy_only}, _RELOAD_TIMEOUT_S)

    def drain(self, what: str, timeout_s: float | None) -> dict[str, Any]:
        """Have a worker (``s3``) or generation (``g2``) end once its tunnels have."""
        return self._ask("POST", "/drain", {"what": what, "timeout_s": timeout_s})

    def kick(self, what: str) -> dict[str, Any]:
        """Close a tunnel, or every tunnel of a subject."""
        return self._ask("POST", "/kick", {"what": what})

    def upgrade(self) -> dict[str, Any]:
        """Until the code that is on disk serves in the running one's place."""
        with _watched(self.status()["pid"]) as has_ended:
            answer = self._ask("POST", "/upgrade", {}, _TRIAL_TIMEOUT_S)
            # a reload that ends from here on is the new code's first
            answered_at = heard_at = self._now()
            while (now := self._now()) < answered_at + _UPGRADE_TIMEOUT_S:
                with contextlib.suppress(NoGatewayError):
                    facts = self.status()
                    heard_at = now
                    reload = facts["last_reload"]
                    if reload is not None and reload["at"] > answered_at:
                        return _upgraded(answer, facts)
                # a service manager may start another in its place
                if now - heard_at > _GONE_AFTER_S and has_ended is not None and has_ended():
                    raise RefusedError(
                        f"the gateway ended while it became the new code (it was process "
                        f"{answer['pid']}): its log says why; its workers relay on, start it again"
                    )
                self._sleep(_POLL_INTERVAL_S)
        raise RefusedError(
            f"the new code has not reloaded within {_UPGRADE_TIMEOUT_S:.0f} s; look at the "
            "gateway's log and at: toppy-gw status"
        )

    def stop(self) -> dict[str, Any]:
        """Until the gateway's process has ended."""
        pid = self.status()["pid"]
        with _watched(pid) as has_ended:
            self._ask("POST", "/stop", {})
            end = self._now() + _STOP_TIMEOUT_S
            while not (has_ended() if has_ended is not None else self._is_silent()):
                if self._now() > end:
                    raise RefusedError(
                        f"the gateway (process {pid}) still runs after {_STOP_TIMEOUT_S:.0f} s; "
                        f"end it with: kill -9 {pid}"
                    )
                self._sleep(_POLL_INTERVAL_S)
        return {"stopped": pid}

    def _is_silent(self) -> bool:
        try:
            self.status()
        except NoGatewayError:
            return True
        return False

    def _ask(
        self,
        method: str,
        path: str,
        wish: dict[str, Any] | None = None,
        timeout_s: float = _ANSWER_TIMEOUT_S,
    ) -> dict[str, Any]:
        self._check_socket()
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S)
        # reading the CA certificates, which nothing here needs, takes longer than all the rest
        transport = httpx.HTTPTransport(uds=str(self._path), verify=False)
        try:
            with httpx.Client(transport=transport, timeout=timeout, trust_env=False) as client:
                answer = client.request(method, f"http://toppy-gw{path}", json=wish)
        except httpx.ConnectError as error:
            raise self._nobody(str(error)) from None
        except httpx.TimeoutException:
            raise RefusedError(
                f"the gateway has not answered within {timeout_s:.0f} s; what was asked may still "
                "happen: look at its log and at toppy-gw status"
            ) from None
        except httpx.HTTPError as error:
            raise self._nobody(f"it ended while it was asked: {error}") from None
        return _read(answer, path)

    def _check_socket(self) -> None:
        """Tell apart why nobody answers."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_CONNECT_TIMEOUT_S)
            try:
                probe.connect(str(self._path))
            except PermissionError as error:
                raise NoGatewayError(
                    f"cannot look into {self._path.parent}: {error.strerror}; run this command as "
                    "the gateway's user or as root"
                ) from None
            except FileNotFoundError:
                raise self._nobody("there is no socket") from None
            except ConnectionRefusedError:
                raise self._nobody("the one that was here has ended") from None
            except OSError as error:
                raise self._nobody(str(error)) from None

    def _nobody(self, why: str) -> NoGatewayError:
        return NoGatewayError(
            f"no gateway answers at {self._path} ({why}); is it running, with this configuration, "
            "and may this user read its runtime_dir?"
        )


def _read(answer: httpx.Response, path: str) -> dict[str, Any]:
    try:
        said = answer.json()
    except ValueError:
        said = None
    if answer.is_success and isinstance(said, dict):
        return said
    if not isinstance(said, dict) or not isinstance(said.get("error"), str):
        raise RefusedError(
            f"the gateway answered {path} with {answer.status_code} "
            f"{answer.text[:_MAX_SHOWN_CHARACTERS]!r}: is it of another version than this command?"
        )
    is_bad_request = answer.status_code == httpx.codes.BAD_REQUEST
    raise RefusedError(
        said["error"], exit_code=EXIT_WRONG_USAGE if is_bad_request else EXIT_FAILURE
    )


def _upgraded(answer: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    reload = facts["last_reload"]
    if not reload["ok"]:
        raise RefusedError(
            "the new code runs, but its reload failed and the earlier workers serve on: "
            f"{reload['message']}"
        )
    return {
        "from": answer["from"],
        "to": facts["version"],
        "pid": facts["pid"],
        "generation": facts["generation"],
        "revision": facts["revision"],
        "duration_s": reload["duration_s"],
    }


@contextlib.contextmanager
def _watched(pid: int) -> Iterator[Callable[[], bool] | None]:
    """Says whether the process has ended, even while nobody reaps it; None: cannot be seen."""
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, AttributeError):  # another process namespace, another system
        yield None
        return
    try:
        yield lambda: bool(select.select([pidfd], [], [], 0)[0])
    finally:
        os.close(pidfd)
