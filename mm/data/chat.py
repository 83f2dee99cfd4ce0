"""Chat templates: conversations as a model reads them, and which characters its assistant has written.

Templates are Jinja, run in a sandbox with the names that published templates use. `{% generation %}` marks
what the assistant writes. For a template without that tag the contents of the assistant's messages are
marked, and after each the special token that ends its turn.

Marks are two characters that no text has (Unicode noncharacters) around what the assistant writes. They are
rendered with the text and taken out again, so that whatever a template does to a content is followed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

BEGIN, END = "\ufdd0", "\ufdd1"  # noncharacters: not for interchange between programs
PROBE = "\ufdd2"
Message = Mapping[str, Any]


class Rendered(NamedTuple):
    """A conversation as text, and the characters [start, stop) of it that are learned, in order."""

    text: str
    spans: list[tuple[int, int]]


class _Generation(Extension):
    """`{% generation %} .. {% endgeneration %}`: marks what is written inside."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A compiled template."""

    source: str
    where: str
    """Folder that it is from, for errors."""
    template: jinja2.Template
    names: Mapping[str, str]
    """Special tokens by name, such as bos_token."""
    ends: tuple[str, ...]
    """Texts of special tokens, any of which may end a turn."""
    marks: bool
    """Whether it has the generation tag."""
    takes: frozenset[str] = frozenset()
    """"parts" and "strings": the contents of messages that it writes."""

    def render(
        self,
        messages: Sequence[Message],
        tools: Any,
        placeholders: Mapping[str, str],
        *,
        prompt: bool = False,
    ) -> Rendered:
        """The text of a conversation and what of it is learned.

        placeholders: by item kind, the text in the place of an item, for templates that take strings only.
        prompt: end with what begins an answer. Raises ValueError where the template refuses the conversation,
        and where a turn of the assistant is not found in what it has written.
        """
        shaped = [{**m, "content": self._shaped(m.get("content"), placeholders)} for m in messages]
        text = self._run(shaped, tools, prompt)
        if self.marks:
            return _unmarked(text)
        marked = [_marked(m) if m.get("role") == "assistant" else m for m in shaped]
        found = _unmarked(self._run(marked, tools, prompt))
        turns = sum(m.get("role") == "assistant" for m in messages)
        if found.text != text or len(found.spans) != turns:
            raise ValueError(
                f"the chat template of {self.where} changes what the assistant says, so that "
                f"{len(found.spans)} of its {turns} turns are found; needed: a template with "
                "{% generation %} around what the assistant writes"
            )
        return Rendered(text, [(a, self._turn_end(text, b)) for a, b in found.spans])

    def _turn_end(self, text: str, at: int) -> int:
        """Past the special token that ends a turn, where one follows its content."""
        after = len(text) - len(text[at:].lstrip())
        found = max((e for e in self.ends if text.startswith(e, after)), key=len, default=None)
        return at if found is None else after + len(found)

    def _shaped(self, content: Any, placeholders: Mapping[str, str]) -> Any:
        """A message's content in a form that the template takes."""
        if isinstance(content, str) and "strings" not in self.takes and "parts" in self.takes:
            return [{"type": "text", "text": content}]
        if isinstance(content, list) and "parts" not in self.takes:
            return "".join(p["text"] if p["type"] == "text" else placeholders[p["type"]] for p in content)
        return content

    def _run(self, messages: Sequence[Message], tools: Any, prompt: bool = False) -> str:
        try:
            return self.template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self.names
            )
        except Exception as error:  # whatever a template's own code raises: the conversation is not for it
            raise ValueError(f"the chat template of {self.where} refuses it: {error}") from error

    def _writes(self, content: Any) -> bool:
        """Whether a message's content of this form appears in the text, and not its Python spelling."""
        try:
            text = self._run([{"role": "user", "content": content}], None)
        except ValueError:
            return False
        return PROBE in text and "'type'" not in text and '"type"' not in text


def compile_template(
    source: str, names: Mapping[str, str], ends: tuple[str, ...], where: str
) -> ChatTemplate:
    """A template made ready, with the fields of ChatTemplate. Raises ValueError where it is no Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template of {where} is no Jinja: {error}") from error
    marks = re.search(r"{%-?\s*generation\s*-?%}", source) is not None
    made = ChatTemplate(source, where, template, names, ends, marks=marks)
    forms = {"strings": PROBE, "parts": [{"type": "text", "text": PROBE}]}
    takes = frozenset(form for form, content in forms.items() if made._writes(content))
    return replace(made, takes=takes or frozenset(("strings",)))


def _marked(message: Message) -> Message:
    """A message of the assistant with marks around its content, inside the blanks at its ends.

    A second begin mark follows its reasoning, which templates leave out of all turns but the last.
    """
    content = message["content"]
    if isinstance(content, list):
        texts = [i for i, p in enumerate(content) if p["type"] == "text" and p["text"].strip()]
        parts = list(content)
        for i in texts:
            parts[i] = {**parts[i], "text": _mark_text(parts[i]["text"], i == texts[0], i == texts[-1])}
        return {**message, "content": parts}
    if not isinstance(content, str) or not content.strip():
        return message
    return {**message, "content": _mark_text(content, True, True)}


def _mark_text(text: str, begins: bool, ends: bool) -> str:
    core = text.strip()
    head, _, tail = text.partition(core)
    thought, close, answer = core.rpartition("</think>")
    if begins and close and answer.strip():
        said = answer.lstrip()
        core = thought + close + answer[: len(answer) - len(said)] + BEGIN + said
    return head + BEGIN * begins + core + END * ends + tail


def _unmarked(text: str) -> Rendered:
    """A text without its marks, and the characters that were between them."""
    out: list[str] = []
    spans: list[tuple[int, int]] = []
    at, start = 0, -1
    for piece in re.split(f"([{BEGIN}{END}])", text):
        if piece == BEGIN:
            start = at if start < 0 else start
        elif piece == END:
            if start >= 0:
                spans.append((start, at))
            start = -1
        else:
            out.append(piece)
            at += len(piece)
    return Rendered("".join(out), spans)


def _tojson(value: Any, **options: Any) -> str:
    """Unlike Jinja's own filter, which writes for HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
