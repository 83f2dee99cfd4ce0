"""Questions with known answers, and how many of them a model answers exactly, by greedy answers.

A question is a sample's json up to its answer: of a conversation the turns before the last of the assistant,
of segments those before the last text that is learned. A file of questions (JSONL) has "segments" or
"messages" as samples have them, without the answer, and "answer": a text, or a list of texts that are all
right; its items are files beside it.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.decode import GREEDY
from mm.data.layouts.tar import made_of
from mm.data.reader import BadSample, ShardReader
from mm.data.sample import Sample, load_json
from mm.data.storage import LOCAL, Storage
from mm.errors import DataError
from mm.inference.answer import stops_of
from mm.inference.asked import Asked
from mm.inference.prompt import read_prompt
from mm.plan.subsets import TEXT

AT_ONCE = 8  # prompts that are answered together


@dataclass(frozen=True)
class Question:
    """A prompt and its right answers."""

    name: str  # for errors and reports
    source: str
    sample: Mapping[str, Any]  # json without the answer
    payloads: Mapping[str, bytes]  # of its items, by name
    answers: tuple[str, ...]

    @property
    def chat(self) -> bool:
        """Whether it is a conversation."""
        return "messages" in self.sample


@dataclass(frozen=True)
class Answered:
    """A question, what the model said, and whether that is right."""

    question: Question
    modality: str
    said: str

    @property
    def right(self) -> bool:
        """Equal to one of the right answers, both normalised."""
        return normalised(self.said) in {normalised(a) for a in self.question.answers}


def normalised(text: str) -> str:
    """In Unicode's form NFKC, case folded, runs of blanks one blank, without blanks at the ends and without a
    last full stop."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.removesuffix(".").rstrip()


def read_questions(file: Path) -> list[Question]:
    """The questions of a JSONL file; raises DataError naming the line that is none."""
    found = []
    try:
        text = file.read_text()
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            data = load_json(line.encode())
            found.append(_question(where, file, data))
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{where}: {error}; needed: an object with segments or messages, and an answer or several"
            ) from error
        except OSError as error:
            raise DataError(f"{where}: {error.filename}: {error.strerror}") from error
    if not found:
        raise DataError(f"{file} has no question; needed: an object with segments or messages, and answer")
    return found


def _question(where: str, file: Path, data: Mapping[str, Any]) -> Question:
    given = data.get("answer")
    answers = [given] if isinstance(given, str) else given
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise ValueError(f"its answer is {given!r:.80}")
    if ("segments" in data) == ("messages" in data):
        raise ValueError("it has both segments and messages, or neither")
    sample = {k: v for k, v in data.items() if k != "answer"}
    payloads = {name: (file.parent / name).read_bytes() for name in _items(sample)}
    return Question(where, file.name, sample, payloads, tuple(answers))


def _items(sample: Mapping[str, Any]) -> list[str]:
    """Names of the items of a sample's json."""
    parts: list[Any] = list(sample.get("segments", []))
    for message in sample.get("messages", []):
        content = message.get("content")
        parts += [] if isinstance(content, str) or content is None else content
    names = []
    for part in parts:
        kind = part.get("type") or next(k for k in part if k not in ("loss", "depends"))
        if kind != "text":
            names.append(part[kind])
    return names


def questions_of(samples: Iterable[Sample], limit: int, storage: Storage = LOCAL) -> list[Question]:
    """The first `limit` questions that a data set's samples have; those without an answer are passed over."""
    reader, found = ShardReader(storage), list[Question]()
    try:
        for sample in samples:
            if len(found) == limit:
                break
            payload = reader.read(sample, sample.json)
            asked = _asked(sample, made_of(payload, sample.json.name, sample.layout, sample.names))
            if asked is None:
                continue
            rest, answer = asked
            parts = {seg.part.name: seg.part for seg in sample.segments if seg.part is not None}
            payloads = {name: reader.read(sample, parts[name]) for name in _items(rest)}
            found.append(Question(sample.key, sample.source, rest, payloads, (answer,)))
    except BadSample as error:
        raise DataError(f"a question cannot be read: {error}") from error
    finally:
        reader.close()
    return found


def _asked(sample: Sample, data: Mapping[str, Any]) -> tuple[dict[str, Any], str] | None:
    """A sample's json without its answer, and that; None where it has none, or only a part of it is used."""
    if not sample.whole:
        return None
    key = "messages" if "messages" in data else "segments"
    for at in range(len(data[key]) - 1, 0, -1):
        part = data[key][at]
        answer = part.get("content") if part.get("role") == "assistant" else part.get("text")
        if isinstance(answer, str) and answer.strip() and part.get("loss", True):
            return {**data, key: data[key][:at]}, answer
    return None


def ask(model: Asked, questions: Sequence[Question], limit: int) -> Iterator[Answered]:
    """Greedy answers of at most `limit` tokens, in order; over ranks every rank asks. Raises DataError."""
    for chat, own in itertools.groupby(questions, key=lambda q: q.chat):
        stops, group = stops_of(model, chat=chat), list(own)
        for at in range(0, len(group), AT_ONCE):
            some = group[at : at + AT_ONCE]
            prompts = []
            for question in some:
                try:
                    prompts.append(read_prompt(model, question.sample, question.payloads))
                except DataError as error:
                    raise DataError(f"{question.name}: {error}") from error
            steps = list(model.decode(prompts, limit, GREEDY, stops))
            for i, question in enumerate(some):
                ids = [token for step in steps if (token := step[i]) is not None]
                ids = ids[:-1] if ids[-1] in stops else ids
                present = [m for m in model.uses if m in prompts[i].rows]
                yield Answered(question, "+".join(present) or TEXT, model.tokenizer.decode(ids))
