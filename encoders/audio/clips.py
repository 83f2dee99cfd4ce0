"""What audio encoders share: the rows of clips, stems that see a stretch of one clip, the blocks' forward."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoders.audio.sound import clips_of, left_out
from encoders.context import ItemAttention
from encoders.contract import Features, ItemBatch, Meta
from encoders.layers import run_layer
from encoders.share import Share, pieces
from encoders.stacked import StackedEncoder
from encoders.vision.block import Around
from parallel.sequence.host import to_device


class ClipEncoder(StackedEncoder):
    """A stem over each clip alone, blocks, perhaps a norm.

    A rank that has some tokens of a clip runs the stem on the stretch of its inputs that these see, so
    nothing is fetched from other ranks. Stretches of equal length at equal places run as one batch.
    """

    @classmethod
    def pieces(cls, cfg: Any, meta: Meta) -> Sequence[Meta]:
        """Clips of a long recording, where cfg.sound.long asks for them."""
        return clips_of(cfg.sound, meta, lambda clip: cls.rows(cfg, clip))

    @classmethod
    def omits(cls, cfg: Any, meta: Meta) -> str:
        return left_out(cfg.sound, meta)

    @abstractmethod
    def stretch(self, inputs: int, start: int, stop: int) -> tuple[int, int]:
        """Which inputs [first, last) of a clip of so many the stem needs for its tokens [start, stop)."""

    @abstractmethod
    def embed(self, x: Tensor, inputs: int, start: int, stop: int) -> Tensor:
        """Tokens [start, stop) of clips of so many inputs: x [n, stretch, *input_shape] to [n, tokens,
        width]."""

    @property
    @abstractmethod
    def fewest(self) -> int:
        """Inputs of a clip of at least one row."""

    def forward(self, batch: ItemBatch, hidden: Tensor | None = None) -> Features | Tensor:
        rows = tuple(self.rows(self.cfg, meta) for meta in batch.metas)
        tails = [self.tail_tokens(self.cfg, meta) for meta in batch.metas]
        share = Share.of(rows, self.axes, self.tokens_per_row(self.cfg), tails=tails)
        x = self._embed(batch, share) if hidden is None else hidden
        context = self.context(share, x)
        for block in self.blocks.values():
            x = run_layer(block, self.recompute, x, context)
        if not self.stage.last:
            return x
        return Features(self.finish(self._paired(x, rows, share)), rows, Share.of(rows, self.axes).part[0])

    def context(self, share: Share, x: Tensor) -> Any:
        """What the blocks of a batch share."""
        return Around(ItemAttention.of(share, self.axes.cp, x.device, self.timeout_s), None, None, share)

    def finish(self, x: Tensor) -> Tensor:
        """What comes after the last block: of rows [kept, width] where a token is one, else of the tokens of
        each row, [kept rows, tokens_per_row, width]."""
        return x

    def _paired(self, x: Tensor, rows: Sequence[int], share: Share) -> Tensor:
        """The tokens of each row on this rank, without tails: what finish() takes."""
        unit = self.tokens_per_row(self.cfg)
        if unit == 1:
            return x
        if any(n != unit * m for n, m in zip(share.lengths, rows, strict=True)):
            own = pieces(share.lengths, share.part)
            real = [np.arange(p.start, p.stop) < unit * rows[p.item] for p in own]
            kept = np.flatnonzero(np.concatenate(real)) if real else np.zeros(0, dtype=np.int64)
            x = x.index_select(0, to_device(kept, x.device))
        return x.reshape(-1, unit, x.shape[-1])

    def _embed(self, batch: ItemBatch, share: Share) -> Tensor:
        """The tokens that this rank keeps: [kept, width]."""
        own = pieces(share.lengths, share.part)
        values = batch.values
        if not own:  # the weights have gradients, of zero, on this rank too
            return self.embed(values.new_zeros((1, self.fewest, *values.shape[1:])), self.fewest, 0, 1)[0, :0]
        starts = (0, *accumulate(batch.lengths))
        groups: dict[tuple[int, int, int], list[int]] = {}
        for i, p in enumerate(own):
            groups.setdefault((batch.lengths[p.item - batch.first], p.start, p.stop), []).append(i)
        found: dict[int, Tensor] = {}
        for (inputs, start, stop), members in groups.items():
            a, b = self.stretch(inputs, start, stop)
            firsts = [starts[own[i].item - batch.first] for i in members]
            x = self.embed(torch.stack([values[f + a : f + b] for f in firsts]), inputs, start, stop)
            found |= zip(members, x, strict=True)
        return torch.cat([found[i] for i in range(len(own))])
