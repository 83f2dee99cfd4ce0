"""An encoder with its projector: the node of the model graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from encoders.contract import Encoder, Features, ItemBatch, Meta
from encoders.projector import Projector
from encoders.share import Share, pieces
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.param import Given, declared, keep_whole, own_specs
from parallel.topology.axis import Axes
from parallel.topology.layout import Unfit, typed
from parallel.topology.stage import Stage, partition_layers, whole

FREEZE = ("none", "encoder", "projector", "all")


class EncoderModule(nn.Module):
    """ItemBatch to Features of the language model's width, or one stage of the way.

    cfg: the encoder's options; axes: those of the module, which decide the rows that this rank gives;
    projectors: one for each feature level, empty on all stages but the last.
    """

    def __init__(
        self, encoder: Encoder, projectors: Sequence[Projector], cfg: Any, axes: Axes, stage: Stage
    ) -> None:
        super().__init__()
        self.encoder, self.cfg, self.axes, self.stage = encoder, cfg, axes, stage
        self.projector = projectors[0] if projectors else None
        self.level_projectors = nn.ModuleList(projectors[1:])

    def forward(self, batch: ItemBatch, hidden: Tensor | None = None) -> Features | Tensor:
        """Features of this rank's rows, values [rows, d_out] (several levels: [rows, levels, d_out]).

        Stages after the first take the hidden states of the one before, of hidden_shape(), and of the items
        only the metadata; all but the last give hidden states. Raises ValueError naming the item
        where the encoder gives other rows than its rows() promised.
        """
        assert (hidden is None) == self.stage.first, "hidden states go to the stages after the first"
        found = self.encoder(batch) if hidden is None else self.encoder(batch, hidden)
        if not self.stage.last:
            return found
        promised = tuple(self.encoder.rows(self.cfg, meta) for meta in batch.metas)
        self._check_features(found)
        given = Share.of(promised, encoder_axes(type(self.encoder), self.axes))
        if found.rows != promised or found.values.shape[0] != given.kept:
            raise _mismatch(type(self.encoder).__name__, found, promised, given)
        self._check_gradient(found.values)
        share = Share.of(promised, self.axes)
        # Where every tp rank has run the whole encoder, it goes on with its own part.
        values = found.values.narrow(0, share.part[0] - given.part[0], share.kept)
        return Features(self._project(values, given), promised, share.part[0])

    def _check_features(self, found: Any) -> None:
        """Say in words what an encoder gave that the projectors cannot take."""
        name, cls = type(self.encoder).__name__, type(self.encoder)
        if not isinstance(found, Features):
            raise TypeError(f"{name}.forward gave {type(found).__name__}; needed: encoders.Features")
        levels, width = cls.feature_levels(self.cfg), cls.feature_width(self.cfg)
        shape = (width,) if levels == 1 else (levels, width)
        if tuple(found.values.shape[1:]) != shape:
            raise ValueError(
                f"{name}.forward gave values {list(found.values.shape)}; needed: [rows, "
                f"{', '.join(map(str, shape))}], as feature_width (and feature_levels) say"
            )

    def _check_gradient(self, values: Tensor) -> None:
        """Refuse an encoder that would silently not be trained."""
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters())
        if trained and len(values) and not values.requires_grad:
            name = type(self.encoder).__name__
            raise ValueError(
                f"{name}.forward gave values without a gradient, though it has weights to train; needed: no "
                "detach() or no_grad(), or freeze: encoder"
            )

    def _project(self, values: Tensor, share: Share) -> Tensor:
        assert self.projector is not None
        if not self.level_projectors:
            return self.projector(values, share)
        nets = [self.projector, *self.level_projectors]
        return torch.stack([net(x, share) for net, x in zip(nets, values.unbind(1), strict=True)], 1)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Submodules that may be gathered and freed on their own."""
        return self.encoder.layers

    def groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Trainable groups by name."""
        encoder = list(self.encoder.parameters())
        inside = {id(p) for p in encoder}
        return {"encoder": encoder, "projector": [p for p in self.parameters() if id(p) not in inside]}

    def freeze(self, what: str) -> None:
        """Stop training a group: none, encoder, projector or all."""
        never = {id(p) for _, p, spec in declared(self) if not spec.trained}
        for name, params in self.groups().items():
            for p in params:
                p.requires_grad_(what not in (name, "all") and id(p) not in never)


class RowsMismatch(ValueError):
    """Features do not fit their placeholders. item: index in the batch's metas."""

    def __init__(self, item: int, why: str) -> None:
        super().__init__(f"item {item}: {why}")
        self.item, self.why = item, why


def _mismatch(name: str, found: Features, promised: tuple[int, ...], given: Share) -> RowsMismatch:
    pairs = list(zip(found.rows, promised, strict=False))
    item = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    if found.rows == promised:
        item = next((p.item for p in pieces(given.lengths, given.part)), 0)
        return RowsMismatch(item, f"{name} gave {found.values.shape[0]} rows here, rows() says {given.kept}")
    gave = found.rows[item] if item < len(found.rows) else "no"
    need = promised[item] if item < len(promised) else found.values.shape[0]
    return RowsMismatch(item, f"{name} gave {gave} rows, rows() says {need}")


def encoder_axes(cls: type[Encoder], axes: Axes) -> Axes:
    """What an encoder and its projector compute over: cp, and tp where the encoder is cut over it."""
    if not cls.tensor_parallel:
        return Axes(cp=axes.cp)
    return Axes(tp=axes.tp, cp=axes.cp, sequence_parallel=axes.sequence_parallel)


def check_encoder(
    cls: type[Encoder], cfg: Any, *, tp: int = 1, cp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1
) -> None:
    """Refuse options and degrees that the encoder cannot have: ValueError with the nearest that works."""
    name = cls.__name__
    if ep > 1 or etp > 1:
        given = {d: n for d, n in (("ep", ep), ("etp", etp)) if n > 1}
        raise Unfit(
            f"{name} is given {typed(given)}, but encoders have no experts, only the language model has",
            [dict.fromkeys(given, 1)],
        )
    for degree, n, able, what in (
        ("cp", cp, cls.context_parallel, "context_parallel"),
        ("pp", pp, cls.pipeline, "pipeline"),
    ):
        if n > 1 and not able:
            raise Unfit(
                f"{name} is given {degree}={n}, but does not declare {what}; needed: {degree}=1, which "
                f"leaves its ranks to dp, or an encoder with {what} = True",
                [{degree: 1}],
            )
    if pp > 1 and pp > cls.layer_count(cfg):
        n = cls.layer_count(cfg)
        raise Unfit(f"{name} is given pp={pp}, but has {n} layers; needed: a layer a stage", [{"pp": n}])
    cls.check(cfg, tp if cls.tensor_parallel else 1)


def encoder_stages(
    cls: type[Encoder],
    cfg: Any,
    pp: int,
    *,
    meta: Meta | None = None,
    d_out: int = 0,
    projector_hidden: int = 0,
) -> tuple[Stage, ...]:
    """Cut an encoder into pp stages, as even as its layers allow.

    meta: a typical item, to weigh the stem and the projector by; without it only layers count. Raises
    ValueError for more stages than layers.
    """
    n = cls.layer_count(cfg)
    if meta is None:
        return partition_layers([1.0] * n, pp)
    stem, project = cls.stem_cost(cfg, meta), projector_flops(cls, cfg, meta, d_out, projector_hidden)
    return partition_layers([(cls.cost(cfg, meta) - stem) / n] * n, pp, before=stem, after=project)


def needed_items(
    cls: type[Encoder], cfg: Any, metas: Sequence[Meta], axes: Axes, stage: Stage | None = None
) -> range:
    """The items of a data-parallel lane, by number, whose inputs the rank at axes.cp, axes.tp computes from;
    no others need be read on it. Stages after the first need none."""
    if stage is not None and not stage.first:
        return range(0)
    if not cls.context_parallel:
        return range(len(metas))
    own = Share.of([cls.rows(cfg, meta) for meta in metas], encoder_axes(cls, axes))
    touched = pieces(own.lengths, own.part)
    return range(touched[0].item, touched[-1].item + 1) if touched else range(0)


def hidden_shape(
    cls: type[Encoder], cfg: Any, metas: Sequence[Meta], stage: Stage, axes: Axes
) -> tuple[int, int]:
    """Shape of the hidden states that `stage`, not the first, takes for the items of a data-parallel lane, on
    the rank at axes.cp, axes.tp. From metadata alone, so that a receiver needs no handshake."""
    rows = [cls.rows(cfg, meta) for meta in metas]
    share = Share.of(rows, encoder_axes(cls, axes), cls.tokens_per_row(cfg))
    return share.kept, cls.hidden_width(cfg, stage.start)


def build_encoder_module(
    cls: type[Encoder],
    cfg: Any,
    *,
    d_out: int,
    projector_hidden: int,
    axes: Axes,
    stage: Stage | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> EncoderModule:
    """Build an encoder and its projector, or one stage of them, with global shapes, which
    parallel.sharding.shard cuts later. Parameters have the same names and initial values in any stage. Raises
    ValueError for parameters that are not declared."""
    inner, stage = encoder_axes(cls, axes), stage or whole(cls.layer_count(cfg))
    assert cls.context_parallel or axes.cp.size == 1, "check_encoder() refuses this"
    assert cls.pipeline or (stage.first and stage.last), "check_encoder() refuses this"
    factory: FactoryKwargs = {"device": device, "dtype": dtype}
    staged: dict[str, Any] = {"stage": stage} if cls.pipeline else {}
    encoder = cls(cfg, inner, **staged, **factory)
    projectors = [
        Projector(cls.feature_width(cfg), projector_hidden, d_out, inner, **factory)
        for _ in range(cls.feature_levels(cfg) if stage.last else 0)
    ]
    module = EncoderModule(encoder, projectors, cfg, axes, stage)
    _check_parameters(module, f"{cls.__module__}:{cls.__name__}")
    if not cls.tensor_parallel:
        keep_whole(module)
    if axes.sequence_parallel:
        _sum_over_tp(module)
    return module


def _check_parameters(module: EncoderModule, name: str) -> None:
    """Refuse parameters that were not declared, or whose values would depend on the pipeline's stages."""
    try:
        found = list(declared(module))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if module.stage.first and module.stage.last:
        return
    for full, _, spec in found:
        if isinstance(spec.init, Given) and not spec.init.keyed:
            raise ValueError(
                f"{name}: {full} was adopted in a stage of a pipeline, where its value may depend on what "
                "the stage made before it; needed: adopt(lambda: .., key=..), with a name that is the same "
                "in any stage, such as f'layers.{i}'"
            )


def _sum_over_tp(module: nn.Module) -> None:
    """Declare that parameters that tp does not cut see other rows on each tp rank."""
    for sub in module.modules():
        specs = own_specs(sub)
        specs.update({name: replace(s, partial=s.shard_dim is None) for name, s in specs.items()})


def projector_flops(cls: type[Encoder], cfg: Any, meta: Meta, d_out: int, hidden: int) -> float:
    """Forward FLOPs of one item in the projectors, d_out wide."""
    return 2.0 * cls.feature_levels(cfg) * cls.rows(cfg, meta) * hidden * (cls.feature_width(cfg) + d_out)


def module_flops(cls: type[Encoder], cfg: Any, meta: Meta, d_out: int, hidden: int) -> float:
    """Forward FLOPs of one item, projector (d_out wide) included."""
    return cls.cost(cfg, meta) + projector_flops(cls, cfg, meta, d_out, hidden)
