"""Tables that scroll in a box of their own and can be sorted, and lists of facts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from mm.pages.html import el, join
from mm.report.units import BYTES, seconds_text


class Cell(NamedTuple):
    """shown: text or markup. value: what the column is sorted by, None for the text."""

    shown: object
    value: float | None = None


class Column(NamedTuple):
    """number: whether the column has numbers, aligned to the right. long: whether it has sentences."""

    heading: str
    number: bool = False
    long: bool = False


def table(caption: str, columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> Markup:
    """A table in a box that scrolls by itself; the first cell of a row is its heading. Scripts sort it."""
    heads = [el("th", c.heading, scope="col", class_="n" if c.number else None) for c in columns]
    body = [
        el("tr", *(_cell(i, c, cell) for i, (c, cell) in enumerate(zip(columns, row, strict=True))))
        for row in rows
    ]
    found = el(
        "table",
        el("caption", caption),
        el("thead", el("tr", *heads)),
        el("tbody", *body),
        data_sortable=len(body) > 1,
    )
    return scroll(caption, found)


def scroll(label: str, body: Markup) -> Markup:
    """A box that scrolls sideways, which a keyboard can reach."""
    return el("div", body, class_="scroll", role="region", aria_label=label, tabindex="0")


def facts(pairs: Iterable[tuple[str, object]]) -> Markup:
    """Short facts side by side."""
    return el("dl", *(el("div", el("dt", k), el("dd", el("bdi", v))) for k, v in pairs), class_="facts")


def fact_table(caption: str, found: Mapping[str, object]) -> Markup:
    """Facts by name, a row each; bytes in the unit that suits them."""
    rows = []
    for key, value in found.items():
        if isinstance(value, int | float) and key.endswith("_bytes"):
            key, value = key.removesuffix("_bytes"), size(value)
        rows.append([key.replace("_", " "), value])
    return table(caption, [Column("fact"), Column("value", long=True)], rows)


def details(summary: str, body: Markup) -> Markup:
    """What is shown where it is asked for."""
    return el("details", el("summary", summary), body)


def code(text: str, *, wrap: bool = False) -> Markup:
    """Text as it is, in a box that scrolls by itself."""
    return el("pre", el("code", text), class_="wrap" if wrap else None, tabindex="0", dir="ltr")


def paragraphs(lines: Iterable[object], class_: str | None = None) -> Markup:
    """A paragraph a line."""
    return join(el("p", line, class_=class_) for line in lines)


def number(value: float | None, digits: int = 4) -> str:
    """A number in few digits; a dash for what is not there."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 10**digits or value == int(value):
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.{digits}g}"
    return f"{value:.{digits}g}"


def seconds(value: float | None) -> str:
    """A time in the unit that suits it."""
    if value is None or not math.isfinite(value):
        return number(value)
    return seconds_text(value)


def size(n: float | None) -> str:
    """Bytes in the unit that suits them."""
    if n is None or not math.isfinite(n):
        return number(n)
    unit, one = size_unit(n)
    return f"{n / one:.4g} {unit}" if one > 1 else f"{n:.0f} B"


def size_unit(n: float) -> tuple[str, int]:
    """The unit of bytes that suits a number of them, and its size."""
    return next(((unit, one) for unit, one in BYTES if abs(n) >= one), ("B", 1))


def _cell(i: int, column: Column, cell: object) -> Markup:
    shown, value = cell if isinstance(cell, Cell) else (cell, None)
    if not isinstance(shown, Markup):
        shown = el("bdi", shown)
    key = None if value is None or not math.isfinite(value) else repr(float(value))
    if i == 0:
        return el("th", shown, scope="row", data_sort=key)
    return el("td", shown, class_="n" if column.number else "long" if column.long else None, data_sort=key)
