"""The load of a step: its documents and items, and what a data rank has of them on average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mm.plan.blueprint import Blueprint
from mm.plan.step_plan import StepPlan
from mm.predict.count.sizes import Attended, Bucket, TokenLoad


@dataclass(frozen=True)
class StepLoad:
    """documents: samples of a step. length, supervised: tokens of a mean one, and of these with a loss, of
    the next token and of each depth of multi-token prediction. items: by encoder, metadata of each. ragged:
    whether documents differ.
    """

    documents: int
    length: float
    supervised: tuple[float, ...]
    items: Mapping[str, tuple[Mapping[str, Any], ...]]
    ragged: bool

    @staticmethod
    def of(blueprint: Blueprint, plan: StepPlan) -> StepLoad:
        """The load of a planned step, which is the same under every layout."""
        table, n = plan.table, len(plan.table.length)
        items: dict[str, list[Mapping[str, Any]]] = {m: [] for m in blueprint.inputs.encoders}
        for j in table.which.tolist():
            for segment in table.samples[j].segments:
                if segment.part is not None and segment.kind in items:
                    items[segment.kind].append(segment.part.meta)
        return StepLoad(
            documents=n,
            length=float(table.length.sum()) / n,
            supervised=(float(table.supervised.sum()) / n, *(float(row.sum()) / n for row in table.mtp)),
            items={m: tuple(found) for m, found in items.items()},
            ragged=bool(table.length.min() < table.length.max()),
        )

    def share(self, dp: int, microbatches: int) -> float:
        """Documents of a mean micro-batch on the data rank that has most."""
        return max(self.documents / dp, 1.0) / microbatches

    def tokens(self, documents: int, tp: int, cp: int) -> TokenLoad:
        """So many mean documents, where none crosses cp: what crosses only adds."""
        length = max(1, int(self.length / cp))
        total = documents * length
        return TokenLoad(
            tokens=total,
            routed=total // tp,
            documents=documents,
            attended=Attended((Bucket(documents, length, length, total),), documents == 1),
            supervised=tuple(int(documents * s / cp) for s in self.supervised),
        )
