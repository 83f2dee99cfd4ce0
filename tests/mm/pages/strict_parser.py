"""Reads a page as strictly as a page of ours is written: what it does not know is a fault."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

from mm.pages.html import VOID

TAGS = re.compile(
    "html|head|meta|title|style|script|body|header|nav|main|section|article|footer|div|p|a|b|bdi|code|pre|span|ul"
    "|li|dl|dt|dd|h1|h2|h3|details|summary|fieldset|legend|label|input|figure|figcaption|table|caption|thead|tbody"
    "|tr|th|td|img|audio|video|svg|desc|g|path|rect|line|defs|pattern|circle|text|polyline"
)
# As the parser gives them: in small letters, those of SVG too.
ATTRIBUTES = re.compile(
    "lang|dir|charset|http-equiv|content|name|id|class|href|type|checked|alt|src|controls|role|tabindex|scope"
    "|width|height|open|viewbox|d|x|y|x1|x2|y1|y2|cx|cy|r|rx|points|fill|stroke|transform|opacity|xmlns"
    "|font-family|font-size|font-weight|stroke-width|stroke-dasharray|text-anchor|dominant-baseline|aria-label"
    "|aria-labelledby|aria-live|aria-hidden|patternunits|patterntransform|data-sort|data-sortable|data-chart"
)
SOURCE = r"data:(image|audio|video)/[\w+]+;base64,[\w+/=]+"


class Checked(HTMLParser):
    """Parses a page: every element is known and closed, no attribute acts, nothing is loaded, ids are single,
    headings go down by one, and what labels something is there.

    said: texts. sources: of media. tags: elements that were opened, in order.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.sources: list[str] = []
        self.said: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.named: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open
        assert len(set(self.ids)) == len(self.ids)
        assert set(self.named) <= set(self.ids), set(self.named) - set(self.ids)
        levels = [int(tag[1]) for tag in self.tags if re.fullmatch(r"h\d", tag)]
        assert levels[:1] == [1] and levels.count(1) == 1
        assert all(b <= a + 1 for a, b in itertools.pairwise(levels)), levels

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert TAGS.fullmatch(tag), tag
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append(tag)
        for name, value in attrs:
            assert ATTRIBUTES.fullmatch(name), name
            self._look(name, value or "")
        if tag == "svg" and not dict(attrs).get("aria-hidden"):
            assert dict(attrs).get("role") == "img" and dict(attrs).get("aria-labelledby")
        if tag not in VOID:
            self.open.append(tag)

    def _look(self, name: str, value: str) -> None:
        if name == "src":
            assert re.fullmatch(SOURCE, value)
            self.sources.append(value)
        elif name == "href":
            assert value.startswith("#")
            self.named.append(value[1:])
        elif name == "id":
            self.ids.append(value)
        elif name == "aria-labelledby":
            self.named += value.split()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.said.append(data)

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)
