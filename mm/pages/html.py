"""Elements of a page as text that is escaped once: markupsafe tells what is markup from what is content."""

from __future__ import annotations

import re
from collections.abc import Iterable

from markupsafe import Markup, escape

VOID = {"meta", "br", "img", "input", "link"}
# Characters that a page may not hold (controls, halves of surrogate pairs), and those that turn the direction
# of what follows them: a name could hide behind them what it is. Letters of scripts from right to left stay.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """Text with characters that nobody sees written as \\u202e and the like."""
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def content(value: object) -> Markup:
    """A value as content: markup as it is, all else escaped."""
    return value if isinstance(value, Markup) else escape(clean(str(value)))


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """An element. Children and attributes' values are escaped, unless they are markup.

    An attribute's name has "-" for "_" (`class_` is class); None and False leave it out, True is a bare name.
    """
    out = [f"<{tag}"]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        out.append(f" {name.rstrip('_').replace('_', '-')}")
        if value is not True:
            out.append(f'="{content(value)}"')
    out.append(">")
    if tag not in VOID:
        out += [*map(content, children), f"</{tag}>"]
    return Markup("".join(out))


def join(parts: object) -> Markup:
    """Parts one after the other."""
    assert not isinstance(parts, str)
    return Markup("").join(map(content, parts))  # type: ignore[call-overload]


def name(value: object) -> Markup:
    """A user's name inside a sentence: its direction of writing does not reach the words around it."""
    return el("bdi", value)


def plot(id: str, title: str, described: str, shapes: Iterable[object], size: tuple[float, float]) -> Markup:
    """A drawing that screen readers announce by its title and read by its description.

    id: of the drawing in its page. size: width and height of the shapes' coordinates.
    """
    width, height = size
    return el(
        "svg",
        el("title", title, id=f"{id}-title"),
        el("desc", described, id=f"{id}-desc"),
        *shapes,
        class_="plot",
        role="img",
        viewBox=f"0 0 {width} {height}",
        aria_labelledby=f"{id}-title {id}-desc",
    )
