"""A transfer under way."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Pending:
    """A transfer under way. Its input must not change before wait()."""

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish: Callable[[], Tensor] | None = finish
        self._rows: Tensor | None = None

    def wait(self) -> Tensor:
        """Complete the transfer and return its rows, the same ones however often it is called.

        Raises RuntimeError naming edge, direction and peer where one does not answer in time.
        """
        if self._finish is not None:
            self._rows, self._finish = self._finish(), None
        assert self._rows is not None
        return self._rows
