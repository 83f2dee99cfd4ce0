"""Prompts: a sample as data has it, without its answer, as ids and rows of encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoders.contract import Meta, pack_items
from llm.decode import Prompt
from mm.data.conversation import parse_messages
from mm.data.encode import TokenSegment, encode_prompt, encode_samples
from mm.data.probes import metadata
from mm.data.published import MODULES, PublishedTokenizer
from mm.data.sample import segments_of
from mm.errors import DataError, Refused
from mm.inference.asked import Asked
from mm.plan.inputs import item_run
from mm.plan.item_pieces import pieces_of
from parallel.sequence.grid import Run, grid_positions
from parallel.sequence.host import to_device


def sample_of(
    model: Asked, text: str, files: Sequence[tuple[str, Path]], *, chat: bool = False
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A sample of items and then a text, and its payloads by name; files: (kind, path), as "image".

    chat: a conversation that the text asks in. Raises Refused where the model has no encoder for an item.
    """
    payloads: dict[str, bytes] = {}
    parts: list[dict[str, str]] = []
    for i, (kind, path) in enumerate(files):
        name = f"{i}{path.suffix}"
        payloads[name] = path.read_bytes()
        parts.append({"type": kind, kind: name, "module": module_of(model, kind)})
    if not chat:
        items = [{part["module"]: part[part["type"]]} for part in parts]
        return {"segments": [*items, *([{"text": text}] if text else [])]}, payloads
    content = [*parts, {"type": "text", "text": text}] if parts else text
    return {"messages": [{"role": "user", "content": content}]}, payloads


def module_of(model: Asked, kind: str) -> str:
    """The module that takes items of a kind: the one of that name, or the only one there is."""
    for name in (MODULES[kind], kind):
        if name in model.uses:
            return name
    others = [m for m in model.uses if m not in MODULES.values()]
    if len(others) == 1:
        return others[0]
    have = ", ".join(model.uses) or "none"
    raise Refused(f"the model has no encoder for an {kind}; it has: {have}")


def read_prompt(model: Asked, sample: Mapping[str, Any], payloads: Mapping[str, bytes]) -> Prompt:
    """The prompt of a sample's json, segments or messages, up to where its answer begins.

    payloads: of its items, by the names that the json gives them. Raises DataError in words.
    """
    try:
        segments = _segments(model, sample)
        ids: list[int] = [] if "messages" in sample else list(model.begin)
        rows: dict[str, list[Tensor]] = {}
        entering: dict[str, list[int]] = {}
        runs: list[Run] = [len(ids)]
        for seg in segments:
            if seg.ids is not None:
                ids += seg.ids
                runs.append(len(seg.ids))
                continue
            if seg.kind not in model.uses:
                have = ", ".join(model.uses) or "none"
                raise ValueError(f"{seg.name} is for module {seg.kind}; the model has: {have}")
            meta = metadata(seg.name.rpartition(".")[2].lower(), payloads[seg.name])
            place = model.tokenizer.placeholder_of(seg.kind, meta)
            for found, run in item_rows(model, seg.kind, meta, payloads[seg.name]):
                if isinstance(found, str):
                    new = model.tokenizer.encode_texts([found])[0]
                    ids += new
                    runs.append(len(new))
                    continue
                entering.setdefault(seg.kind, []).extend(range(len(ids), len(ids) + len(found)))
                runs.append(run)
                rows.setdefault(seg.kind, []).append(found)
                ids += [place] * len(found)
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise DataError(f"the prompt cannot be used: {error}") from error
    at = {m: torch.tensor(p, device=model.device) for m, p in entering.items()}
    axes = model.cfg.rope_axes is not None
    return Prompt(
        torch.tensor(ids, device=model.device),
        {m: torch.cat(r) for m, r in rows.items()},
        at,
        places=to_device(grid_positions(runs), model.device) if axes else None,
    )


def _segments(model: Asked, sample: Mapping[str, Any]) -> Sequence[TokenSegment]:
    if "messages" not in sample:
        found = encode_samples([segments_of(sample)], model.tokenizer)[0]
        assert not isinstance(found, str), "only conversations cannot be encoded"
        return found
    if not isinstance(model.tokenizer, PublishedTokenizer):
        raise ValueError("its tokenizer is bytes, which has no chat template; needed: a text without --chat")
    return encode_prompt(parse_messages(sample), model.tokenizer)


def item_rows(model: Asked, module: str, meta: Meta, payload: bytes) -> list[tuple[str | Tensor, Run]]:
    """An item's rows [R, d], or [R, levels, d], piece by piece, with how they lie, and texts between pieces.
    Raises ValueError where its encoder cannot take it."""
    use = model.uses[module]
    out: list[tuple[str | Tensor, Run]] = []
    for piece in pieces_of(use, meta):
        if isinstance(piece, str):
            out.append((piece, 0))
            continue
        use.cls.rows(use.cfg, piece)  # refuses what does not fit, in words
        prepared = use.cls.prepare(use.cfg, payload, piece)
        batch = pack_items(use.cls, use.cfg, [prepared], [piece], device=model.device, dtype=model.dtype)
        found = model.encode(module, batch)
        out.append((found, item_run(use, piece, len(found))))
    return out
