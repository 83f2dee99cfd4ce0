"""Conversations as LLaVA, ShareGPT and others write them, as messages that a chat template takes.

    {"image": "coco/000000123.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A boat."}]}

Turns are "conversations" or "messages", of "from" and "value" or of "role" and "content". A placeholder in a
text stands for the next medium. Line ends next to it belong to it, for a template writes its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mm.data.layouts.media import FIELDS, Medium, counted, media_of, module_of
from mm.data.published import MODULES

TURNS = ("conversations", "messages", "conversation")
ASSISTANTS = ("gpt", "bot", "model", "chatgpt")
ROLES = {"human": "user", **dict.fromkeys(ASSISTANTS, "assistant")}
PLACEHOLDERS = {"<image>": "image", "<video>": "video", "<audio>": "audio", "<sound>": "audio"}
PATTERN = re.compile("\\n*(" + "|".join(PLACEHOLDERS) + ")\\n*")


def conversations(record: Any, names: Sequence[str]) -> dict[str, Any]:
    """Messages with their media as parts; media without a placeholder stand before the user's first text.

    What the assistant says depends on the module of the media where that is one. Raises ValueError where
    placeholders and media differ in number.
    """
    if not is_conversations(record, names):
        raise ValueError(f"it has no list of turns; needed: one of {', '.join(TURNS)}")
    turns = next(record[f] for f in TURNS if isinstance(record.get(f), list))
    messages = [_message(i, turn) for i, turn in enumerate(turns)]
    slots = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    slots = [part for part in slots if part["type"] != "text"]
    media = _with_names(slots, media_of(record, names))
    if media and not slots:
        _put_first(messages, media)
    made: dict[str, Any] = {"messages": messages}
    if (module := module_of(media)) is not None:
        made["depends"] = module
    if record.get("tools") is not None:
        made["tools"] = record["tools"]
    return made


def is_conversations(record: Any, names: Sequence[str]) -> bool:
    """Whether a record has turns."""
    return isinstance(record, Mapping) and any(isinstance(record.get(f), list) for f in TURNS)


def is_ours(record: Any) -> bool:
    """Whether its messages are as mm/data/conversation.py has them: media are parts, no field names any."""
    return isinstance(record, Mapping) and not any(record.get(f) for fs in FIELDS.values() for f in fs)


def _message(i: int, turn: Any) -> dict[str, Any]:
    """A turn as a message; media are parts whose names are still "" ."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"turn {i} is {turn!r:.80}; needed: from and value, or role and content")
    role, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    more = {k: v for k, v in turn.items() if k not in ("from", "role", "value", "content") and v is not None}
    if not isinstance(role, str) or not (isinstance(said, str | list) or (said is None and more)):
        raise ValueError(f"turn {i} is {turn!r:.80}; needed: from and value, or role and content")
    role = ROLES.get(role.lower(), role.lower())
    if isinstance(said, list):
        return {"role": role, "content": [_part(i, part) for part in said], **more}
    if said is None or PATTERN.search(said) is None:
        return {"role": role, "content": said, **more}
    content: list[dict[str, str]] = []
    for n, piece in enumerate(PATTERN.split(said)):
        if n % 2:
            content.append({"type": PLACEHOLDERS[piece], PLACEHOLDERS[piece]: ""})
        elif piece:
            content.append({"type": "text", "text": piece})
    return {"role": role, "content": content, **more}


def _part(i: int, part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in MODULES:
        raise ValueError(f"turn {i} has the part {part!r:.80}; needed: a type of text, {', '.join(MODULES)}")
    name = part.get(kind)
    return {"type": kind, kind: name if isinstance(name, str) else ""}


def _with_names(slots: Sequence[dict[str, str]], media: Sequence[Medium]) -> list[Medium]:
    """Put names of media into parts that have none, in place; returns the media in order of their parts."""
    nameless = [part for part in slots if not part[part["type"]]]
    given = {part[part["type"]] for part in slots} - {""}
    left = [m for m in media if m.name not in given]
    want, have = Counter(part["type"] for part in nameless), Counter(m.kind for m in left)
    if not slots:
        return list(left)
    if sum(want.values()) != sum(have.values()):
        raise ValueError(f"its texts have placeholders for {counted(want)}, and it has {counted(have)}")
    if want != have:
        if set(want) != {"image"}:
            raise ValueError(f"its texts have placeholders for {counted(want)}, and it has {counted(have)}")
        for part, medium in zip(nameless, left, strict=True):  # LLaVA writes <image> for a video too
            part.clear()
            part.update({"type": medium.kind, medium.kind: ""})
    queues = {kind: [m.name for m in left if m.kind == kind] for kind in have}
    for part in nameless:
        part[part["type"]] = queues[part["type"]].pop(0)
    return [Medium(part["type"], part[part["type"]]) for part in slots]


def _put_first(messages: Sequence[dict[str, Any]], media: Sequence[Medium]) -> None:
    first = next((m for m in messages if m["role"] == "user"), None)
    if first is None:
        raise ValueError("it has media and no turn of the user that they could stand in")
    said = first["content"]
    rest = [{"type": "text", "text": said}] if isinstance(said, str) else said or []
    first["content"] = [*({"type": m.kind, m.kind: m.name} for m in media), *rest]


def as_segments(made: Mapping[str, Any]) -> dict[str, Any]:
    """Messages as segments, for a tokenizer without a chat template: "user: ..", "assistant: ..", a line a
    turn, of which what the assistant says is learned. Segments stay as they are."""
    if "messages" not in made:
        return dict(made)
    out: list[dict[str, Any]] = []
    for message in made["messages"]:
        learned, content = message["role"] == "assistant", message["content"] or ""
        out.append({"text": f"{message['role']}: ", "loss": False})
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part["type"]
            if kind != "text":
                out.append({part.get("module", MODULES[kind]): part[kind]})
            elif part["text"]:
                out.append({"text": part["text"], **({} if learned else {"loss": False})})
                if learned and made.get("depends") is not None:
                    out[-1]["depends"] = made["depends"]
        out.append({"text": "\n", **({} if learned else {"loss": False})})
    return {"segments": out}
