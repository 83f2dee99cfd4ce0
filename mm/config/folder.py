"""model.folder: a whole model's folder in the place of its modules, which the config may change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm.errors import Refused

FOLDER = "folder"
# What must be alike for a projector to take the folder's weights.
SHAPED = ["kind", "activation", "bias", "norm", "hidden", "queries", "depth", "heads", "kv_heads", "head_dim"]


def unfold(rest: dict[str, Any], model: dict[str, Any]) -> None:
    """Fill in, in place, what a config with model.folder leaves to the folder.

    That is each encoder module with its weights, options and projector, the language model, the weights that
    a run starts from, and the tokenizer. Keys of the config go before those of the folder; a projector that
    is another one starts anew. rest: the sections but for model. Raises Refused.
    """
    # Imported here because reading a folder needs torch.
    from mm.containers.registry import modules_of, options_of

    path = model.pop(FOLDER)
    try:
        found, options = modules_of(Path(path)), options_of(Path(path))
    except ValueError as error:
        raise Refused(f"model.folder: {error}") from error
    for name, module in found.items():
        given = model.get(name)
        model[name] = _over(module, {} if given is None else given)
        projector = model[name].get("projector")
        if isinstance(projector, dict) and isinstance(given, Mapping):
            changed = [k for k in SHAPED if projector.get(k) != module["projector"].get(k)]
            if changed and "weights" not in (given.get("projector") or {}):
                projector.pop("weights", None)
    llm = model.get("llm") or {}
    model["llm"] = {"preset": path, **options, **llm} if isinstance(llm, Mapping) else llm
    _default(rest, "checkpoint", "weights", path)
    if (Path(path) / "tokenizer.json").is_file():
        _default(rest, "data", "tokenizer", path)


def _over(base: Mapping[str, Any], given: Any) -> Any:
    """Mappings joined, those of `given` first; lists and values of `given` replace those of `base`."""
    if not isinstance(given, Mapping):
        return given
    out = dict(base)
    for key, value in given.items():
        under = out.get(key)
        out[key] = _over(under, value) if isinstance(under, Mapping) else value
    return out


def _default(rest: dict[str, Any], section: str, key: str, value: Any) -> None:
    """Set a key that its section, where it is one, leaves out."""
    held = rest.get(section) or {}
    if isinstance(held, dict):
        rest[section] = {key: value, **held}
