"""The life of one worker as the control plane sees it, and which message is permitted when.

As in OpenSSH's monitor: a message that the state does not permit comes from something that is not
our worker, or from one that went wrong; it is ended.
"""

from __future__ import annotations

from enum import Enum, auto

from toppy.errors import LocalError


class WorkerState(Enum):
    SPAWNED = auto()
    """The process runs and has said nothing."""
    GREETED = auto()
    """It proved who it is."""
    SERVING = auto()
    """It reads its sockets."""
    DRAINING = auto()
    """It takes nothing new and ends when what it has has ended."""
    STOPPING = auto()
    """It was told to stop."""
    GONE = auto()
    """The process has ended."""


class WorkerInput(Enum):
    HELLO = auto()
    READY = auto()
    REQUEST = auto()
    """An admission or token request."""
    REPORT = auto()
    DRAIN = auto()
    """Our own decision, not a message."""
    STOP = auto()
    """Our own decision, not a message."""
    EXIT = auto()
    """The process ended, for whatever reason."""


_S = WorkerState
_I = WorkerInput

TRANSITIONS: dict[tuple[WorkerState, WorkerInput], WorkerState] = {
    (_S.SPAWNED, _I.HELLO): _S.GREETED,
    (_S.SPAWNED, _I.STOP): _S.STOPPING,
    (_S.SPAWNED, _I.EXIT): _S.GONE,
    (_S.GREETED, _I.READY): _S.SERVING,
    (_S.GREETED, _I.STOP): _S.STOPPING,
    (_S.GREETED, _I.EXIT): _S.GONE,
    (_S.SERVING, _I.REQUEST): _S.SERVING,
    (_S.SERVING, _I.REPORT): _S.SERVING,
    (_S.SERVING, _I.DRAIN): _S.DRAINING,
    (_S.SERVING, _I.STOP): _S.STOPPING,
    (_S.SERVING, _I.EXIT): _S.GONE,
    (_S.DRAINING, _I.REQUEST): _S.DRAINING,
    (_S.DRAINING, _I.REPORT): _S.DRAINING,
    (_S.DRAINING, _I.DRAIN): _S.DRAINING,
    (_S.DRAINING, _I.STOP): _S.STOPPING,
    (_S.DRAINING, _I.EXIT): _S.GONE,
    (_S.STOPPING, _I.HELLO): _S.STOPPING,
    (_S.STOPPING, _I.READY): _S.STOPPING,
    (_S.STOPPING, _I.REQUEST): _S.STOPPING,
    (_S.STOPPING, _I.REPORT): _S.STOPPING,
    (_S.STOPPING, _I.STOP): _S.STOPPING,
    (_S.STOPPING, _I.EXIT): _S.GONE,
    # reports travel on a socket of their own and may arrive after the end
    (_S.GONE, _I.REPORT): _S.GONE,
    (_S.GONE, _I.STOP): _S.GONE,
}


class IllegalTransitionError(LocalError):
    """A message that the worker's state does not permit."""


def next_state(state: WorkerState, happened: WorkerInput) -> WorkerState:
    """The state after ``happened``; raises ``IllegalTransitionError`` if it is not permitted."""
    try:
        return TRANSITIONS[state, happened]
    except KeyError:
        raise IllegalTransitionError(
            f"a worker that is {state.name.lower()} may not do {happened.name.lower()}"
        ) from None
