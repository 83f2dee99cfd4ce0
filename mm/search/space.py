"""Which candidates there are: degrees, placements, schedules, micro-batches, policies, recomputation. Pure.

The space is stated here, in full, because a proof is of a space. Left out are the policies replicate, zero1
and zero2, which hold no less than step or zero3 and can be a little faster, and what another option in it
never loses to: gpipe takes as long as 1f1b and holds more; three_phase holds a whole step's activations of
encoders; tp without sequence parallelism keeps more and moves as much.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from mm.search.candidate import Block, Choice, Degrees
from parallel.topology.data_parallel import Policy

Where = Block | str  # ranks of its own; "with" the language model on all its ranks; "first": on those of its
WITH, FIRST = "with", "first"  # first pipeline rank


ENOUGH = 8  # micro-batches a pipeline rank
ANY = "any"  # a policy that costs no more than any


class Limits(NamedTuple):
    """What a module allows. tp, cp, ep, etp: degrees. layers: most stages. stages: the one number of stages
    that it has where it fixes that, None where any will do. vpp: virtual stages a pipeline rank."""

    tp: tuple[int, ...] = (1,)
    cp: tuple[int, ...] = (1,)
    pp: tuple[int, ...] = (1,)
    vpp: tuple[int, ...] = (1,)
    ep: tuple[int, ...] = (1,)
    etp: tuple[int, ...] = (1,)
    layers: int = 1
    stages: int | None = None


class Frame(NamedTuple):
    """Where modules are: the language model's ranks, and where each encoder is."""

    sink: Block
    encoders: tuple[Where, ...]

    @property
    def placement(self) -> str:
        """As Candidate.placement."""
        own = {isinstance(w, Block) for w in self.encoders}
        return "mixed" if len(own) == 2 else "disjoint" if True in own else "colocated"


@dataclass(frozen=True)
class Space:
    """The candidates for a job.

    world: ranks. node: ranks a node, at most world. sink: the language model's limits. encoders: by module in
    order. batch: samples a step. recompute: what may be computed again. own_microbatches: the config's.
    hsdp: whether a module of these degrees on a block can have that policy.
    """

    world: int
    node: int
    sink: Limits
    encoders: Mapping[str, Limits]
    batch: int
    recompute: tuple[tuple[str, ...], ...] = ((), ("full",))
    own_microbatches: int = 1
    hsdp: Callable[[Block, Degrees], bool] = lambda block, degrees: False

    @cached_property
    def frames(self) -> tuple[Frame, ...]:
        """All placements: each encoder with the language model, on its first pipeline rank, or on ranks of
        its own, several of these together or each alone."""
        found = []
        n = len(self.encoders)
        for kinds in itertools.product((WITH, FIRST, "own"), repeat=n):
            own = [i for i in range(n) if kinds[i] == "own"]
            if not own:
                found.append(Frame(Block(0, self.world), tuple(kinds)))
                continue
            for sizes in self._shares(len(own)):
                found.append(self._on_blocks(kinds, own, sizes))
            if len(own) > 1:
                found += [self._on_blocks(kinds, own, sizes) for sizes in self._shares(1)]
        return tuple(found)

    def _on_blocks(self, kinds: tuple[str, ...], own: list[int], sizes: tuple[int, ...]) -> Frame:
        """sizes: of the blocks of their own, one for each encoder or one for all."""
        at = self.world - sum(sizes)
        sink, where = Block(0, at), list[Where](kinds)
        for i, size in itertools.zip_longest(own, sizes):
            if size is not None:
                block = Block(at, at + size)
                at += size
            where[i] = block
        return Frame(sink, tuple(where))

    def _shares(self, n: int) -> Iterator[tuple[int, ...]]:
        """Sizes of n blocks beside the language model's, which keeps at least a quarter of the ranks."""
        sizes = self.block_sizes
        for found in itertools.product(sizes, repeat=n):
            if sum(found) <= self.world * 3 // 4:
                yield found

    @cached_property
    def block_sizes(self) -> tuple[int, ...]:
        """Sizes of an encoder's own block: 1, 2, 3, 4, 6, 8, 12 .. nodes, or ranks of the only node."""
        unit = self.node if self.world > self.node else 1
        units = sorted({n for k in range(12) for n in (2**k, 3 * 2**k)})
        return tuple(unit * n for n in units if unit * n < self.world)

    def sink_degrees(self, size: int) -> tuple[Degrees, ...]:
        """The language model's, on so many ranks."""
        return _degrees(self.sink, size)

    def encoder_degrees(self, module: str, size: int) -> tuple[Degrees, ...]:
        """An encoder's, on so many ranks."""
        return _degrees(self.encoders[module], size)

    def microbatches(self, dp: int, pp: int) -> tuple[int, ...]:
        """Powers of two up to a sample a data rank and ENOUGH a pipeline rank, that number itself, and the
        config's. More shorten a bubble that is below 1 / ENOUGH of the step."""
        most = min(-(-self.batch // dp), ENOUGH * pp)
        found = {2**k for k in range(20) if 2**k <= most} | {most, min(self.own_microbatches, most)}
        return tuple(sorted(found))

    def kinds(self, frame: Frame, degrees: Degrees) -> tuple[str, ...]:
        """Schedules of the language model's pipeline."""
        if degrees.pp == 1:
            return ("1f1b",)
        if degrees.vpp > 1:
            return ("interleaved", "zero_bubble")
        shared = any(not isinstance(w, Block) for w in frame.encoders)
        return ("1f1b", "zero_bubble", *(("fill",) if shared else ()))

    def policies(self, block: Block, degrees: Degrees) -> tuple[Policy, ...]:
        """What data ranks may hold; of one data rank all policies are one."""
        if degrees.dp(block.size) * degrees.cp == 1 and block.size == degrees.etp * degrees.ep * degrees.pp:
            return ("zero3",)
        return ("step", "zero3", *(("hsdp",) if self.hsdp(block, degrees) else ()))

    def block(self, where: Where, sink: Block, degrees: Degrees) -> Block:
        """The ranks of an encoder. degrees: the language model's."""
        if isinstance(where, Block):
            return where
        return sink if where == WITH else Block(sink.start, sink.start + sink.size // degrees.pp)

    def choices(self, module: str, block: Block, stage: int | None) -> tuple[Choice, ...]:
        """The layouts of an encoder. stage: None, or under `fill` on ranks of the language model how many
        ranks a pipeline rank of it has: groups are inside of one, and weights gathered once a step."""
        found = []
        for degrees in self.encoder_degrees(module, block.size):
            if stage is not None and (degrees.pp > 1 or stage % degrees.model):
                continue
            policies = self.policies(block, degrees)
            if stage is not None and "step" in policies:
                policies = ("step",)
            found += [Choice(block, degrees, policy) for policy in policies]
        return tuple(found)


@lru_cache(maxsize=4096)
def _degrees(limits: Limits, size: int) -> tuple[Degrees, ...]:
    """All degrees that divide `size` ranks."""
    found = []
    for pp, vpp in itertools.product(limits.pp, limits.vpp):
        stages = pp * vpp
        if size % pp or stages > limits.layers or (vpp > 1 and pp == 1):
            continue
        if limits.stages is not None and stages not in (1, limits.stages):
            continue
        n = size // pp
        for tp, cp in itertools.product(limits.tp, limits.cp):
            if n % (tp * cp):
                continue
            for ep, etp in itertools.product(limits.ep, limits.etp):
                if n % (ep * etp) == 0:
                    found.append(Degrees(tp, cp, pp, vpp, ep, etp, sequence_parallel=tp > 1))
    return tuple(found)
