"""Errors that end a run with a message and a known exit code, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class PolyrankError(Exception):
    """An error whose message is enough for the user: no traceback is printed."""

    exit_code = 1


class Refused(PolyrankError):
    """The command, the config or the layout cannot be carried out."""

    exit_code = 2


class DataError(PolyrankError):
    """The data cannot be used."""

    exit_code = 3


class CheckpointError(PolyrankError):
    """A checkpoint cannot be used."""

    exit_code = 4


class NonFinite(PolyrankError):
    """A loss, a gradient or a weight is not finite."""

    exit_code = 5


class ReplicasDiffer(PolyrankError):
    """Ranks that must hold the same weights do not."""

    exit_code = 5


class Told(Exception):
    """Ends a rank of a job whose failure has been told, by this rank or another one."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


@contextmanager
def of_stage(name: str) -> Iterator[None]:
    """Name the stage of a run in errors raised inside; "" names none."""
    try:
        yield
    except PolyrankError as error:
        if not name:
            raise
        raise type(error)(f"stage {name}: {error}") from error
