"""What determines the counts of a layer beside its config: degrees, and the load of a rank. Hashable."""

from __future__ import annotations

from typing import NamedTuple

from mm.predict.count.ops import Tp
from parallel.topology.groups import Group
from parallel.topology.layout import Layout


class Degrees(NamedTuple):
    """How a module's layers are split, and whose groups they call. tp_rank, cp_rank: of the rank counted."""

    module: str
    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    tp_rank: int = 0
    cp_rank: int = 0

    @staticmethod
    def of(module: str, layout: Layout, tp_rank: int = 0, cp_rank: int = 0) -> Degrees:
        """The degrees of a layout."""
        sequence = layout.sequence_parallel and layout.tp > 1
        return Degrees(
            module, layout.tp, layout.cp, layout.ep, layout.etp, sequence, tp_rank=tp_rank, cp_rank=cp_rank
        )

    @property
    def axis(self) -> Tp:
        """The axis of tensor parallelism."""
        return Tp(self.tp, self.group("tp"), self.sequence_parallel)

    def group(self, axis: str) -> Group:
        """The group along an axis."""
        return Group("module", self.module, axis)


class Bucket(NamedTuple):
    """n sequences that one call of attention pads to so many queries and keys. real: of its query slots.
    masked: whether keys are padded, which a kernel that is not causal needs a mask for."""

    n: int
    queries: int
    keys: int
    real: int
    masked: bool = False


class Attended(NamedTuple):
    """Sequences that attention computes. one_batch: whether there is one bucket, of rows as they lie."""

    buckets: tuple[Bucket, ...]
    one_batch: bool


class Crossing(NamedTuple):
    """How attention crosses cp on a rank: what its fragments that continue a document read.

    received: keys that come from others, and held: that other ranks get from here. ring: whether a round at
    a time. own: rows of each such fragment. outer: (queries, keys) of each product with fetched keys, by
    round. inner: attention of the other fragments. moved: bytes of the calls of a forward of one byte a row:
    (rows of the larger side of each).
    """

    ring: bool
    own: tuple[int, ...]
    outer: tuple[tuple[tuple[int, int], ...], ...]
    inner: Attended
    inner_rows: int
    moved: tuple[int, ...]
    back: tuple[int, ...]
    wanted: int


class TokenLoad(NamedTuple):
    """What a rank of the language model computes in a micro-batch.

    tokens: of this cp rank, padding included. routed: of those, that this tp rank sends to experts; arriving:
    that all ranks that share experts with it route, by rank of ep then etp (an even share of choices goes to
    each). documents: its runs of one document (their lengths decide `attended`). supervised: tokens with a
    loss, of the next token and of each depth of multi-token prediction. crossing: None where no document
    crosses cp. pieces: with cp, tokens of each of its pieces. states: piece states received by the scan, and
    halo: rows, where it crosses.
    """

    tokens: int
    routed: int
    documents: int
    attended: Attended
    supervised: tuple[int, ...]
    crossing: Crossing | None = None
    scan: ScanCrossing | None = None


class ScanCrossing(NamedTuple):
    """How the scan crosses cp. method: states or heads. pieces: tokens of each piece of this rank. whole:
    tokens of the stream, and documents in it. halo: rows of the largest side of the exchange before the
    convolution, forward and back, with what comes and goes; states: the same of piece states."""

    method: str
    pieces: tuple[int, ...]
    whole: int
    documents: int
    halo: tuple[int, int, int] = (0, 0, 0)
    states: tuple[int, int, int] = (0, 0, 0)
