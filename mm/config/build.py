"""Build a frozen record strictly from plain data: unknown keys and values of a wrong type are refused.

Sections of the config are built here, and so are the options of encoders and of the language model.
"""

from __future__ import annotations

import dataclasses
import difflib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from mm.errors import Refused

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

T = TypeVar("T")
LONGEST_S = 1e7  # 115 days: clocks, locks and stores of torch overflow at lengths that no run waits for


class Section(BaseModel):
    """A frozen section of the config that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _one_line(text: str) -> str:
    if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text):
        raise PydanticCustomError("line", "needed: one line, without control characters")
    return text


Line = Annotated[str, AfterValidator(_one_line)]  # a name that goes into messages and files line by line

# Cached: both take long, and advice builds many configs.
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def build(kind: type[T], mapping: Mapping[str, Any], path: str) -> T:
    """Build a frozen dataclass or a section strictly from a mapping; path: its dotted key, for errors.

    Raises Refused naming the key, what was given and, for an unknown key, the nearest known one.
    """
    _check_keys(kind, mapping, path)
    adapter: TypeAdapter[T] = _adapter(kind)
    try:
        return adapter.validate_python(dict(mapping))
    except ValidationError as error:
        raise Refused("; ".join(_explain(e, path, mapping) for e in error.errors())) from None


_NUMBERS = (int, float, int | None, float | None)


def _check_keys(kind: Any, value: Any, path: str) -> None:
    """Refuse keys that a dataclass or section, or one inside it, does not know, and true as a number.

    Pydantic by itself ignores unknown keys of a dataclass, names no nearest key, and takes true as 1.
    """
    if isinstance(value, str) and "\0" in value:  # which no name of a file has
        raise Refused(f"{path}: given {value!r}; needed: text without NUL characters")
    if isinstance(value, bool) and kind in _NUMBERS:
        raise Refused(f"{path}: given {value}; needed: a number")
    if get_origin(kind) is list and isinstance(value, list):
        for k, inner in enumerate(value):
            _check_keys(get_args(kind)[0], inner, _join(path, k))
        return
    if not isinstance(value, Mapping):
        return
    if get_origin(kind) in (Union, UnionType):  # a record or null, or a record or a string
        kind = next((k for k in get_args(kind) if _is_record(k)), kind)
    if getattr(kind, "__origin__", None) is dict:
        for key, inner in value.items():
            _check_keys(get_args(kind)[-1], inner, _join(path, key))
        return
    if not _is_record(kind):
        return
    hints = _hints(kind)
    known = _known_keys(kind)
    for key, inner in value.items():
        if key not in known:
            raise Refused(unknown_key(_join(path, key), key, known))
        _check_keys(hints[key], inner, _join(path, key))


def _is_record(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or (isinstance(kind, type) and issubclass(kind, Section))


def _known_keys(kind: Any) -> list[str]:
    if dataclasses.is_dataclass(kind):
        return [f.name for f in dataclasses.fields(kind)]
    return list(kind.model_fields)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def unknown_key(where: str, key: object, known: Sequence[str]) -> str:
    """The error of an unknown key at `where`, a dotted key, with the nearest known one."""
    near = difflib.get_close_matches(str(key).lower(), known, 1)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {where}; {hint}"


def _explain(error: ErrorDetails, path: str, mapping: Mapping[str, Any]) -> str:
    """One of pydantic's errors as ours: the dotted key, what was given and what is needed."""
    loc = error["loc"]
    where = path
    for name in loc:
        where = where if " " in str(name) else _join(where, name)  # the tag of a union is no key
    if error["type"] != "missing":
        return f"{where}: given {error['input']!r}; {_needed(error['msg'])}"
    if len(loc) == 3 and loc[0] == "model":  # a mistyped module in an override looks like a new module
        others = [m for m in mapping["model"] if m != loc[1] and "encoder" in mapping["model"][m]]
        near = difflib.get_close_matches(loc[1], others, 1)
        return f"{where} is missing" + (f"; did you mean model.{near[0]}?" if near else "")
    return f"{where} is missing"


def _needed(message: str) -> str:
    """What a value needs to be, from pydantic's message, without names of classes."""
    for record in ("a valid dictionary or instance of ", "a dictionary or an instance of "):
        message = message.replace(record, "a mapping, of ")
    message = message.partition(", of ")[0]
    for theirs, ours in (
        ("Input should be", "needed:"),
        ("a valid dictionary", "a mapping"),
        ("a valid integer", "an integer"),
        ("a valid ", "a "),
    ):
        message = message.replace(theirs, ours)
    return "needed: at least one" if message.startswith("List should have at least 1") else message
