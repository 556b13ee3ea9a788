"""A rollout: replacing one generation of workers by the next, as one transition table.

The control plane tells the machine what happened and obeys the command that comes back. Until the
switch everything can be taken back, and the serving generation does not notice. There is one
rollout at a time; a request meanwhile is remembered, not stacked (DESIGN: Processes).
"""

from __future__ import annotations

from enum import Enum

from toppy.errors import LocalError


class RolloutState(Enum):
    IDLE = "idle"
    PREPARING = "preparing"
    """Reading the configuration, looking for free slots for the next generation."""
    STARTING = "starting"
    """Its workers come up; new connections go to the serving generation."""
    SWITCHING = "switching"
    """New connections are being moved over."""
    ROLLING_BACK = "rolling_back"
    """The next generation is being ended; the serving one goes on."""
    STOPPED = "stopped"
    """The gateway stops."""


class RolloutInput(Enum):
    REQUESTED = "requested"
    PREPARED = "prepared"
    REFUSED = "refused"
    """The configuration is wrong, or no slots are free."""
    ALL_READY = "all_ready"
    """Every worker of the next generation has reported READY."""
    WORKER_FAILED = "worker_failed"
    """One of them ended, or took too long."""
    SWITCHED = "switched"
    SWITCH_FAILED = "switch_failed"
    ROLLED_BACK = "rolled_back"
    STOP = "stop"


class RolloutCommand(Enum):
    NOTHING = "nothing"
    PREPARE = "prepare"
    START_WORKERS = "start_workers"
    SWITCH = "switch"
    DRAIN_OLD = "drain_old"
    """The rollout has succeeded: earlier generations drain."""
    END_NEW = "end_new"
    """Take everything back: end the workers of the next generation."""
    GIVE_UP = "give_up"
    """The rollout has failed; there is nothing (left) to take back."""
    REMEMBER = "remember"
    """Another rollout follows this one."""


_S, _I, _C = RolloutState, RolloutInput, RolloutCommand

TRANSITIONS: dict[tuple[RolloutState, RolloutInput], tuple[RolloutState, RolloutCommand]] = {
    (_S.IDLE, _I.REQUESTED): (_S.PREPARING, _C.PREPARE),
    (_S.IDLE, _I.STOP): (_S.STOPPED, _C.NOTHING),
    (_S.PREPARING, _I.REQUESTED): (_S.PREPARING, _C.REMEMBER),
    (_S.PREPARING, _I.PREPARED): (_S.STARTING, _C.START_WORKERS),
    (_S.PREPARING, _I.REFUSED): (_S.IDLE, _C.GIVE_UP),
    (_S.PREPARING, _I.STOP): (_S.STOPPED, _C.GIVE_UP),
    (_S.STARTING, _I.REQUESTED): (_S.STARTING, _C.REMEMBER),
    (_S.STARTING, _I.ALL_READY): (_S.SWITCHING, _C.SWITCH),
    (_S.STARTING, _I.WORKER_FAILED): (_S.ROLLING_BACK, _C.END_NEW),
    (_S.STARTING, _I.STOP): (_S.STOPPED, _C.END_NEW),
    (_S.SWITCHING, _I.REQUESTED): (_S.SWITCHING, _C.REMEMBER),
    (_S.SWITCHING, _I.SWITCHED): (_S.IDLE, _C.DRAIN_OLD),
    (_S.SWITCHING, _I.SWITCH_FAILED): (_S.ROLLING_BACK, _C.END_NEW),
    (_S.SWITCHING, _I.STOP): (_S.STOPPED, _C.NOTHING),
    (_S.ROLLING_BACK, _I.REQUESTED): (_S.ROLLING_BACK, _C.REMEMBER),
    # more of its workers may end while they are being ended
    (_S.ROLLING_BACK, _I.WORKER_FAILED): (_S.ROLLING_BACK, _C.NOTHING),
    (_S.ROLLING_BACK, _I.ROLLED_BACK): (_S.IDLE, _C.GIVE_UP),
    (_S.ROLLING_BACK, _I.STOP): (_S.STOPPED, _C.NOTHING),
    # the end of what was under way when the gateway stopped
    (_S.STOPPED, _I.REQUESTED): (_S.STOPPED, _C.GIVE_UP),
    (_S.STOPPED, _I.WORKER_FAILED): (_S.STOPPED, _C.NOTHING),
    (_S.STOPPED, _I.ROLLED_BACK): (_S.STOPPED, _C.NOTHING),
    (_S.STOPPED, _I.STOP): (_S.STOPPED, _C.NOTHING),
}


class IllegalRolloutError(LocalError):
    """Something was reported that cannot happen in this state."""


class Rollout:
    """The machine: a state, and whether another rollout is to follow."""

    def __init__(self) -> None:
        self.state = RolloutState.IDLE
        self._is_another_wanted = False

    def handle(self, happened: RolloutInput) -> RolloutCommand:
        """Take one step; what to do now. Raises ``IllegalRolloutError``."""
        try:
            self.state, command = TRANSITIONS[self.state, happened]
        except KeyError:
            raise IllegalRolloutError(
                f"a rollout that is {self.state.value} cannot hear {happened.value}"
            ) from None
        if command is RolloutCommand.REMEMBER:
            self._is_another_wanted = True
        elif self.state is RolloutState.STOPPED:
            self._is_another_wanted = False
        return command

    def take_remembered(self) -> bool:
        """Whether another rollout was asked for meanwhile; to be asked when idle again."""
        is_wanted, self._is_another_wanted = self._is_another_wanted, False
        return is_wanted
