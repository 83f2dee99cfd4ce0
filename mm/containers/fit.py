"""What several containers ask of a model: words for options that do not fit."""

from __future__ import annotations

from typing import Any

from llm.config import LLMConfig
from llm.hf.config import export_family, read_config
from mm.containers.container import Tower
from parallel.published import SafeFolder


def needed(option: str, given: Any, what: Any) -> str:
    """An option that does not fit, and what would."""
    return f"{option} is {_said(given)}; needed: {_said(what)}"


def _said(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(list(value) if value == () else value)


def check_head(folder: SafeFolder) -> None:
    """Refuse a folder whose language model caps or scales logits, which a container with a head of its own
    leaves out. Raises ValueError."""
    llm = read_config(folder.config())
    if llm.logit_cap is not None or llm.logit_scale != 1.0:
        raise ValueError(
            f"its language model has logit_cap={llm.logit_cap} and logit_scale={llm.logit_scale:g}, which "
            "the container's class leaves out; needed: null and 1"
        )


def mlp_unfit(module: str, tower: Tower, width: int, norm: str) -> list[str]:
    """What keeps a projector from being two linear maps of the language model's width, `norm` before them."""
    at, kind = f"model.{module}.projector", tower.projector
    out = [] if kind.kind == "mlp" else [needed(f"{at}.kind", kind.kind, "mlp")]
    if kind.norm != norm:
        out.append(needed(f"{at}.norm", kind.norm, norm))
    if kind.kind == "mlp" and tower.hidden != width:
        out.append(needed(f"{at}.hidden", tower.hidden, f"{width}, as wide as the language model"))
    return out


def language_unfit(llm: LLMConfig, *, own_head: bool) -> list[str]:
    """What keeps a language model from taking rows among its tokens in transformers as it does here.

    own_head: whether the container computes the logits itself, as a linear map and no more.
    """
    out = []
    try:
        family = export_family(llm)
    except ValueError as error:
        return [f"model.llm: {error}"]
    if family.scales_rows and llm.embed_scale != 1:
        out.append(
            f"model.llm.embed_scale is {llm.embed_scale:g}, which {family.title} multiplies rows of encoders "
            "with too, and ours the embeddings of tokens alone; needed: 1"
        )
    for option, plain in (("logit_cap", None), ("logit_scale", 1.0)) if own_head else ():
        if getattr(llm, option) != plain:
            out.append(needed(f"model.llm.{option}", getattr(llm, option), plain))
    if llm.level_layers:
        out.append(needed("model.llm.level_layers", list(llm.level_layers), []))
    return out
