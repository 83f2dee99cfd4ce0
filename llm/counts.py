"""Numbers of tokens that a step's objectives are means over. Pure, and free of torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """Numbers of a whole step, over all ranks and micro-batches.

    The step's plan gives them before anything is computed. Each rank divides its own sums by them, so losses
    and gradients of all ranks add up (law 2). The defaults leave the sums as they are.
    """

    tokens: int = 1
    """Routed tokens: all but the padding."""
    mtp: tuple[int, ...] = ()
    """Tokens with a loss at each depth of multi-token prediction, the nearest first; (): 1 at each."""

    @property
    def token_scale(self) -> float:
        """Factor from a sum over routed tokens to their mean."""
        return 1.0 / max(1, self.tokens)

    def mtp_scales(self, depths: int) -> tuple[float, ...]:
        """Factor from the summed loss of each depth to its part of the mean over depths: 1 / (depths n)."""
        mtp = self.mtp or (1,) * depths
        assert len(mtp) == depths, (mtp, depths)
        return tuple(1.0 / (depths * max(1, n)) for n in mtp)
