"""What data ranks hold of a module's weights, and what gathering and summing them takes, at least."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from llm.flops import layer_params
from llm.stages import partition
from mm.config.outline import SINK, frozen_modules
from mm.plan.blueprint import Blueprint
from mm.predict.costs import NUMBERS, UPDATE_CALLS
from mm.predict.hardware import Hardware
from mm.predict.links import Place, message_seconds, processor_seconds
from mm.predict.work import Message
from mm.search.candidate import Choice, Degrees
from mm.search.space import ANY
from parallel.topology.groups import WORLD, Group
from parallel.topology.stage import Stage


class Owned(NamedTuple):
    """What a pipeline rank has of a module, at least. held: bytes of weights and optimizer state, in any
    case; gradients: bytes, once there are some. update: seconds."""

    held: float
    gradients: float
    update: float


class Params(NamedTuple):
    """Parameters of one rank of a pipeline rank, before data ranks share them: dense ones, and experts'."""

    dense: float
    expert: float


class Moved(NamedTuple):
    """Seconds of a pipeline rank's gathers of a micro-batch, and of its sums, by virtual stage; in so many
    units. twice: whether weights are gathered for a backward too."""

    gather: float
    total: float
    units: int
    twice: bool


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

    def held(self, module: str, choice: Choice) -> tuple[Owned, ...]:
        """What pipeline ranks hold, and what their updates take."""
        key = "held", module, choice.block.size, choice[1:]
        if key not in self._known:
            self._known[key] = tuple(self._held(module, choice, pp) for pp in range(choice.degrees.pp))
        found = self._known[key]
        assert isinstance(found, tuple)
        return found

    def _held(self, module: str, choice: Choice, pp: int) -> Owned:
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
        gradients = learns * stored * (count if choice.data_parallel == "step" else shard)
        moved = shard * learns * (3 * stored + 2 * state)
        memory = self.hardware.memory
        update = moved / (memory.bandwidth * memory.efficiency)
        if d.pp == 1 and learns:  # else it is not said which weights a rank has
            update += self._tensors(module) * UPDATE_CALLS * self.hardware.kernels.launch_s
        return Owned(held, gradients, update)

    @cached_property
    def message(self) -> float:
        """Seconds of the message in which all ranks tell their losses and norms."""
        world, node = self.blueprint.world, self.node
        on_node = world if node is None else min(world, node)
        place = Place(world, -(-world // on_node), on_node)
        said = Message("all_gather", WORLD, float(NUMBERS * 8 * world))
        if self.hardware.host is not None:
            return processor_seconds(said, world, self.hardware.host) + self.hardware.host.step_s
        return message_seconds(said, place, self.hardware)

    def _tensors(self, module: str) -> int:
        """How many weights a module has."""
        return sum(len(unit) for unit in self.blueprint.weights(module, 0))

    def traffic(
        self,
        module: str,
        choice: Choice,
        costs: tuple[np.ndarray, np.ndarray, np.ndarray | None],
        m: np.ndarray | int,
        most: float | None,
    ) -> tuple[np.ndarray, np.ndarray, float, float]:
        """What data ranks' gathers and sums add, as parallel.schedule.simulator.traffic has it: to each
        forward and backward by stage, before the first computation, after the last.

        costs: seconds of a forward and a backward of mean load, [.., stages], and of these of the half of the
            backward that gives gradients of weights, where backwards are split. m: micro-batches, [.., 1].
        most: the most load over the mean one; None where it is not known. Longer computations hide more, but
        never more than they are longer: with less seconds than it takes, a sum of both is a lower bound.
        """
        forward, backward, late = costs
        nothing = np.zeros_like(forward)
        if choice.data_parallel == ANY:
            return nothing, nothing, 0.0, 0.0
        gather, total, units, twice = self._moved(module, choice)
        rest, after = 1 - 1 / units, total / units
        if most is not None:
            behind = backward if late is None else late
            after = max(after, total - float(behind.max()) * most * rest)
        if choice.data_parallel == "step":
            return nothing, nothing, gather, after
        each = np.maximum(gather / units, gather - forward * rest)
        if late is not None:  # weights are gathered for one half, gradients summed in the other
            one = np.maximum(0.0, total - late)
            if twice:
                one = one + np.maximum(gather / units, gather - (backward - late) * rest)
            return each, one * (m - 1) / m, 0.0, after
        # Several units are gathered for a backward too, and then a longer one may take less in all.
        long = np.maximum(backward, min(total, gather)) if twice else backward
        one = long - backward + np.maximum(0.0, total - long)
        if twice:
            one = one + np.maximum(gather / units, gather - long * rest)
        return each, one * (m - 1) / m, 0.0, after

    def _moved(self, module: str, choice: Choice) -> Moved:
        key = "moved", module, choice.block.size, choice[1:]
        if key not in self._known:
            d, whole = (
                choice.degrees,
                [self.params(module, choice.degrees, pp) for pp in range(choice.degrees.pp)],
            )
            stored, item = self.blueprint.stored_dtype.itemsize, self.blueprint.dtype.itemsize
            gather = max(self._over_data(module, "all_gather", choice, p, item) for p in whole) / d.vpp
            total = max(self._over_data(module, "reduce_scatter", choice, p, stored) for p in whole) / d.vpp
            twice = module == SINK and len(self.blueprint.weights(module, 0)) > d.pp * d.vpp
            units = self._units(module, choice)
            self._known[key] = Moved(gather, total * self._learns(module), units, twice)
        found = self._known[key]
        assert isinstance(found, Moved)
        return found

    def _units(self, module: str, choice: Choice) -> int:
        """At most so many units of a module, and messages of a sum."""
        d, llm = choice.degrees, self.blueprint.llm
        units = len(self.blueprint.weights(module, 0))
        if module == SINK and max(d.tp, d.ep, d.etp) > 1:
            units += llm.symbols.count("E") + llm.mtp_layers * llm.mtp_pattern.count("E")
        return units * (2 if choice.data_parallel == "hsdp" else 1)

    def _over_data(self, module: str, op: str, choice: Choice, whole: Params, item: int) -> float:
        """Seconds of collectives of whole weights, or their gradients, over the data ranks."""
        if self.hardware.host is not None:
            return 0.0
        d, out = choice.degrees, 0.0
        units = self._messages(module, d)
        for n, count, shards, stride in zip(
            units, whole, self._shards(choice), (d.tp, d.etp * d.ep), strict=True
        ):
            if count and shards > 1:
                on_node = shards if self.node is None else max(1, min(shards, self.node // stride))
                place = Place(shards, -(-shards // on_node), on_node)
                message = Message(op, Group("module", "", "data"), count * item / n)
                out += n * message_seconds(message, place, self.hardware)
        return out

    def _messages(self, module: str, d: Degrees) -> tuple[int, int]:
        """At least so many units of dense weights, and of experts', on a pipeline rank."""
        if d.pp > 1:
            return 1, 1
        split = module == SINK and max(d.tp, d.ep, d.etp) > 1
        experts = self.blueprint.llm.symbols.count("E") if split else 1
        return len(self.blueprint.weights(module, 0)), experts

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
            within = self.node // d.tp, self.node // (d.etp * d.ep)
            return max(1, min(most[0], within[0])), max(1, min(most[1], within[1]))
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
        key = "params", d.pp, d.vpp
        if key not in self._known:
            self._known[key] = tuple(self._sink_params(d, r) for r in range(d.pp))
        found = self._known[key]
        assert isinstance(found, tuple)
        dense, expert = found[pp]
        return Params(dense / d.tp, expert / (d.ep * d.etp))

    def _sink_params(self, d: Degrees, pp: int) -> Params:
        """Of a pipeline rank of the language model, whole."""
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
        return Params(dense, expert)

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
