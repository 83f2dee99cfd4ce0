"""Tokenizers of published models: a folder with tokenizer.json, read by the `tokenizers` package.

transformers is not needed. Ids equal those of its AutoTokenizer with add_special_tokens=False.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from mm.data.chat import ChatTemplate, Rendered, compile_template

TOKENIZER = "tokenizer.json"
GENERATION = "generation_config.json"
# Files of a folder that make its tokenizer, some of them in other formats than the one that is read here.
FILES = (
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "spiece.model"),
)
VERSION = 1  # of how samples are encoded; part of the key of lengths
PADDED_TO = 128  # rows of the embedding: a multiple that usual tp degrees divide
# The item kinds that conversations name, and the modules that take them where a part names no module.
MODULES = {"image": "vision", "video": "vision", "audio": "audio"}
# A file alone does not tell its end and begin marker: names that published tokenizers give them.
ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")
BEGINS = ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]")


ADDED = ("lstrip", "rstrip", "normalized", "single_word", "special")  # flags of an added token


class Encoded(NamedTuple):
    """Ids of a text, and by token the characters [start, stop) that it stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class PublishedTokenizer:
    """A tokenizer with its special tokens and its chat template."""

    path: Path
    """Folder or file that it was read from."""
    file: Path
    """Its tokenizer.json."""
    core: tokenizers.Tokenizer
    """Without truncation and padding."""
    bos: int
    """Begins a sample; the end marker where the tokenizer has none, as between documents."""
    eos: int
    pad: int
    stops: frozenset[int]
    """Ids that end an answer: those that generation_config.json or config.json names, else the end marker."""
    needed: int
    """Rows of the embedding that its ids need."""
    placeholders: Mapping[str, str]
    """By item kind ("image", "audio", "video"), the text of the token in the place of its rows."""
    chat: ChatTemplate | None

    @property
    def vocab_size(self) -> int:
        """Rows of an embedding made for it: `needed`, padded so that tp degrees divide them."""
        return -(-self.needed // PADDED_TO) * PADDED_TO

    @property
    def begin(self) -> list[int]:
        """What its own settings put before a text: the begin marker or nothing."""
        ids = self.core.encode("", add_special_tokens=True).ids
        return [self.bos] if ids[:1] == [self.bos] else []

    @cached_property
    def key(self) -> str:
        """A digest of everything that lengths in tokens depend on."""
        parts = [self.core.to_str(), "" if self.chat is None else self.chat.source, tokenizers.__version__]
        parts += [str(VERSION), json.dumps([self.bos, self.eos, sorted(self.placeholders.items())])]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @cached_property
    def vocabulary(self) -> str:
        """A digest of which id is which token, that no version of the package changes."""
        parts = [json.dumps(sorted(self.core.get_vocab().items())), f"{self.bos} {self.eos}"]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end markers; special tokens in it count as such."""
        ids: list[int] = self.core.encode(text, add_special_tokens=False).ids
        return ids

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """encode() of each text, all at once on the cores that there are."""
        return [e.ids for e in self.core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_spans(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids and offsets of each text."""
        return [Encoded(e.ids, e.offsets) for e in self.core.encode_batch(texts, add_special_tokens=False)]

    def find(self, token: str) -> int:
        """The id of a token that it has."""
        found = self.core.token_to_id(token)
        assert found is not None, token
        return int(found)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are dropped."""
        text: str = self.core.decode(list(ids), skip_special_tokens=True)
        return text

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any = None, **flags: bool) -> Rendered:
        """A conversation as the chat template writes it. Raises ValueError where there is none."""
        if self.chat is None:
            raise ValueError(
                f"it is a conversation, but {self.path} has no chat template; needed: chat_template.jinja, "
                "or chat_template in tokenizer_config.json"
            )
        return self.chat.render(messages, tools, self.placeholders, **flags)

    def placeholder_of(self, module: str, meta: Mapping[str, Any] | None = None) -> int:
        """The id in the place of a module's rows: that of its kind, or the padding's where the vocabulary
        has none. meta: of the item; rows of a video have an id of their own where the vocabulary has one."""
        kinds = [k for k, m in MODULES.items() if module in (k, m)][:1] or ["image"]
        if meta is not None and "pictures" in meta:
            kinds.insert(0, "video")
        found = (self.find(self.placeholders[k]) for k in kinds)
        return next((n for n in found if n < self.needed), self.pad)


def read_tokenizer(path: Path) -> PublishedTokenizer:
    """The tokenizer of a folder, or of a tokenizer.json, with what the files beside it tell of it.

    Raises ValueError where tokenizer.json is missing or damaged, no end marker is known, or the id of a
    special token is not in the vocabulary.
    """
    folder, file = (path, path / TOKENIZER) if path.is_dir() else (path.parent, path)
    if not file.is_file():
        old = [name for name in FILES if (folder / name).is_file()]
        hint = f" (it has {', '.join(old)}, of older formats)" if old else ""
        raise ValueError(
            f"{folder} has no {TOKENIZER}{hint}; needed: AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER) of transformers writes one"
        )
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{file} is no {TOKENIZER} that tokenizers reads: {error}") from error
    core.no_truncation()
    core.no_padding()
    notes = _Notes.of(folder if file.name == TOKENIZER else None)
    _add_noted(core, notes)
    needed = 1 + max(core.get_vocab(with_added_tokens=True).values(), default=-1)
    specials = {name: _special(core, notes, name, file) for name in ("bos_token", "eos_token", "pad_token")}
    eos = specials["eos_token"]
    if eos is None:
        raise ValueError(
            f"nothing tells the end marker of {file}; needed: eos_token in tokenizer_config.json beside it"
        )
    placeholders = {kind: _placeholder(core, notes, kind) for kind in MODULES}
    # In memory only: a placeholder outside the vocabulary is found in rendered text, and never embedded.
    absent = [text for text in placeholders.values() if core.token_to_id(text) is None]
    core.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in absent])
    named = {k: v for k, v in notes.tokens.items() if isinstance(v, str)}
    ends = tuple(t.content for t in core.get_added_tokens_decoder().values() if t.special)
    bos, pad = specials["bos_token"], specials["pad_token"]
    return PublishedTokenizer(
        path=path,
        file=file,
        core=core,
        bos=eos if bos is None else bos,
        eos=eos,
        pad=eos if pad is None else pad,
        stops=frozenset(notes.ends or [eos]),
        needed=needed,
        placeholders=placeholders,
        chat=None if notes.template is None else compile_template(notes.template, named, ends, str(folder)),
    )


@dataclass(frozen=True)
class _Notes:
    """What files beside tokenizer.json tell of it."""

    tokens: Mapping[str, Any]
    """Text of special tokens by name, such as eos_token and image_token."""
    added: Mapping[int, tokenizers.AddedToken]
    """Added tokens by id, which tokenizer.json may lack."""
    ids: Mapping[str, Any]
    """config.json and generation_config.json, of which ids of special tokens are read."""
    template: str | None
    ends: tuple[int, ...] = ()
    """Ids that end an answer, as files name them."""

    @staticmethod
    def of(folder: Path | None) -> _Notes:
        """The notes in a folder; None: there are none."""
        if folder is None:
            return _Notes({}, {}, {}, None)
        config = _json(folder / "tokenizer_config.json")
        given = {**_json(folder / "special_tokens_map.json"), **config}
        extra = given.get("extra_special_tokens")
        given |= extra if isinstance(extra, dict) else {}
        tokens = {k: _text(v) for k, v in given.items() if k.endswith("_token")}
        added = {
            int(n): tokenizers.AddedToken(
                t["content"],
                **{
                    k: bool(t[k])
                    for k in ("lstrip", "rstrip", "normalized", "single_word", "special")
                    if k in t
                },
            )
            for n, t in (config.get("added_tokens_decoder") or {}).items()
        }
        said = _json(folder / GENERATION)
        config_json = _json(folder / "config.json")
        ends = said.get("eos_token_id", config_json.get("eos_token_id"))
        stops = ends if isinstance(ends, list) else [ends]
        return _Notes(
            tokens={k: v for k, v in tokens.items() if v},
            added=added,
            ids={**said, **config_json},
            template=_template(folder, config),
            ends=tuple(n for n in stops if isinstance(n, int)),
        )


def _json(file: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file. Raises ValueError where it is damaged."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no object but {type(found).__name__}")
    return found


def _text(token: Any) -> Any:
    """The text of a special token, which files write alone or in an object."""
    return token.get("content") if isinstance(token, Mapping) else token


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of a folder: a file of its own comes before a key; of several the default one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    found = _json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(found, list):  # [{"name": "default", "template": ..}, ..]
        named = {t["name"]: t["template"] for t in found}
        found = named.get("default") or next(iter(named.values()), None)
    return found if isinstance(found, str) else None


def _add_noted(core: tokenizers.Tokenizer, notes: _Notes) -> None:
    """Add tokens that the files beside tokenizer.json have and it lacks, as transformers does."""
    have = core.get_added_tokens_decoder()
    core.add_tokens([token for n, token in sorted(notes.added.items()) if n not in have])
    lacking = [v for v in notes.tokens.values() if isinstance(v, str) and core.token_to_id(v) is None]
    core.add_special_tokens([tokenizers.AddedToken(v, special=True, normalized=False) for v in lacking])


def _special(core: tokenizers.Tokenizer, notes: _Notes, name: str, file: Path) -> int | None:
    """The id of a special token by the notes; of a file alone, by usual names."""
    if isinstance(notes.tokens.get(name), str):
        found = core.token_to_id(notes.tokens[name])
        assert found is not None, "it has been added"
        return int(found)
    given = notes.ids.get(f"{name}_id")
    given = given[0] if isinstance(given, list) and given else given
    if isinstance(given, int):
        if core.id_to_token(given) is None:
            raise ValueError(f"{name}_id={given} beside {file} is not in its vocabulary")
        return given
    usual = {"eos_token": ENDS, "bos_token": BEGINS}.get(name, ()) if not notes.tokens else ()
    return next((n for n in map(core.token_to_id, usual) if n is not None), None)


def _placeholder(core: tokenizers.Tokenizer, notes: _Notes, kind: str) -> str:
    """The text of the token in the place of an item: as files name it, else <image>, <audio> or <video>."""
    named = notes.tokens.get(f"{kind}_token")
    if isinstance(named, str):
        return named
    for key in (f"{kind}_token_id", f"{kind}_token_index"):
        given = notes.ids.get(key)
        if isinstance(given, int):
            text = core.id_to_token(given)
            if text is None:
                raise ValueError(
                    f"config.json has {key}={given}, beyond the vocabulary of {core.get_vocab_size()} "
                    f"tokens of the {TOKENIZER} beside it; needed: the id of one of them"
                )
            return str(text)
    return f"<{kind}>"
