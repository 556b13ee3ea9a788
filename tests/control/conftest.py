"""What the tests of the control plane share."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.control.stage import Run, Scenario, Stage, until
from tests.control.virtual_time import run_in_virtual_time

_DEADLINE_S = 3600.0
"""Of virtual time."""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a scenario on a stage whose supervisor runs. ``serve``: slots whose workers serve already
    as generation 1; of ``slots`` in all.
    """

    def run_scenario(
        scenario: Scenario,
        *,
        serve: Sequence[int] = (0,),
        slots: int = 8,
        begin: Callable[[Stage], None] | None = None,
    ) -> None:
        async def whole() -> None:
            loop = asyncio.get_running_loop()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(time, "monotonic", loop.time)
                patch.setattr(time, "time", lambda: 1000.0 + loop.time())
                stage = Stage(tmp_path, slots)
                running = asyncio.create_task(
                    stage.supervisor.run(lambda: begin(stage) if begin is not None else None)
                )
                try:
                    async with asyncio.timeout(_DEADLINE_S):
                        await until(lambda: stage.server.is_served)
                        if serve and begin is None:
                            stage.serve(*serve)
                        await scenario(stage)
                        assert not running.done(), "the supervisor gave up"
                finally:
                    running.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await running
                    for worker in stage.supervisor.workers.values():
                        worker.close()

        run_in_virtual_time(whole())

    return run_scenario
