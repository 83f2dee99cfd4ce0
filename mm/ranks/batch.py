"""From a step plan to one rank's tensors: text to token ids, payloads to encoder inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoders.contract import ItemBatch, pack_items
from encoders.module import needed_items
from llm.counts import Counts
from llm.model import LLMBatch, loss_rows
from llm.mtp import IGNORE, ahead
from mm.data.reader import BadSample, ShardReader
from mm.data.sample import Sample, parse_segments
from mm.data.tokenizer import Tokenizer
from mm.plan.step_plan import Edge, Microbatch, PlanInputs, edge_row_positions
from parallel.boundary import EdgePlan, PlanCache, on_stage
from parallel.context_parallel import ContextPacking, pack
from parallel.sequence.packed import Packing
from parallel.topology.axis import Axes


@dataclass(frozen=True)
class RankMicrobatch:
    """What one rank needs for one micro-batch; entries are absent for modules it does not host.

    items: encoder inputs by module; names: sample key of each of those items, for errors;
    llm: the packed text; depends: by module, which labels depend on it, bool [T];
    edges: this rank's boundary plans of the edges whose encoders have items anywhere.
    """

    items: Mapping[str, ItemBatch]
    names: Mapping[str, tuple[str, ...]]
    llm: LLMBatch | None
    depends: Mapping[str, Tensor]
    edges: Mapping[Edge, EdgePlan]


@dataclass(frozen=True)
class Assembler:
    """Builds RankMicrobatches on the host for `rank`. dtype: what encoders compute in, and so take.

    axes: of the modules on this rank; sink: the language model's name; row_shapes: by edge, the trailing
    shape of the rows that enter there; plans: where boundary plans are made, and kept for rows that lie
    alike; timeout_s bounds waits for rows of other cp ranks.
    """

    inputs: PlanInputs
    reader: ShardReader
    tokenizer: Tokenizer
    rank: int
    dtype: torch.dtype
    device: torch.device
    axes: Mapping[str, Axes]
    sink: str
    row_shapes: Mapping[Edge, tuple[int, ...]]
    plans: PlanCache
    timeout_s: float = 120.0

    def build(self, mb: Microbatch, counts: Counts, bad: list[BadSample]) -> RankMicrobatch | None:
        """Read and pack this rank's part of `mb`; unreadable samples are appended to `bad`, then None.

        counts: of the whole step (StepPlan.counts).
        """
        before = len(bad)
        items, names = {}, {}
        for module, edge in mb.edges.items():
            layout = self.inputs.encoders[module].layout
            if edge.items and self.rank in layout.ranks:
                items[module], names[module] = self._items(module, mb, bad)
        llm: LLMBatch | None = None
        depends: dict[str, Tensor] = {}
        if self.rank in self.inputs.llm.ranks:
            llm, depends = self._text(mb, counts, bad)
        if len(bad) > before:
            return None
        edges = {e: self._edge(e, mb) for e in self.row_shapes if mb.edges[e.source].items}
        return RankMicrobatch(items, names, llm, depends, edges)

    def _edge(self, edge: Edge, mb: Microbatch) -> EdgePlan:
        rows, llm = mb.edges[edge.source], self.inputs.llm
        dest = on_stage(llm, rows.dest, edge.stage % llm.pp)
        name = f"{edge.source} -> {self.sink}" + (f".{edge.stage}" if edge.stage else "")
        return self.plans.plan(name, rows.source, dest, row_shape=self.row_shapes[edge])

    def _items(self, module: str, mb: Microbatch, bad: list[BadSample]) -> tuple[ItemBatch, tuple[str, ...]]:
        use = self.inputs.encoders[module]
        at = use.layout.coord(self.rank)
        mine = [item for item in mb.edges[module].items if item.source_dp == at.dp]
        metas = [item.part.meta for item in mine]
        # Later pipeline stages, and ranks that compute other rows, need no payload.
        needed = needed_items(use.cls, use.cfg, metas, self.axes[module]) if at.pp == 0 else range(0)
        tensors = []
        for item in (mine[k] for k in needed):
            sample = mb.samples[item.sample]
            try:
                payload = self.reader.read(sample, item.part)
                tensors.append(use.cls.prepare(use.cfg, payload, item.part.meta))
            except BadSample as error:
                bad.append(error)
            except (ValueError, OSError, EOFError) as error:
                # The payload is what the index says but does not decode: the sample is as bad as a torn one.
                bad.append(BadSample(sample, f"{item.part.name}: {error}"))
        kw: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "first": needed.start}
        batch = pack_items(use.cls, use.cfg, tensors, metas, **kw)
        return batch, tuple(mb.samples[item.sample].key for item in mine)

    def _text(
        self, mb: Microbatch, counts: Counts, bad: list[BadSample]
    ) -> tuple[LLMBatch, dict[str, Tensor]]:
        llm, tok, depths = self.inputs.llm, self.tokenizer, self.inputs.mtp_depths
        coord = llm.coord(self.rank)
        total = mb.tokens[coord.dp]
        ids = np.full(total, tok.pad, dtype=np.int64)
        labels = np.full(total, IGNORE, dtype=np.int64)
        depends = {m: np.zeros(total, dtype=bool) for m in self.inputs.encoders}
        reads = coord.pp in (0, llm.pp - 1)  # stages between need lengths alone
        lengths, n_real = [], 0
        for j in mb.samples_of(coord.dp):
            try:
                if reads:
                    self._write_sample(mb.samples[j], n_real, ids, labels, depends)
            except BadSample as error:
                bad.append(error)
            n_real += mb.length[j]
            lengths.append(mb.length[j])
        if n_real < total:
            lengths.append(total - n_real)
        packing = pack(
            lengths,
            self.device,
            self.axes[self.sink].cp,
            self.inputs.order,
            timeout_s=self.timeout_s,
        )
        text = [torch.from_numpy(ids), torch.from_numpy(labels)]
        mtp = ahead(text[0], text[1], Packing.of(lengths), depths) if depths else None
        flags = {m: torch.from_numpy(d) for m, d in depends.items()}
        if isinstance(packing, ContextPacking):
            own = torch.from_numpy(packing.rows)
            text, flags = [t[own] for t in text], {m: f[own] for m, f in flags.items()}
            mtp = None if mtp is None else (mtp[0][:, own], mtp[1][:, own])
            n_real = packing.rows_before(n_real)
        supervises = loss_rows(text[1], None if mtp is None else mtp[1])
        entering = {e.source for e in self.row_shapes if e.stage % llm.pp == coord.pp}
        entries = {
            m: torch.from_numpy(edge_row_positions(e, self.inputs, self.rank, mb.tokens)).to(self.device)
            for m, e in mb.edges.items()
            if e.items and m in entering
        }
        batch = LLMBatch(
            ids=text[0].to(self.device),
            labels=text[1].to(self.device),
            packing=packing,
            n_real=n_real,
            row_positions=entries,
            counts=counts,
            ahead=None if mtp is None else (mtp[0].to(self.device), mtp[1].to(self.device)),
            loss_rows=tuple(rows.to(self.device) for rows in supervises),
        )
        return batch, {m: f.to(self.device) for m, f in flags.items()}

    def _write_sample(
        self,
        sample: Sample,
        start: int,
        ids: np.ndarray,
        labels: np.ndarray,
        depends: Mapping[str, np.ndarray],
    ) -> None:
        tok = self.tokenizer
        written = parse_segments(self.reader.read(sample, sample.json))
        at = start
        ids[at] = tok.bos
        at += 1
        # The index decides lengths and order (evaluation may have exchanged items); the payload has the text.
        texts = [s.text for s in written if s.text is not None]
        for seg in sample.segments:
            if seg.part is not None:
                n = self.inputs.rows(seg.kind, seg.part)
                ids[at : at + n] = tok.placeholder
            else:
                new = tok.encode(texts.pop(0))
                n = seg.text_bytes
                said = n if seg.written_bytes is None else seg.written_bytes
                if len(new) != said:
                    why = f"a text segment has {len(new)} tokens but the index says {said}; re-index"
                    raise BadSample(sample, why)
                new = new[:n]
                ids[at : at + n] = new
                if seg.loss:
                    labels[at - 1 : at + n - 1] = new
                    if seg.depends is not None and seg.depends in depends:
                        depends[seg.depends][at - 1 : at + n - 1] = True
            at += n
        ids[at] = tok.eos
        if not sample.truncated:
            labels[at - 1] = tok.eos
