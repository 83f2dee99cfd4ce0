"""Conversations as a sample's json has them.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "img0.png"},
                                               {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A boat."}],
     "depends": "vision"}

A content is a text, or a list of parts: text, or an item of kind image, audio or video with the name of its
payload. An item goes to the module vision (image, video) or audio, or to the one that "module" names.
"depends": the module that what the assistant says depends on. Other keys of messages, and "tools", are the
template's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mm.data.published import MODULES


@dataclass(frozen=True)
class Item:
    """An item of a conversation."""

    kind: str  # as templates name it: "image", "audio" or "video"
    module: str
    name: str  # of its payload, after the sample's key


@dataclass(frozen=True)
class Conversation:
    """A sample that a chat template writes."""

    messages: tuple[Mapping[str, Any], ...]
    items: tuple[Item, ...]  # in order
    depends: str | None
    tools: Any


def parse_conversation(data: Mapping[str, Any]) -> Conversation:
    """The conversation of a json; raises ValueError with what is wrong with it."""
    found = parse_messages(data)
    if not any(m["role"] == "assistant" for m in found.messages):
        raise ValueError("it is a chat without an assistant turn, so there is nothing to learn in it")
    return found


def parse_messages(data: Mapping[str, Any]) -> Conversation:
    """A conversation that need have no turn of the assistant; raises ValueError."""
    written, depends = data["messages"], data.get("depends")
    if not isinstance(written, list) or not all(isinstance(m, dict) for m in written):
        raise ValueError(f"its messages are {written!r:.80}; needed: a list of role and content")
    if not isinstance(depends, str | None):
        raise ValueError(f"it has depends {depends!r}; needed: the name of a module")
    items: list[Item] = []
    for i, message in enumerate(written):
        if not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} has role {message.get('role')!r}; needed: a string")
        items += _items(i, message.get("content"), "content" not in message and "tool_calls" in message)
    return Conversation(tuple(written), tuple(items), depends, data.get("tools"))


def _items(i: int, content: Any, calls: bool) -> list[Item]:
    if isinstance(content, str) or (content is None and calls):
        return []
    if not isinstance(content, list):
        raise ValueError(f"message {i} has content {content!r:.80}; needed: a text or a list of parts")
    found = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", *MODULES) or not isinstance(part.get(kind), str):
            raise ValueError(
                f"message {i} has the part {part!r:.80}; needed: a type of text, {', '.join(MODULES)}, and "
                "under its name a string"
            )
        module = part.get("module", MODULES.get(kind, ""))
        if not isinstance(module, str):
            raise ValueError(f"message {i} has a part with module {module!r}; needed: a string")
        if kind != "text":
            found.append(Item(kind, module, part[kind]))
    return found
