"""The weights of a distributed checkpoint, as they are exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from parallel import checkpoint
from parallel.sharding.low_rank import adapters_of
from parallel.sharding.optim import AVERAGE, average_name


@dataclass(frozen=True)
class Stored:
    """Parameters of a complete checkpoint (parallel.checkpoint), saved under any layout.

    before: what the names of these begin with there: "llm." for those of one module, "" for all.
    average: the average of the weights, for those that have one; there must be some. scales: by module, of
    its adapters (parallel.sharding.low_rank), which are merged into their weights; 1 by default.
    """

    path: Path
    before: str = "llm."
    average: bool = False
    scales: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def _opened(self) -> checkpoint.Opened:
        """Raises ValueError where there is no average and one is wanted."""
        opened = checkpoint.Opened(self.path)
        own = (key.split(".")[1] for key in opened.shapes if key.startswith(self.before))
        if self.average and AVERAGE not in own:
            whose = self.before.rstrip(".") or "any module"
            raise ValueError(
                f"{self.path} has no average of {whose}'s weights; needed: a run with train.average"
            )
        return opened

    def fetch(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The parameters of these names, whole, adapters merged. Raises ValueError where one is missing."""
        out = self._read(names)
        for n in names:
            a, b = adapters_of(n)
            if self.adapted(n):
                found = self._read([a, b])
                scale = self.scales.get((self.before + n).partition(".")[0], 1.0)
                change = found[b].double() @ found[a].double() * scale
                out[n] = (out[n].double() + change).to(out[n].dtype)
        return out

    def adapted(self, name: str) -> bool:
        """Whether a parameter has adapters."""
        return self.before + adapters_of(name)[0] in self._opened.shapes

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        keys = {n: self._key(self.before + n) for n in names}
        for key in keys.values():
            if key not in self._opened.shapes:
                raise ValueError(f"{self.path} has no {key}, which a model of this config has")
        found = self._opened.read([*keys.values()])
        return {n: found[key] for n, key in keys.items()}

    def _key(self, name: str) -> str:
        module, _, parameter = name.partition(".")
        averaged = f"{module}.{average_name(parameter)}"
        return averaged if self.average and averaged in self._opened.shapes else name
