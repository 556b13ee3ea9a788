"""What a worker has asked the control plane and not been told yet."""

from __future__ import annotations

from collections.abc import Iterator

from toppy.worker.tunnel import Ping, Renewal, RouterShell, Tunnel

Asked = Tunnel | Ping | Renewal


class Questions:
    """Open questions by number, never more than ``most``."""

    def __init__(self, shell: RouterShell, most: int) -> None:
        self._shell = shell
        self._most = most
        self._open: dict[int, Asked] = {}
        self.next_number = 1
        """The number that the next question must have."""

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[tuple[int, Asked]]:
        """A copy: questions may be dropped on the way."""
        return iter(list(self._open.items()))

    @property
    def is_full(self) -> bool:
        """No more can be asked now."""
        return len(self._open) >= self._most

    def ask(self, asked: Asked) -> bool:
        """Put it to the control plane; False when that is not possible now."""
        if self.is_full or not self._shell.ask(asked.request):
            return False
        self._open[self.next_number] = asked
        self.next_number += 1
        return True

    def take(self, number: int) -> Asked | None:
        """The question is answered, or of no interest any more; None when it was so before."""
        return self._open.pop(number, None)

    def ask_again(self) -> None:
        """There is a new control plane: put every open question to it."""
        for asked in self._open.values():
            self._shell.ask(asked.request)
