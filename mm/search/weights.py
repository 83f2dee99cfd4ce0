"""What data ranks hold of a module's weights, and what gathering and summing them takes, at least."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from llm.flops import layer_params
from llm.stages import partition
from mm.config.outline import SINK, frozen_modules
from mm.plan.blueprint import Blueprint
from mm.predict.hardware import Hardware
from mm.predict.links import Place, message_seconds
from mm.predict.work import Message
from mm.search.candidate import Choice, Degrees
from mm.search.space import ANY
from parallel.topology.groups import Group
from parallel.topology.stage import Stage


class Params(NamedTuple):
    """Parameters of one rank of a pipeline rank, before data ranks share them: dense ones, and experts'."""

    dense: float
    expert: float


@dataclass
class Weights:
    """blueprint: the job with every module data parallel. node: ranks a node; None where there is one."""

    blueprint: Blueprint
    hardware: Hardware
    node: int | None
    _known: dict[object, object] = field(default_factory=dict)

    def layers(self, module: str) -> int:
        """How many layers a module has."""
        return self.blueprint.stages[module][-1].stop

    def stages(self, n: int) -> tuple[Stage, ...]:
        """The language model in n stages."""
        if ("stages", n) not in self._known:
            context = self.blueprint.cfg.data.context
            self._known["stages", n] = partition(self.blueprint.llm, n, (context,))
        found = self._known["stages", n]
        assert isinstance(found, tuple)
        return found

    def held(self, module: str, choice: Choice, pp: int) -> tuple[float, float]:
        """(bytes, seconds of the update) of a pipeline rank: weights, gradients and optimizer state."""
        d, blueprint = choice.degrees, self.blueprint
        stored, item = blueprint.stored_dtype.itemsize, blueprint.dtype.itemsize
        whole, state = self.params(module, d, pp), self._state(module)
        shards = self._shards(choice)
        shard = whole.dense / shards[0] + whole.expert / shards[1]
        count = whole.dense + whole.expert
        by_layer = blueprint.cfg.train.shard == "layer" and choice.data_parallel in ("zero3", "hsdp", ANY)
        learns = self._learns(module)
        held = shard * (stored + state * learns)
        if not by_layer:
            held += count * item
        if learns:
            held += count * stored if choice.data_parallel == "step" else shard * stored
        moved = shard * learns * (3 * stored + 2 * state)
        memory = self.hardware.memory
        return held, moved / (memory.bandwidth * memory.efficiency)

    def traffic(
        self, module: str, choice: Choice, costs: list[tuple[float, float]], m: int
    ) -> tuple[list[float], list[float], float, float]:
        """What data ranks' gathers and sums add, as parallel.schedule.simulator.traffic has it: to each
        forward and backward by stage, before the first computation, after the last. costs: seconds of a
        forward and a backward by stage."""
        d, sums = choice.degrees, [0.0] * len(costs)
        whole = [self.params(module, d, pp) for pp in range(d.pp)]
        stored, item = self.blueprint.stored_dtype.itemsize, self.blueprint.dtype.itemsize
        gather = max(self._over_data("all_gather", choice, p, item) for p in whole) / d.vpp
        total = max(self._over_data("reduce_scatter", choice, p, stored) for p in whole) / d.vpp
        total *= self._learns(module)
        units = 3 if module == SINK else 1
        if choice.data_parallel == ANY:
            return sums, sums, 0.0, 0.0
        if choice.data_parallel == "step":
            return sums, sums, gather, total / units
        if self.blueprint.cfg.train.shard == "layer":
            units += self.layers(module)
        each = [max(gather / units, gather - f * (1 - 1 / units)) for f, _ in costs]
        sums = [max(0.0, total - b) * (m - 1) / m for _, b in costs]
        return each, sums, 0.0, total / units

    def _over_data(self, op: str, choice: Choice, whole: Params, item: int) -> float:
        """Seconds of a collective of whole weights, or their gradients, over the data ranks."""
        if self.hardware.host is not None:
            return 0.0
        d, out = choice.degrees, 0.0
        for count, shards, stride in zip(whole, self._shards(choice), (d.tp, d.etp * d.ep), strict=True):
            if count and shards > 1:
                on_node = shards if self.node is None else max(1, min(shards, self.node // stride))
                place = Place(shards, -(-shards // on_node), on_node)
                message = Message(op, Group("module", "", "data"), count * item)
                out += message_seconds(message, place, self.hardware)
        return out

    def _learns(self, module: str) -> bool:
        """Whether all of a module is trained."""
        blueprint = self.blueprint
        if module in frozen_modules(blueprint.cfg, blueprint.llm) or module in blueprint.cfg.train.lora:
            return False
        return module == SINK or (
            blueprint.cfg.model[module].freeze == "none" and not blueprint.cfg.model[module].freeze_layers
        )

    def _shards(self, choice: Choice) -> tuple[int, int]:
        """Most shards of dense weights and of experts'."""
        d, size = choice.degrees, choice.block.size
        edp = size // (d.etp * d.ep * d.pp)
        most = choice.dp * d.cp, edp
        if choice.data_parallel == "hsdp" and self.node is not None:
            return min(most[0], self.node), min(most[1], self.node)
        return most

    def _state(self, module: str) -> float:
        """Bytes of optimizer state of a parameter, at least."""
        key = "state", module
        if key not in self._known:
            weights = [w for unit in self.blueprint.weights(module, 0) for w in unit if w.trained]
            self._known[key] = float(min((w.state for w in weights), default=0))
        found = self._known[key]
        assert isinstance(found, float)
        return found

    def params(self, module: str, d: Degrees, pp: int) -> Params:
        """Parameters of one rank at least."""
        if module != SINK:
            return Params(self._encoder_params(module) * (self.layers(module) // d.pp) / d.tp, 0.0)
        dense = expert = 0.0
        llm, stages = self.blueprint.llm, self.stages(d.pp * d.vpp)
        for stage in stages[pp :: d.pp]:
            for symbol, n in Counter(llm.symbols[i] for i in stage.layers).items():
                every = layer_params(llm, symbol)[0]
                own = (
                    _expert_params(llm.n_experts, llm.top_k, *layer_params(llm, symbol))
                    if symbol == "E"
                    else 0
                )
                dense, expert = dense + n * (every - own), expert + n * own
            ends = stage.first + (stage.last and not llm.tied)
            dense += ends * llm.vocab_size * llm.d_model
        return Params(dense / d.tp, expert / (d.ep * d.etp))

    def states(self) -> float:
        """Bytes that weights, their gradients and the optimizer's state take over all devices, each once."""
        stored, out = self.blueprint.stored_dtype.itemsize, 0.0
        for module in self.blueprint.modules:
            count = sum(self.params(module, Degrees(), 0))
            out += count * (stored + self._learns(module) * (stored + self._state(module)))
        return out

    def _encoder_params(self, module: str) -> float:
        """Of one layer."""
        key = "layer", module
        if key not in self._known:
            from mm.plan.blueprint import bare_module
            from mm.plan.weights import layers_of
            from parallel.topology.axis import Axes
            from parallel.topology.stage import whole

            made = bare_module(self.blueprint, module, Axes(), whole(self.layers(module)))
            every = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(made)]
            self._known[key] = float(min(every, default=0))
        found = self._known[key]
        assert isinstance(found, float)
        return found


def _expert_params(n: int, top: int, every: int, active: int) -> float:
    """Parameters of the experts of a layer, from those of all and those that a token uses."""
    return n * (every - active) / (n - top) if n > top else 0.0
