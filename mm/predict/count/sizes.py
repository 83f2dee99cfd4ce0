"""What determines the counts of a layer beside its config: degrees, and the load of a rank. Hashable."""

from __future__ import annotations

from typing import NamedTuple

from mm.predict.count.ops import Tp
from parallel.topology.groups import Group
from parallel.topology.layout import Layout


class Degrees(NamedTuple):
    """How a module's layers are split, and whose groups they call. tp_rank, cp_rank, ep_rank: of the rank
    counted; ep_rank None: of any, with as many rows for its experts as the others have for theirs."""

    module: str
    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    tp_rank: int = 0
    cp_rank: int = 0
    ep_rank: int | None = None

    @staticmethod
    def of(
        module: str, layout: Layout, tp_rank: int = 0, cp_rank: int = 0, ep_rank: int | None = None
    ) -> Degrees:
        """The degrees of a layout."""
        sequence = layout.sequence_parallel and layout.tp > 1
        split = layout.tp, layout.cp, layout.ep, layout.etp
        return Degrees(module, *split, sequence, tp_rank=tp_rank, cp_rank=cp_rank, ep_rank=ep_rank)

    @property
    def axis(self) -> Tp:
        """The axis of tensor parallelism."""
        return Tp(self.tp, self.group("tp"), self.sequence_parallel)

    def group(self, axis: str) -> Group:
        """The group along an axis."""
        return Group("module", self.module, axis)


class Bucket(NamedTuple):
    """n sequences that one call of attention pads to so many queries and keys. real: of its query slots.
    masked: whether keys are padded, which a kernel that is not causal needs a mask for. window: 0, or of
    blocks of a window. moved: whether keys are other rows than queries."""

    n: int
    queries: int
    keys: int
    real: int
    masked: bool = False
    window: int = 0
    moved: bool = False

    @property
    def mask(self) -> int:
        """Elements of the mask."""
        return self.queries * self.keys if self.window else self.n * self.keys * self.masked


class Attended(NamedTuple):
    """Sequences that attention computes. one_batch: whether there is one bucket, of rows as they lie."""

    buckets: tuple[Bucket, ...]
    one_batch: bool

    @property
    def indices(self) -> int:
        """Bytes of the row numbers of slots and rows on the device, and of masks."""
        found = masks = 0
        for b in self.buckets:
            slots = b.n * b.queries
            found += slots + b.real + (b.real if b.real < slots else 0)
            found += b.n * b.keys if b.keys != b.queries or b.moved else 0
            masks += b.mask
        return 8 * found + masks


class Rows(NamedTuple):
    """Rows that an exchange moves on a rank: it has `wanted` after it, `gives` go, `takes` come."""

    wanted: int
    gives: int
    takes: int


class Windowed(NamedTuple):
    """Attention of a rank in windows. before: keys before its fragments, where any document crosses cp."""

    attended: Attended
    before: Rows | None = None


class Crossing(NamedTuple):
    """Attention of a rank where documents cross cp.

    ring: whether keys come a round at a time. own: rows of each fragment that continues a document. reads: by
    block of keys, the (queries, keys) of each product. blocks: rows of each. keys: the exchange at once,
    rounds: that of each round but the first, of own keys. inner: other fragments; runs: in how many stretches
    these lie.
    """

    ring: bool
    own: tuple[int, ...]
    reads: tuple[tuple[tuple[int, int], ...], ...]
    blocks: tuple[int, ...]
    keys: Rows
    rounds: tuple[Rows, ...]
    inner: Attended
    runs: int


class ScanCrossing(NamedTuple):
    """How the scan crosses cp: by heads, for which tokens are exchanged, or by the states of pieces.

    pieces: tokens of each piece here. whole: tokens of the stream, and its documents. halo: rows before the
    convolution; states: states of pieces. Each as Rows, None where nothing moves.
    """

    by_heads: bool
    pieces: tuple[int, ...]
    whole: int
    documents: int
    halo: Rows | None
    states: Rows | None


class TokenLoad(NamedTuple):
    """What a rank of the language model computes in a micro-batch.

    tokens: of this cp rank, padding included. routed: of those, that this tp rank sends to experts, an even
    share to each. documents: its runs of one document, whose lengths decide `attended`. supervised: tokens
    with a loss, of the next token and of each depth of multi-token prediction. crossing, scan: where
    documents cross cp. windowed: of layers with the window; None: as `attended` says. widest: of `routed`,
    that of the rank of ep with most; None: as here.
    """

    tokens: int
    routed: int
    documents: int
    attended: Attended
    supervised: tuple[int, ...]
    crossing: Crossing | None = None
    scan: ScanCrossing | None = None
    windowed: Windowed | None = None
    widest: int | None = None
