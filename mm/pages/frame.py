"""What all pages share: one file with its style and script in it, light and dark, that fetches nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from mm.errors import Refused
from mm.pages.html import content, el, join

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A part of a page. id: of its link."""

    id: str
    title: str
    body: Markup


def document(title: str, intro: Markup, sections: Sequence[Section], *, script: bool = True) -> str:
    """A page. Its policy allows our own style and script by their hashes, and pictures and sounds inside it.

    script: whether it has our script, for tables and charts.
    """
    style, code = _asset("frame.css"), _asset("frame.js")
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            "media-src data:",
            f"style-src {_hash(style)}",
            f"script-src {_hash(code)}" if script else "script-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    meta = (
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="referrer", content="no-referrer"),
    )
    head = el("head", *meta, el("title", title), el("style", style))
    links = el("ul", *(el("li", el("a", s.title, href=f"#{s.id}")) for s in sections))
    parts = (
        el("a", "To the content", class_="skip", href="#main"),
        el("header", el("div", el("h1", title), intro), _themes()),
        el("nav", links, aria_label="Sections") if len(sections) > 1 else "",
        el("main", join(map(_section, sections)), id="main"),
        el("footer", el("p", "Written by Polyrank. This page is one file: it fetches nothing.")),
        el("script", code) if script else "",
    )
    body = el("body", *parts)
    return f"<!DOCTYPE html>\n{el('html', head, chr(10), body, lang='en')}\n"


def write_page(text: str, path: Path) -> None:
    """Write a page; raises Refused, in words, where the file cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror}; needed: a file that can") from error


def _section(section: Section) -> Markup:
    heading = el("h2", section.title, id=f"{section.id}-title")
    return el("section", heading, section.body, id=section.id, aria_labelledby=f"{section.id}-title")


def _themes() -> Markup:
    """The switch between light and dark: radio buttons that the style sheet looks at, without a script."""
    choices = [
        el("label", el("input", type="radio", name="theme", id=f"theme-{k}", checked=k == "system"), f" {k}")
        for k in ("system", "light", "dark")
    ]
    return el("fieldset", el("legend", "Colours"), *choices, class_="theme")


def _asset(file: str) -> Markup:
    return Markup((HERE / file).read_text(encoding="utf-8"))


def _hash(source: Markup) -> Markup:
    digest = hashlib.sha256(str(source).encode()).digest()
    return content(Markup(f"'sha256-{base64.b64encode(digest).decode()}'"))
