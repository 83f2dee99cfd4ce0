"""Find what would work instead of a refused layout or schedule.

Each proposal passes the whole check of the config before it is named: the user can type it as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mm.config.schema import Config, from_mapping, resolve
from mm.errors import PolyrankError
from parallel.topology.layout import DEGREES, Changes, Unfit, nearest_degrees, parse_ranks, with_advice

Check = Callable[[Config], object]  # raises ValueError or PolyrankError for a config that does not work

Accepts = Callable[[Changes], bool]  # whether the config works with these changes

MOST = 2  # alternatives that an error names


def advise(cfg: Config, error: Unfit, world: int, check: Check) -> str:
    """The text of a refusal, with the nearest changes of `cfg` that `check` accepts, as a user types them.

    world: ranks of the job. Where the config has other faults too, the changes correct this one only.
    """
    for accepts in (_accepts(cfg, check), _accepts(cfg, check, error)):
        works = list(_proposed(cfg, error, accepts)) or _searched(cfg, error, world, accepts)
        if works:
            return with_advice(error.why, works[:MOST])
    return error.why


def _proposed(cfg: Config, error: Unfit, accepts: Accepts) -> Iterator[Changes]:
    """The changes that the refusal itself proposes, as far as they work."""
    for work in error.works:
        dotted = _dotted(error.module, work)
        changes = {
            k: v for k, v in dotted.items() if get(cfg, k, 1 if k.startswith("layout.") else None) != v
        }
        if changes and accepts(changes):
            yield changes


def _searched(cfg: Config, error: Unfit, world: int, accepts: Accepts) -> list[Changes]:
    """Nearby degrees of the refused module that work, on its own ranks and on the ranks that are proposed."""
    if error.module is None:
        return []
    module, spec = error.module, cfg.layout.get(error.module, {})
    given = {d: spec.get(d, 1) for d in DEGREES}
    found: list[Changes] = []
    for more in ({}, *({"ranks": v} for work in error.works for k, v in work.items() if k == "ranks")):

        def fits(degrees: Mapping[str, int], more: Changes = more) -> bool:
            return accepts(_dotted(module, {**degrees, **more}))

        try:
            size = len(parse_ranks({**spec, **more}.get("ranks", "all"), world, module))
        except ValueError:
            continue
        changed = nearest_degrees(size, given, fits)
        found += [_dotted(module, {**more, **changes}) for changes in changed]
    return found


def _accepts(cfg: Config, check: Check, about: Unfit | None = None) -> Accepts:
    """Whether the config passes with some changes; where `about` is given, other faults do not count."""

    def accepts(changes: Changes) -> bool:
        corrected: set[str | None] = set()
        while True:
            try:
                check(with_changes(cfg, changes))
            except Unfit as error:
                same = about is None or (error.module is not None and error.module == about.module)
                if same or error.module in corrected:
                    return False
                corrected.add(error.module)
                changes = {**_plain(cfg, error.module), **changes}
            except (ValueError, PolyrankError):
                return False
            else:
                return True

    return accepts


def _plain(cfg: Config, module: str | None) -> Changes:
    """Changes that make the schedule (None), or a module's layout, so plain that it has no fault."""
    if module is not None and module in cfg.model:
        return {f"layout.{module}": {}}
    plain: dict[str, Any] = {
        "schedule.kind": "auto",
        "schedule.ahead": None,
        "schedule.encoder_batch": {},
        "schedule.overlap_experts": False,
    }
    return plain | ({} if module is None else {f"layout.{module}": {}})


def _dotted(module: str | None, changes: Changes) -> dict[str, Any]:
    """Changes by their dotted keys in the config."""
    return {_dotted_key(module, key): value for key, value in changes.items()}


def _dotted_key(module: str | None, key: str) -> str:
    if "." in key:
        return key
    if key in DEGREES or key == "ranks":
        return f"layout.{module}.{key}"
    return f"model.{module}.{key}" if module == "llm" else f"model.{module}.options.{key}"


def with_changes(cfg: Config, changes: Mapping[str, Any]) -> Config:
    """The same run with the values of some dotted keys changed."""
    raw = resolve(cfg)
    for key, value in changes.items():
        at = raw
        *path, last = key.split(".")
        for name in path:
            at = at.setdefault(name, {})
        at[last] = value
    return from_mapping(raw, cfg.base)


def get(cfg: Config, key: str, otherwise: Any = None) -> Any:
    """The value of a dotted key, or `otherwise` where the config lacks it."""
    at: Any = resolve(cfg)
    for name in key.split("."):
        if not isinstance(at, dict) or name not in at:
            return otherwise
        at = at[name]
    return at
