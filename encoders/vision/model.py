"""A vision transformer with the switches of published families, at any resolution, packed end to end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from encoders.contract import Features, ItemBatch, Meta, check_positive
from encoders.layers import run_layer
from encoders.media.pictures import check_channels, rectangle
from encoders.share import Share, pieces
from encoders.stacked import StackedEncoder
from encoders.vision.attention import frame_attention, window_attention
from encoders.vision.block import Around, Block, Merger, make_norm
from encoders.vision.config import VisionConfig
from encoders.vision.pictures import check_pictures, picture_patches
from encoders.vision.position import resized_all, rotary
from encoders.vision.sizes import fitted, tiling, whole_patches
from encoders.vision.tokens import Grid, Places, patches_before, places, table_rows, token_rows
from encoders.vision.video import step_seconds, tubelet_pieces, tubelets, video_patches, video_size
from parallel.sequence.grid import RowGrid
from parallel.sequence.host import to_device
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.param import ParamSpec, declare, local, normal
from parallel.tensor_parallel.layers import Linear
from parallel.topology.layout import check_divides


class VisionTransformer(StackedEncoder):
    """Pictures, resized as cfg.pictures says, to a row for each merged square of patches, and
    videos (encoders.vision.video) to such rows for each tubelet.

    The rows of a picture that is too small for a patch are refused. Metadata with `down` and `across`, and
    perhaps `frames`, are of a picture or video that is in patches already.
    """

    Config = VisionConfig
    cfg: VisionConfig

    def add_stem(self, **factory: Unpack[FactoryKwargs]) -> None:
        cfg = self.cfg
        self.patch = Linear(
            cfg.inputs, cfg.width, normal(cfg.inputs**-0.5), bias="patch" in cfg.biases, **factory
        )
        table = ParamSpec(normal(0.02), matrix=False)
        if cfg.class_tokens:
            declare(self, "class_token", (cfg.class_tokens, cfg.width), table, **factory)
        if cfg.registers:
            declare(self, "registers", (cfg.registers, cfg.width), table, **factory)
        if cfg.table:
            size = cfg.table**2 + cfg.class_position
            declare(self, "position", (size, cfg.width), table, **factory)
        if cfg.pre_norm:
            self.pre_norm = make_norm(cfg, cfg.width, **factory)

    def make_block(self, layer: int, **factory: Unpack[FactoryKwargs]) -> Block:
        cfg = self.cfg
        return Block(cfg, self.axes, cfg.window > 0 and layer not in cfg.full_layers, **factory)

    def add_norm(self, **factory: Unpack[FactoryKwargs]) -> None:
        cfg = self.cfg
        if cfg.final_norm:
            self.norm = make_norm(cfg, cfg.width, **factory)
        if cfg.merged:
            self.merger = Merger(cfg, self.axes, False, **factory)
            self.level_mergers = nn.ModuleList(
                Merger(cfg, self.axes, True, **factory) for _ in range(len(cfg.levels))
            )

    @classmethod
    def grid(cls, cfg: VisionConfig, meta: Meta) -> Grid:
        """Patches of an item. Raises ValueError where it cannot be brought to whole patches."""
        if "down" in meta:
            return Grid(meta.get("frames", 1), meta["down"], meta["across"])
        check_channels(meta.get("channels", 1), cfg.channels)  # some indexes lack it
        if "pictures" in meta:
            frames = 1 if "group" in meta else tubelets(cfg, meta)
            return Grid(frames, *whole_patches(cfg, meta, video_size(cfg, meta)))
        if cfg.pictures.fit == "tiles" and "tile" not in meta:
            tiles = tiling(cfg.pictures, meta["height"], meta["width"]).tiles
            raise ValueError(f"a picture of {tiles} tiles is so many items; needed: its pieces, one by one")
        return Grid(1, *whole_patches(cfg, meta, fitted(cfg, meta["height"], meta["width"])))

    @classmethod
    def pieces(cls, cfg: VisionConfig, meta: Meta) -> Sequence[str | Meta]:
        """The tiles of a picture, row by row, and its thumbnail, each after its tag; the tubelets of a video,
        where texts stand between them or each has class tokens of its own."""
        if "pictures" in meta:
            return (meta,) if "group" in meta else tubelet_pieces(cfg, meta)
        how = cfg.pictures
        if how.fit != "tiles" or "tile" in meta:
            return (meta,)
        check_channels(meta.get("channels", 1), cfg.channels)
        grid = tiling(how, meta["height"], meta["width"])
        out: list[str | Meta] = []
        for n in range(grid.tiles):
            row, column = divmod(n, grid.across)
            tag = how.thumbnail_tag if row == grid.down else how.tile_tag
            tag = tag.replace("{n}", str(n + 1)).replace("{row}", str(row + 1))
            tag = tag.replace("{column}", str(column + 1))
            out += [tag, {**meta, "tile": n}] if tag and grid.tiles > 1 else [{**meta, "tile": n}]
        return out

    @classmethod
    def feature_width(cls, cfg: VisionConfig) -> int:
        return cfg.merged or cfg.merge**2 * cfg.width

    @classmethod
    def rows(cls, cfg: VisionConfig, meta: Meta) -> int:
        return cls.grid(cfg, meta).patches // cfg.merge**2 + cfg.prefix * cfg.prefix_rows

    @classmethod
    def row_grid(cls, cfg: VisionConfig, meta: Meta) -> RowGrid | None:
        if cfg.prefix_rows and cfg.prefix:
            return None
        g = cls.grid(cfg, meta)
        step = float(cfg.tokens_per_second or 1)
        if cfg.tokens_per_second and g.frames > 1 and "pictures" in meta:
            # Rounded as transformers multiplies them.
            step = float(np.float32(step) * np.float32(step_seconds(cfg, meta)))
        return RowGrid(g.frames, g.down // cfg.merge, g.across // cfg.merge, step)

    @classmethod
    def cost(cls, cfg: VisionConfig, meta: Meta) -> float:
        g, d = cls.grid(cfg, meta), cfg.width
        n = float(g.patches + cfg.prefix)
        linear = 2 * n * (4 * d * d + (2 + cfg.gated) * d * cfg.mlp)
        windows = sum(i not in cfg.full_layers for i in range(cfg.layers)) if cfg.window else 0
        full = 4 * n * (n / g.frames) * d
        within = 4 * n * min(cfg.window**2, n / g.frames) * d
        rows = g.patches / cfg.merge**2
        wide = cfg.merge**2 * d
        merger = 2 * rows * wide * (wide + cfg.merged) * (1 + len(cfg.levels)) if cfg.merged else 0.0
        blocks = cfg.layers * linear + (cfg.layers - windows) * full + windows * within
        return blocks + merger + cls.stem_cost(cfg, meta)

    @classmethod
    def stem_cost(cls, cfg: VisionConfig, meta: Meta) -> float:
        return 2.0 * cls.grid(cfg, meta).patches * cfg.width * cfg.inputs

    @classmethod
    def feature_levels(cls, cfg: VisionConfig) -> int:
        return 1 + len(cfg.levels)

    @classmethod
    def hidden_width(cls, cfg: VisionConfig, layer: int) -> int:
        """The levels of earlier stages travel with the hidden states."""
        return cfg.width * (1 + sum(level < layer for level in cfg.levels))

    @classmethod
    def tokens_per_row(cls, cfg: VisionConfig) -> int:
        return cfg.merge**2

    @classmethod
    def prefix_tokens(cls, cfg: VisionConfig) -> int:
        return 0 if cfg.prefix_rows else cfg.prefix

    @classmethod
    def input_shape(cls, cfg: VisionConfig) -> tuple[int, ...]:
        return (cfg.inputs,)

    @classmethod
    def input_count(cls, cfg: VisionConfig, meta: Meta) -> int:
        return cls.grid(cfg, meta).patches

    @classmethod
    def prepare(cls, cfg: VisionConfig, payload: bytes, meta: Meta) -> Tensor:
        """Patches [n, cfg.inputs], float32, in the order of the tokens."""
        if "pictures" in meta:
            return video_patches(cfg, payload, meta)
        return picture_patches(cfg, payload, meta)

    @classmethod
    def prepare_into(cls, cfg: VisionConfig, payload: bytes, meta: Meta, out: Tensor) -> Tensor:
        if "pictures" in meta or len(out) != cls.input_count(cfg, meta):
            return super().prepare_into(cfg, payload, meta, out)
        return picture_patches(cfg, payload, meta, out)

    @classmethod
    def example(cls, cfg: VisionConfig, rows: int) -> Meta:
        down, across = rectangle(rows)
        tile = {"tile": 0} if cfg.pictures.fit == "tiles" else {}
        return {"height": down * cfg.side, "width": across * cfg.side, "channels": cfg.channels, **tile}

    @classmethod
    def check(cls, cfg: VisionConfig, tp: int) -> None:
        name = cls.__name__.lower()
        check_positive(name, cfg, ("patch", "frames", "width", "heads", "layers", "mlp", "merge"))
        check_divides(f"{name} width", cfg.width, "heads", cfg.heads)
        check_divides(f"{name} heads", cfg.heads, "tp", tp)
        check_divides(f"{name} mlp", cfg.mlp, "tp", tp)
        if cfg.merged:
            check_divides(f"{name} merged patches", cfg.merge**2 * cfg.width, "tp", tp)
        _check_switches(name, cfg)
        check_pictures(name, cfg)

    def forward(self, batch: ItemBatch, hidden: Tensor | None = None) -> Features | Tensor:
        cfg = self.cfg
        rows = tuple(self.rows(cfg, m) for m in batch.metas)
        share = Share.of(rows, self.axes, cfg.merge**2, self.prefix_tokens(cfg))
        states = self._run(batch, share, hidden)
        if self.stage.last:
            return self._features(states, [self.grid(cfg, m) for m in batch.metas], rows, share)
        return torch.cat(states, 1) if len(states) > 1 else states[0]

    def states(self, batch: ItemBatch) -> Tensor:
        """The last hidden states [tokens, width] of all tokens, prefixes too, in one process."""
        cfg = self.cfg
        rows = [self.grid(cfg, m).patches // cfg.merge**2 for m in batch.metas]
        return self._run(batch, Share.of(rows, self.axes, cfg.merge**2, cfg.prefix), None)[0]

    def _run(self, batch: ItemBatch, share: Share, hidden: Tensor | None) -> list[Tensor]:
        """The states after the stage's blocks, then those of levels up to there: each [kept, width]."""
        cfg = self.cfg
        grids = [self.grid(cfg, m) for m in batch.metas]
        states = [self._embed(batch, grids, share)] if hidden is None else torch.split(hidden, cfg.width, 1)
        x, levels = states[0], list(states[1:])
        around = self._around(grids, share, x.device)
        for i, block in zip(self.stage.layers, self.blocks.values(), strict=True):
            x = run_layer(block, self.recompute, x, around)
            if i in cfg.levels:
                levels.append(x)
        if self.stage.last and cfg.final_norm:
            x = self.norm(x)
        return [x, *levels]

    def _around(self, grids: Sequence[Grid], share: Share, device: torch.device) -> Around:
        """What the blocks of a batch share."""
        cfg, cp = self.cfg, self.axes.cp
        own = places(grids, share, share.own, prefix=cfg.prefix, merge=cfg.merge)
        timing: dict[str, Any] = {"device": device, "timeout_s": self.timeout_s}
        windows = None
        if cfg.window:
            windows = window_attention(grids, share, cp, shape=(cfg.window, cfg.merge), **timing)
        frames = frame_attention(grids, share, cp, prefix=cfg.prefix, **timing)
        return Around(frames, windows, rotary(cfg, own, device), share)

    def _embed(self, batch: ItemBatch, grids: Sequence[Grid], share: Share) -> Tensor:
        """The tokens that this rank keeps, embedded: [kept, width]."""
        cfg = self.cfg
        at = places(grids, share, share.part, prefix=cfg.prefix, merge=cfg.merge)
        first = patches_before(grids, share, share.part[0], cfg.prefix)
        first -= sum(
            g.patches for g in grids[: batch.first]
        )  # batch.values lack the items before batch.first
        count = int((at.prefix < 0).sum())
        values = batch.values.narrow(0, max(first, 0) if count else 0, count)
        x: Tensor = self.patch(values.to(local(self.patch.weight).dtype))
        if cfg.table:
            x = x + self._positions(grids, share, at)
        if cfg.prefix:
            x = self._with_prefix(x, at)
        return self.pre_norm(x) if cfg.pre_norm else x

    def _positions(self, grids: Sequence[Grid], share: Share, at: Places) -> Tensor:
        """The learned positions of this rank's patches: [patches, width]. A grid is made once a batch."""
        table = local(self.position)
        table = table[int(self.cfg.class_position) :]
        items = [p.item for p in pieces(share.lengths, share.part)]
        sizes = list(dict.fromkeys((grids[i].down, grids[i].across) for i in items))
        ends = accumulate((down * across for down, across in sizes), initial=0)
        starts = dict(zip(sizes, ends, strict=False))
        index = to_device(table_rows(at, [starts.get((g.down, g.across), 0) for g in grids]), table.device)
        return resized_all(table, sizes, self.cfg.interpolation).index_select(0, index)

    def _with_prefix(self, x: Tensor, at: Places) -> Tensor:
        """Patches [patches, width] among the class tokens and registers of this rank: [kept, width]."""
        cfg = self.cfg
        first = [local(self.class_token)] if cfg.class_tokens else []
        if cfg.class_position:
            first = [first[0] + local(self.position)[:1]]
        if cfg.registers:
            first.append(local(self.registers))
        return torch.cat([*first, x]).index_select(0, to_device(token_rows(at, cfg.prefix), x.device))

    def _features(
        self, states: Sequence[Tensor], grids: Sequence[Grid], rows: tuple[int, ...], share: Share
    ) -> Features:
        """The rows of this rank, of each level."""
        cfg = self.cfg
        of_rows = Share.of(rows, self.axes)
        if cfg.prefix and not cfg.prefix_rows:
            at = places(grids, share, share.part, prefix=cfg.prefix, merge=cfg.merge)
            patches = to_device(np.flatnonzero(at.prefix < 0), states[0].device)
            states = [y.index_select(0, patches) for y in states]
        states = [y.reshape(-1, cfg.merge**2 * cfg.width) for y in states]
        if cfg.merged:
            mergers = [self.merger, *self.level_mergers]
            states = [merge(y, of_rows) for merge, y in zip(mergers, states, strict=True)]
        values = torch.stack(list(states), 1) if cfg.levels else states[0]
        return Features(values, rows, of_rows.part[0])


def _check_switches(name: str, cfg: VisionConfig) -> None:
    """Refuse switches that exclude each other."""
    if cfg.prefix_rows and (cfg.merge > 1 or cfg.merged):
        raise ValueError(f"{name} prefix_rows=true with merge={cfg.merge}; needed: one of them only")
    if cfg.class_position and cfg.class_tokens != 1:
        raise ValueError(f"{name} class_position=true with class_tokens={cfg.class_tokens}; needed: 1")
    if cfg.prefix and cfg.window:
        raise ValueError(f"{name} window={cfg.window} with class tokens; needed: one of them only")
    if cfg.window % cfg.merge:
        raise ValueError(f"{name} window={cfg.window}; needed: a multiple of merge={cfg.merge}")
    if cfg.rope != "none" and cfg.head_dim % 4:
        raise ValueError(f"{name} heads are {cfg.head_dim} wide; needed: a multiple of 4 (rotary)")
    if cfg.channels not in (1, 3):
        raise ValueError(f"{name} channels is {cfg.channels}; needed: 1 (grey) or 3 (colour)")
    known = {"patch", "q", "k", "v", "out", "mlp"}
    if set(cfg.biases) - known:
        raise ValueError(f"{name} biases are {list(cfg.biases)}; known: {', '.join(sorted(known))}")
    if list(cfg.levels) != sorted(set(cfg.levels)) or not set(cfg.levels) <= set(range(cfg.layers)):
        raise ValueError(
            f"{name} levels are {list(cfg.levels)}; needed: ascending layers of 0-{cfg.layers - 1}, each once"
        )
