"""Numbers in the unit that suits them, for people: nothing is shown as zero that is not."""

from __future__ import annotations

from collections.abc import Sequence

BYTES = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
FLOPS = (("EFLOP", 10**18), ("PFLOP", 10**15), ("TFLOP", 10**12), ("GFLOP", 10**9), ("MFLOP", 10**6))
SECONDS = (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3))


def bytes_text(n: float) -> str:
    """Bytes as in 7.01 GiB; those of less than a KiB as they are."""
    return _text(n, BYTES, "B")


def flops_text(n: float) -> str:
    """Operations as in 11.3 PFLOP, a multiply and an add as two."""
    return _text(n, FLOPS, "FLOP")


def _text(n: float, units: Sequence[tuple[str, int]], one: str) -> str:
    unit, size = next(((unit, size) for unit, size in units if abs(n) >= size), (one, 1))
    return f"{n:.4g} {unit}" if size == 1 else f"{n / size:.{_digits(n / size)}f} {unit}"


def _digits(value: float) -> int:
    """Behind the point, so that at least three digits are shown."""
    return 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0


def seconds_text(value: float) -> str:
    """A time as in 3.266 ms."""
    for unit, size in SECONDS:
        if abs(value) >= (2 * size if size > 1 else size):
            return f"{value / size:.4g} {unit}"
    return f"{value * 1e6:.4g} µs" if value else "0 s"
