"""An encoder with its projector: the node of the model graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from encoders.contract import Encoder, Features, ItemBatch, Meta
from encoders.projector import MLP, Projector, ProjectorKind
from encoders.resampler import Resampling
from encoders.share import Share, pieces
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.param import Given, declared, keep_whole, own_specs
from parallel.topology.axis import Axes
from parallel.topology.layout import Unfit, typed
from parallel.topology.stage import Stage, partition_layers, whole

FREEZE = ("none", "encoder", "projector", "all")  # what freeze() takes


class EncoderModule(nn.Module):
    """An encoder and its projectors, or one pipeline stage of them: ItemBatch to Features d_out wide.

    encoder: the encoder, or the layers of it that the stage has.
    projectors: one for each feature level; none on stages other than the last.
    cfg: the encoder's options.
    axes: of the module; they decide which rows this rank outputs.
    stage: which layers of the encoder these are.
    """

    def __init__(
        self, encoder: Encoder, projectors: Sequence[Projector], cfg: Any, axes: Axes, stage: Stage
    ) -> None:
        super().__init__()
        self.encoder, self.cfg, self.axes, self.stage = encoder, cfg, axes, stage
        self.projector = projectors[0] if projectors else None
        self.level_projectors = nn.ModuleList(projectors[1:])

    def forward(self, batch: ItemBatch, hidden: Tensor | None = None) -> Features | Tensor:
        """Features of this rank's rows: values [rows, d_out], or [rows, levels, d_out] for several levels.

        Stages other than the last return hidden states. Stages after the first receive those of the stage
        before, of hidden_shape(), as `hidden`; of the items they need only the metadata. Raises RowsMismatch
        naming the item where the encoder returns other rows than its rows() promised, and TypeError or
        ValueError for features that the projectors cannot take.
        """
        assert (hidden is None) == self.stage.first, "hidden states go to the stages after the first"
        found: Any = self.encoder(batch) if hidden is None else self.encoder(batch, hidden)
        if not self.stage.last:
            states: Tensor = found
            return states
        features = self._checked(found)
        promised = tuple(self.encoder.rows(self.cfg, meta) for meta in batch.metas)
        given = Share.of(promised, encoder_axes(type(self.encoder), self.axes))
        if features.rows != promised or features.values.shape[0] != given.kept:
            raise _mismatch(type(self.encoder).__name__, features, promised, given)
        self._check_gradient(features.values)
        if self.projector is not None and self.projector.what.kind == "resampler":
            return self._resampled(features.values, promised, given)
        share = Share.of(promised, self.axes)
        # Where every tp rank ran the whole encoder, each continues with its own part of the rows.
        values = features.values.narrow(0, share.part[0] - given.part[0], share.kept)
        return Features(self._project(values, given), promised, share.part[0])

    def _checked(self, found: Any) -> Features:
        """What the encoder returned. Raises TypeError or ValueError where the projectors cannot take it."""
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
        return found

    def _check_gradient(self, values: Tensor) -> None:
        """Raise ValueError for an encoder that has weights to train but whose features have no gradient."""
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters())
        if trained and len(values) and not values.requires_grad:
            name = type(self.encoder).__name__
            raise ValueError(
                f"{name}.forward gave values without a gradient, though it has weights to train; needed: no "
                "detach() or no_grad(), or freeze: encoder"
            )

    def _project(self, values: Tensor, share: Share, ways: Resampling | None = None) -> Tensor:
        assert self.projector is not None
        if not self.level_projectors:
            projected: Tensor = self.projector(values, share, ways)
            return projected
        nets = [self.projector, *self.level_projectors]
        return torch.stack([net(x, share, ways) for net, x in zip(nets, values.unbind(1), strict=True)], 1)

    def _resampled(self, values: Tensor, promised: tuple[int, ...], given: Share) -> Features:
        """The rows that resamplers make of features. given: which features this rank has."""
        assert self.projector is not None
        rows = tuple(self.projector.what.rows(n) for n in promised)
        inner = encoder_axes(type(self.encoder), self.axes)
        made, share = Share.of(rows, inner), Share.of(rows, self.axes)
        ways = Resampling.of(given, made, inner.cp, values.device, self.encoder.timeout_s)
        projected = self._project(values, given, ways)
        # Where every tp rank ran the whole resampler, each continues with its own part of the rows.
        own = projected.narrow(0, share.part[0] - made.part[0], share.kept)
        return Features(own, rows, share.part[0])

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Submodules that FSDP may gather and free one at a time."""
        return self.encoder.layers

    def groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Parameters of the encoder and of the projectors, as freeze() names them."""
        encoder = list(self.encoder.parameters())
        inside = {id(p) for p in encoder}
        return {"encoder": encoder, "projector": [p for p in self.parameters() if id(p) not in inside]}

    def freeze(self, what: str, layers: int = 0) -> None:
        """Stop training one of FREEZE; the other group is trained, except what was declared untrained.

        layers: so many of the encoder's first layers are not trained either, nor what it declares before
        them. They then keep nothing for a backward. Raises ValueError where the encoder lists fewer.
        """
        never = {id(p) for _, p, spec in declared(self) if not spec.trained}
        never |= {id(p) for p in self._first(layers)}
        for name, params in self.groups().items():
            for p in params:
                p.requires_grad_(what not in (name, "all") and id(p) not in never)

    def _first(self, layers: int) -> list[nn.Parameter]:
        """Parameters of the first so many layers, of those that this stage has, and of what is before."""
        if not layers:
            return []
        inside = [{id(p) for p in layer.parameters()} for layer in self.layers]
        first = self.stage.start
        if not type(self.encoder).pipeline:  # else check_frozen() has counted them
            _check_count(layers, len(inside))
        every, deep = list(self.encoder.parameters()), set[int]().union(*inside)
        before = next((n for n, p in enumerate(every) if id(p) in deep), len(every))
        low = set[int]().union(*inside[: max(0, layers - first)])
        # Later stages have nothing before their layers: a parameter of theirs that comes first is of a norm.
        return [p for n, p in enumerate(every) if id(p) in low or (n < before and self.stage.first)]


class RowsMismatch(ValueError):
    """The features of an item do not fill its placeholders.

    item: index of the item in the batch's metas.
    why: what was returned and what was promised.
    """

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


def check_frozen(cls: type[Encoder], cfg: Any, layers: int) -> None:
    """Raise ValueError where more first layers are not to be trained than the encoder has. One that does not
    declare pipeline may not know how many it has: EncoderModule.freeze() then raises it."""
    if cls.pipeline:
        _check_count(layers, cls.layer_count(cfg))


def _check_count(layers: int, count: int) -> None:
    if layers > count:
        works = f"{count} at most" if count else "freeze=encoder, or an encoder that lists its `layers`"
        raise ValueError(f"freeze_layers is {layers}, but the encoder has {count} layers; needed: {works}")


def encoder_axes(cls: type[Encoder], axes: Axes) -> Axes:
    """The axes that an encoder and its projector compute over: cp, and tp if its weights are sharded."""
    if not cls.tensor_parallel:
        return Axes(cp=axes.cp)
    return Axes(tp=axes.tp, cp=axes.cp, sequence_parallel=axes.sequence_parallel)


def check_encoder(
    cls: type[Encoder], cfg: Any, *, tp: int = 1, cp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1
) -> None:
    """Raise ValueError, naming the nearest that works, for options and degrees that the encoder refuses."""
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
    """Partition an encoder into pp stages of costs as equal as its layers allow.

    meta: of a typical item, for the costs of the stem and of the projectors; without it only layers count.
    d_out, projector_hidden: output and hidden width of the projectors.
    Raises ValueError for more stages than layers.
    """
    n = cls.layer_count(cfg)
    if meta is None:
        return partition_layers([1.0] * n, pp)
    stem, project = cls.stem_cost(cfg, meta), projector_flops(cls, cfg, meta, d_out, projector_hidden)
    return partition_layers([(cls.cost(cfg, meta) - stem) / n] * n, pp, before=stem, after=project)


def needed_items(
    cls: type[Encoder], cfg: Any, metas: Sequence[Meta], axes: Axes, stage: Stage | None = None
) -> range:
    """Indices in `metas`, the items of a dp rank, of those that the rank at axes.cp, axes.tp computes from.
    Only these must be read on it. Stages after the first need none."""
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
    """Shape [tokens, width] of the hidden states that `stage`, not the first, receives for the items of a dp
    rank, on the rank at axes.cp, axes.tp. It follows from metadata: a receiver needs no handshake (law 4)."""
    rows = [cls.rows(cfg, meta) for meta in metas]
    tails = [cls.tail_tokens(cfg, meta) for meta in metas]
    unit, prefix = cls.tokens_per_row(cfg), cls.prefix_tokens(cfg)
    share = Share.of(rows, encoder_axes(cls, axes), unit, prefix, tails)
    return share.kept, cls.hidden_width(cfg, stage.start)


def build_encoder_module(
    cls: type[Encoder],
    cfg: Any,
    *,
    d_out: int,
    projector_hidden: int,
    axes: Axes,
    projector: ProjectorKind = MLP,
    stage: Stage | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> EncoderModule:
    """An encoder and its projectors, or one stage of them, with parameters of global shapes.

    d_out, projector_hidden: output and hidden width of the projectors. projector: what they compute.
    stage: which layers to build; None for all. A parameter has one name and initial value in any stage.
    device, dtype: of the parameters, which parallel.sharding.shard shards later.
    Raises ValueError for parameters that are not declared.
    """
    inner, stage = encoder_axes(cls, axes), stage or whole(cls.layer_count(cfg))
    assert cls.context_parallel or axes.cp.size == 1, "check_encoder() refuses this"
    assert cls.pipeline or (stage.first and stage.last), "check_encoder() refuses this"
    factory: FactoryKwargs = {"device": device, "dtype": dtype}
    make: Callable[..., Encoder] = cls
    encoder = make(cfg, inner, stage=stage, **factory) if cls.pipeline else make(cfg, inner, **factory)
    widths = (cls.feature_width(cfg), projector_hidden, d_out)
    projectors = [
        Projector(widths, inner, projector, **factory)
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
    """Raise ValueError for parameters that were not declared or whose values would depend on the stage."""
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
    """Declare that gradients of parameters that tp does not shard are sums over tp: each tp rank has other
    rows."""
    for sub in module.modules():
        specs = own_specs(sub)
        specs.update({name: replace(s, partial=s.shard_dim is None) for name, s in specs.items()})


def projector_flops(cls: type[Encoder], cfg: Any, meta: Meta, d_out: int, hidden: int) -> float:
    """FLOPs of the forward of an item in the projectors. d_out, hidden: their output and hidden width."""
    return cls.rows(cfg, meta) * row_flops(cls, cfg, d_out, hidden)


def row_flops(cls: type[Encoder], cfg: Any, d_out: int, hidden: int, projector: ProjectorKind = MLP) -> float:
    """FLOPs of the forward of one row in the projectors."""
    return cls.feature_levels(cfg) * projector.flops(cls.feature_width(cfg), hidden, d_out)


def module_flops(cls: type[Encoder], cfg: Any, meta: Meta, d_out: int, hidden: int) -> float:
    """FLOPs of the forward of an item in the encoder and its projectors."""
    return cls.cost(cfg, meta) + projector_flops(cls, cfg, meta, d_out, hidden)
