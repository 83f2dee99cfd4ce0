"""Turn a step plan into one rank's tensors: text into token ids, payloads into encoder inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from encoders.contract import ItemBatch, pack_items
from encoders.module import needed_items
from llm.counts import Counts
from llm.model import LLMBatch, loss_rows
from llm.mtp import IGNORE, ahead
from mm.data.encode import TokenSegment, encode_samples, parse_sample
from mm.data.reader import BadSample, ShardReader
from mm.data.sample import Part, Sample
from mm.data.tokenizer import AnyTokenizer
from mm.plan.inputs import EncoderUse, PlanInputs
from mm.plan.step_plan import Edge, Microbatch, MicrobatchEdge, StepPlan
from mm.ranks.decoding import Decoded, Reads, Task, Texts, attempt, good
from mm.ranks.positions import with_places
from parallel.boundary import EdgePlan, PlanCache, Stack, stack_positions
from parallel.context_parallel import ContextPacking, pack
from parallel.expert_parallel import Table, routed_tokens
from parallel.sequence.host import to_device
from parallel.sequence.intervals import Column
from parallel.sequence.packed import Packing
from parallel.topology.axis import Axes

Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]  # of any values


@dataclass(frozen=True)
class RankMicrobatch:
    """The tensors of one rank for one micro-batch; modules that the rank does not host are absent."""

    items: Mapping[str, ItemBatch]  # by module, inputs of the encoder
    names: Mapping[str, tuple[str, ...]]  # by module, the name of each item's sample, for errors
    llm: LLMBatch | None  # the packed text; None on ranks without the language model
    depends: Mapping[str, Tensor]  # by module, which labels depend on it: bool [T]
    edges: Mapping[Edge, EdgePlan]  # by edge whose encoder has items on any rank, this rank's boundary plan
    subsets: Tensor | None  # by token with a loss (llm.loss_rows[0]), its subset: int64 [S]; None as llm


@dataclass(frozen=True)
class RankBoundary:
    """What one rank exchanges in one micro-batch.

    edges: by edge whose encoder has items on any rank, this rank's plan. positions: by module whose rows
    enter the language model here, their token positions in this rank's share; int64 [R].
    """

    edges: Mapping[Edge, EdgePlan]
    positions: Mapping[str, Column]


@dataclass(frozen=True)
class Assembler:
    """Builds the RankMicrobatches of one rank, on the host."""

    inputs: PlanInputs
    reader: ShardReader
    tokenizer: AnyTokenizer
    rank: int
    dtype: torch.dtype  # of encoder inputs: what encoders compute in
    device: torch.device
    axes: Mapping[str, Axes]  # by module on this rank
    sink: str  # the language model's module
    row_shapes: Mapping[Edge, tuple[int, ...]]  # by edge, trailing shape of the rows that enter there
    plans: PlanCache  # of boundary plans
    timeout_s: float = 120.0  # longest wait for rows of other cp ranks, seconds

    def boundary(self, plan: StepPlan) -> list[RankBoundary]:
        """This rank's part of all edges, by micro-batch. The micro-batches are planned together."""
        llm, n = self.inputs.llm, len(plan.microbatches)
        edges: list[dict[Edge, EdgePlan]] = [{} for _ in range(n)]
        positions: list[dict[str, Column]] = [{} for _ in range(n)]
        for edge, shape in self.row_shapes.items():
            stage, items = edge.stage % llm.pp, plan.items[edge.source]
            source = self.inputs.encoders[edge.source].layout
            at_once = self.inputs.encoders[edge.source].at_once
            stack = Stack(source, llm, stage, items.columns, plan.padded, self.inputs.order, at_once=at_once)
            name = f"{edge.source} -> {self.sink}" + (f".{edge.stage}" if edge.stage else "")
            found = self.plans.plan_stack(name, stack, row_shape=shape)
            reads = self.rank in llm.stage_ranks(stage)
            entries = stack_positions(stack, self.rank) if reads else ()
            for k in np.flatnonzero(np.diff(items.bounds)).tolist():
                edges[k][edge] = found[k]
                if reads:
                    positions[k][edge.source] = entries[k]
        return [RankBoundary(*both) for both in zip(edges, positions, strict=True)]

    def needs(self, mb: Microbatch) -> Reads[Task]:
        """What this rank reads of `mb`; nothing of what other ranks compute."""
        items, first = {}, {}
        for module, edge in mb.edges.items():
            use = self.inputs.encoders[module]
            if edge.count and self.rank in use.layout.ranks:
                at = use.layout.coord(self.rank)
                mine = edge.items_on(at.dp)
                # Later pipeline stages, and ranks that compute other rows, need no payload.
                needed = self._needed(use, edge) if at.pp == 0 else range(0)
                tasks = [Task(module, mb.sample(mine[k].sample), mine[k].part) for k in needed]
                items[module], first[module] = tasks, needed.start
        llm = self.inputs.llm
        if self.rank not in llm.ranks or llm.coord(self.rank).pp not in (0, llm.pp - 1):
            return Reads(items, first, [])  # stages between need no text, only lengths
        read = mb.samples_of(llm.coord(self.rank).dp)
        mb.see(read)
        texts = [mb.sample(j) for j in read]
        return Reads(items, first, [Task("", sample, sample.json) for sample in texts])

    def decode(self, task: Task, place: Tensor | None = None) -> Tensor | Texts:
        """The inputs of an item [n, *input_shape] on the host, in the dtype of its encoder's inputs, or the
        ids of each text of a sample. place: contiguous memory for the inputs, of places() or as its bytes;
        they are written there where they are of that number. Raises BadSample."""
        if not task.module:
            return [np.asarray(s.ids, np.int64) for s in self.encoded(task.sample) if s.ids is not None]
        use = self.inputs.encoders[task.module]
        dtype = use.cls.input_dtype or self.dtype
        try:
            out: Tensor | None = None
            if place is not None and place.nbytes:
                out = place.reshape(-1).view(dtype).view(-1, *use.cls.input_shape(use.cfg))
            return self._prepared(use, task.sample, task.part, out).to(dtype)
        except (ValueError, OSError, EOFError) as error:
            # The payload matches its index but cannot be decoded: the sample counts as unreadable.
            raise BadSample(task.sample, f"{task.part.name}: {error}") from error

    def places(self, reads: Reads[Task], empty: Empty) -> list[Tensor | None]:
        """By task of `reads.every`, memory for its inputs; those of a module lie as in its batch, so that
        pack_items() need not copy them. None for texts. empty: makes a tensor of some shape and dtype."""
        found: list[Tensor | None] = []
        for module, tasks in reads.items.items():
            cls, cfg = self.inputs.encoders[module].cls, self.inputs.encoders[module].cfg
            counts = [cls.input_count(cfg, task.part.meta) for task in tasks]
            shape = (sum(counts), *cls.input_shape(cfg))
            found += torch.split(empty(shape, cls.input_dtype or self.dtype), counts)
        return [*found, *[None for _ in reads.texts]]

    def ahead(self, tasks: Iterable[Task]) -> None:
        """Read together, from remote stores, what decode() is given next."""
        self.reader.ahead(task.part for task in tasks)

    def build(
        self,
        mb: Microbatch,
        counts: Counts,
        bad: list[BadSample],
        boundary: RankBoundary,
        found: Reads[Decoded] | None = None,
    ) -> RankMicrobatch | None:
        """Pack this rank's part of `mb`; None where a sample of it is unreadable.

        counts: of the whole step (StepPlan.counts). bad: unreadable samples are appended to it. boundary: of
        this micro-batch. found: what needs() of it gave; None: it is read now.
        """
        if found is None:
            reads = self.needs(mb)
            found = reads.filled(attempt(self.decode, task) for task in reads.every)
        before = len(bad)
        bad += [one for one in found.every if isinstance(one, BadSample)]
        if len(bad) > before:
            return None
        read = found.filled(good(one) for one in found.every)
        items, names = {}, {}
        for module in read.items:
            items[module], names[module] = self._items(module, mb, read)
        llm: LLMBatch | None = None
        depends: dict[str, Tensor] = {}
        subsets: Tensor | None = None
        if self.rank in self.inputs.llm.ranks:
            llm, depends, subsets = self._text(mb, counts, read.texts, bad, boundary.positions)
        if len(bad) > before:
            return None
        return RankMicrobatch(items, names, llm, depends, boundary.edges, subsets)

    def _items(
        self, module: str, mb: Microbatch, read: Reads[Tensor | Texts]
    ) -> tuple[ItemBatch, tuple[str, ...]]:
        """The inputs of an encoder here, and the name of each item's sample."""
        use = self.inputs.encoders[module]
        mine = mb.edges[module].items_on(use.layout.coord(self.rank).dp)
        metas = [item.part.meta for item in mine]
        tensors = [one for one in read.items[module] if isinstance(one, Tensor)]
        first, device, dtype = read.first[module], self.device, self.dtype
        batch = pack_items(use.cls, use.cfg, tensors, metas, device=device, dtype=dtype, first=first)
        return batch, tuple(mb.sample(item.sample).name for item in mine)

    def _needed(self, use: EncoderUse, edge: MicrobatchEdge) -> range:
        """Indices of the items of a micro-batch that this rank computes from, of those of its dp rank."""
        dp, axes = use.layout.coord(self.rank).dp, self.axes[edge.module]
        mine = edge.items_on(dp)
        before, every = (0, list(mine)) if use.at_once == 1 else edge.items_at_once(dp)
        found = needed_items(use.cls, use.cfg, [item.part.meta for item in every], axes)
        low, high = (min(max(k - before, 0), len(mine)) for k in (found.start, found.stop))
        return range(low, high)

    def _prepared(self, use: EncoderUse, sample: Sample, part: Part, out: Tensor | None = None) -> Tensor:
        """The inputs of an item [n, *input_shape], on the host; in `out` where they fit."""
        payload = self.reader.read(sample, part)
        made: Tensor
        if out is None:
            made = use.cls.prepare(use.cfg, payload, part.meta)
        else:
            made = use.cls.prepare_into(use.cfg, payload, part.meta, out)
        return made

    def _text(
        self,
        mb: Microbatch,
        counts: Counts,
        texts: Sequence[Tensor | Texts],
        bad: list[BadSample],
        positions: Mapping[str, Column],
    ) -> tuple[LLMBatch, dict[str, Tensor], Tensor]:
        """The packed text of this rank, by module which labels depend on it: bool [T], and RankMicrobatch's
        subsets. texts: by sample of this dp rank, none on stages that need no text. positions: by module
        whose rows enter here, those of its rows."""
        llm, depths = self.inputs.llm, self.inputs.mtp_depths
        coord = llm.coord(self.rank)
        total, mine = mb.tokens[coord.dp], mb.samples_of(coord.dp)
        ids, labels, depends = self._columns(mb, texts, bad)
        lengths = [mb.length[j] for j in mine]
        n_real = sum(lengths)
        subset = np.zeros(total, dtype=np.int64)
        subset[:n_real] = np.repeat(mb.subset[mine], lengths)
        if n_real < total:
            lengths.append(total - n_real)
        packing = pack(
            lengths,
            self.device,
            self.axes[self.sink].cp,
            self.inputs.order,
            timeout_s=self.timeout_s,
        )
        if self.inputs.axes:
            packing = with_places(packing, mb, coord.dp)
        text = [torch.from_numpy(ids), torch.from_numpy(labels)]
        mtp = ahead(text[0], text[1], Packing.of(lengths), depths) if depths else None
        flags, subsets = {m: torch.from_numpy(d) for m, d in depends.items()}, torch.from_numpy(subset)
        if isinstance(packing, ContextPacking):
            own = torch.from_numpy(packing.rows)
            text, flags = [t[own] for t in text], {m: f[own] for m, f in flags.items()}
            subsets = subsets[own]
            mtp = None if mtp is None else (mtp[0][:, own], mtp[1][:, own])
            n_real = packing.rows_before(n_real)
        supervises = loss_rows(text[1], None if mtp is None else mtp[1])
        entries = {m: to_device(own, self.device) for m, own in positions.items()}
        batch = LLMBatch(
            ids=to_device(text[0], self.device),
            labels=to_device(text[1], self.device),
            packing=packing,
            n_real=n_real,
            row_positions=entries,
            counts=counts,
            ahead=None if mtp is None else (to_device(mtp[0], self.device), to_device(mtp[1], self.device)),
            routed=self._routed(mb),
            loss_rows=tuple(to_device(rows, self.device) for rows in supervises),
        )
        with_loss = to_device(subsets[supervises[0]], self.device)
        return batch, {m: to_device(f, self.device) for m, f in flags.items()}, with_loss

    def _columns(
        self, mb: Microbatch, texts: Sequence[Tensor | Texts], bad: list[BadSample]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """The ids and labels of the whole sequence of this dp rank, int64 [T], and by module which labels
        depend on it, bool [T]. Arguments as of _text()."""
        dp = self.inputs.llm.coord(self.rank).dp
        total = mb.tokens[dp]
        ids = np.full(total, self.tokenizer.pad, dtype=np.int64)
        labels = np.full(total, IGNORE, dtype=np.int64)
        depends = {m: np.zeros(total, dtype=bool) for m in self.inputs.encoders}
        mine = mb.samples_of(dp) if texts else []
        at = 0
        for j, own in zip(mine, texts, strict=True):
            assert isinstance(own, list), "these are texts"
            try:
                self._write_sample(mb.sample(j), own, at, ids, labels, depends)
            except BadSample as error:
                bad.append(error)
            at += mb.length[j]
        return ids, labels, depends

    def _routed(self, mb: Microbatch) -> Table | None:
        """Tokens that each rank routes, of those that share experts with this one."""
        llm = self.inputs.llm
        if llm.ep * llm.etp == 1:
            return None
        real = mb.plan.filled[mb.index].tolist()
        return routed_tokens(llm, self.rank, mb.tokens, real, self.inputs.order)

    def encoded(self, sample: Sample) -> tuple[TokenSegment, ...]:
        """A sample's segments as tokens; raises BadSample."""
        payload = self.reader.read(sample, sample.json)
        try:
            written = parse_sample(payload, sample.layout, sample.json.name, sample.names)
            found = encode_samples([written], self.tokenizer)[0]
        except ValueError as error:
            raise BadSample(sample, str(error)) from error
        if isinstance(found, str):
            raise BadSample(sample, found)
        return found

    def _write_sample(
        self,
        sample: Sample,
        written: Texts,
        start: int,
        ids: np.ndarray,
        labels: np.ndarray,
        depends: Mapping[str, np.ndarray],
    ) -> None:
        """Write a sample from token `start` on into the packed columns; raises BadSample.

        written: the ids of its texts. ids, labels, depends: of the whole packed sequence, [T]. A token's
        label is one position before it.
        """
        tok, at = self.tokenizer, start
        texts = list(written if sample.portion is None else written[sample.portion.texts :])
        if sample.markers:
            ids[at] = tok.bos
            at += 1
        # Lengths and order come from the index (evaluation may have exchanged items), text from the payload.
        for seg in sample.segments:
            if seg.part is not None:
                n = self.inputs.rows(seg.kind, seg.part)
                ids[at : at + n] = tok.placeholder_of(seg.kind, seg.part.meta)
            else:
                new = texts.pop(0) if seg.ids is None else seg.ids
                n = seg.tokens
                indexed = n if seg.written is None else seg.written
                if len(new) != indexed:
                    why = f"a text segment has {len(new)} tokens but the index says {indexed}; re-index"
                    raise BadSample(sample, why)
                new = new[seg.first : seg.first + n]
                ids[at : at + n] = new
                if seg.loss:
                    # Nothing in the sample comes before its first token, so that has no label.
                    label = slice(max(at - 1, start), max(at + n - 1, start))
                    labels[label] = new[n - (label.stop - label.start) :]
                    if seg.depends is not None and seg.depends in depends:
                        depends[seg.depends][label] = True
            at += n
        if sample.markers:
            ids[at] = tok.eos
            if not sample.truncated:
                labels[at - 1] = tok.eos
