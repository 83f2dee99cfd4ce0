"""What the losses of a step are means over. Pure, and free of torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """Of a whole step, over all ranks and micro-batches: known from its plan before anything is computed, so
    that each rank divides its own sums by them and losses and gradients only add up. As they are, the sums
    themselves.

    tokens: that are routed, all but the padding. mtp: tokens that have a loss at each depth of
    multi-token prediction, the nearest first; () is 1 at each.
    """

    tokens: int = 1
    mtp: tuple[int, ...] = ()

    @property
    def token_scale(self) -> float:
        """What a sum over routed tokens is multiplied with for its mean."""
        return 1.0 / max(1, self.tokens)

    def mtp_scales(self, depths: int) -> tuple[float, ...]:
        """What the summed loss of each depth is multiplied with for the mean over all: 1 / (depths n)."""
        mtp = self.mtp or (1,) * depths
        assert len(mtp) == depths, (mtp, depths)
        return tuple(1.0 / (depths * max(1, n)) for n in mtp)
