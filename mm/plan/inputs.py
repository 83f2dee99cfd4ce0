"""What a step plan depends on besides the samples, and what follows for one sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from llm.flops import DocumentCost
from mm.data.sample import Part, Sample
from mm.errors import DataError
from parallel.sequence.grid import RowGrid, Run
from parallel.sequence.stream import Order, alignment
from parallel.topology.layout import Layout

if TYPE_CHECKING:
    from encoders.media.limits import Limits

BY_LENGTH = DocumentCost(1.0, 0.0, 0.0)

Deal = Literal["cost", "sample"]
Resample = Callable[[int], tuple[int, float]]  # rows of an item's features to its rows and the FLOPs of that


@dataclass(frozen=True)
class EncoderUse:
    """An encoder as the planner needs it: for row counts and costs, without running anything."""

    cls: Any  # an encoders.Encoder class
    cfg: Any  # its options, an instance of cls.Config
    layout: Layout
    deal: Deal = "cost"  # how items go to its dp ranks: balanced by cost, or with their sample
    at_once: int = 1  # micro-batches that it computes at once
    resample: Resample | None = None  # of a projector that makes other rows; None where it keeps them

    def rows(self, meta: Mapping[str, Any]) -> int:
        """How many rows an item contributes. Raises what the encoder's rows() raises."""
        n = int(self.cls.rows(self.cfg, meta))
        return n if self.resample is None or n < 1 else self.resample(n)[0]

    def cost(self, meta: Mapping[str, Any]) -> float:
        """FLOPs of the forward of an item in the encoder and its resampler."""
        one = float(self.cls.cost(self.cfg, meta))
        if self.resample is None:
            return one
        return one + self.resample(int(self.cls.rows(self.cfg, meta)))[1]


def item_run(use: EncoderUse, meta: Mapping[str, int], rows: int) -> Run:
    """The `rows` rows of an item as grid_positions() takes them."""
    grid: RowGrid | None = use.cls.row_grid(use.cfg, meta)
    assert grid is None or grid.rows == rows, f"{use.cls.__name__}.row_grid has {grid}, of {rows} rows"
    return rows if grid is None else grid


@dataclass(frozen=True)
class PlanInputs:
    """Everything that a step plan depends on, except the samples."""

    llm: Layout
    encoders: Mapping[str, EncoderUse]  # by module, in the config's order
    context: int  # longest sample allowed, in tokens: text, encoder rows and markers
    microbatches: int  # that the global batch is split into, the same for all modules
    order: Order = "contiguous"  # how cp splits the language model's packed sequences
    mtp_depths: int = 0  # of multi-token prediction: so many more tokens are predicted at each position
    llm_cost: DocumentCost = BY_LENGTH  # of a sample, by which samples go to dp ranks
    limits: Limits | None = None  # largest sizes of an item (data.limits)
    passes: Mapping[str, float] = field(default_factory=dict)  # by module that is not trained as a whole
    axes: bool = False  # whether the language model's positions have three axes (LLMConfig.rope_axes)
    _rows: dict[tuple[str, str], int] = field(default_factory=dict, compare=False, repr=False)

    def rows(self, module: str, part: Part) -> int:
        """How many rows an item contributes; worked out once for items of equal metadata.

        Raises ValueError where the item's metadata do not serve its encoder, and for one beyond the limits.
        """
        if self.limits is not None:
            self.limits.check(part.meta, part.size)
        key = (module, str(dict(part.meta)))
        if key not in self._rows:
            use = self.encoders[module]
            try:
                n = use.rows(part.meta)
            except KeyError as error:
                have = ", ".join(part.meta) or "none: no probe knows this kind of file"
                raise ValueError(f"{use.cls.__name__} needs the metadata {error}, it has {have}") from error
            if n < 0:
                raise ValueError(f"{use.cls.__name__}.rows gave {n}; needed: at least 0")
            self._rows[key] = n
        return self._rows[key]

    def runs(self, sample: Sample) -> list[Run]:
        """A sample as grid_positions() takes it: markers and texts, and how the rows of its items lie."""
        found: list[Run] = [int(sample.markers)]
        for seg in sample.segments:
            if seg.part is None:
                found.append(seg.tokens)
            else:
                use, rows = self.encoders[seg.kind], self.rows(seg.kind, seg.part)
                found.append(item_run(use, seg.part.meta, rows))
        return [*found, int(sample.markers)]

    @property
    def layouts(self) -> list[Layout]:
        """Of all modules."""
        return [self.llm, *(use.layout for use in self.encoders.values())]

    def passes_of(self, module: str) -> float:
        """Forward and backward of a module as a multiple of its forward's FLOPs."""
        return self.passes.get(module, 3.0)

    @property
    def alignment(self) -> int:
        """Packed sequences are padded to a multiple of so many tokens: every rank then has an equal share."""
        return alignment(self.llm.cp, self.llm.tp, self.order)


def sample_length(sample: Sample, inputs: PlanInputs) -> int:
    """Tokens of a sample: a begin marker, its text and item rows, an end marker.

    Raises DataError, naming the item, where its encoder cannot take it.
    """
    n = 2 * sample.markers
    for seg in sample.segments:
        try:
            n += seg.tokens if seg.part is None else inputs.rows(seg.kind, seg.part)
        except ValueError as error:
            assert seg.part is not None
            where = f"{seg.part.name} of sample {sample.key} of {sample.shard}"
            raise DataError(f"{where} does not fit model.{seg.kind}: {error}") from error
    return n


def supervised_tokens(sample: Sample, inputs: PlanInputs) -> int:
    """Tokens of a sample that carry loss: supervised text and, unless it is truncated, the end marker.

    The first token of a sample carries none: nothing in the sample comes before it.
    """
    texts = sum(s.tokens for s in sample.segments if s.part is None and s.loss)
    return _ends(sample) + texts - (not sample.markers and _learned_first(sample, inputs))


def _learned_first(sample: Sample, inputs: PlanInputs) -> bool:
    """Whether a sample without markers begins with text that is learned."""
    for seg in sample.segments:
        if (seg.tokens if seg.part is None else inputs.rows(seg.kind, seg.part)) > 0:
            return seg.part is None and seg.loss
    return False


def _ends(sample: Sample) -> int:
    """Whether a sample has an end marker that is learned."""
    return int(sample.markers and not sample.truncated)


def mtp_supervised_tokens(sample: Sample, inputs: PlanInputs) -> list[int]:
    """Tokens of a sample that carry loss at each depth of multi-token prediction: those at least
    that far behind its begin."""
    total = supervised_tokens(sample, inputs)
    return [total - _supervised_before(sample, depth, inputs) for depth in range(1, inputs.mtp_depths + 1)]


def _supervised_before(sample: Sample, stop: int, inputs: PlanInputs) -> int:
    """Labels at positions below `stop`; that of a token stands one position before it."""
    at, found = int(sample.markers) - 1, 0
    for seg in sample.segments:
        n = seg.tokens if seg.part is None else inputs.rows(seg.kind, seg.part)
        if seg.part is None and seg.loss:
            found += max(0, min(at + n, stop) - max(at, 0))
        at += n
        if at >= stop:
            return found
    return found + _ends(sample)
