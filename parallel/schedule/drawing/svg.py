"""The shapes of a picture as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html import escape

from parallel.schedule.drawing.shapes import PAPER, Box, Picture, Shape, Text, control_points


@dataclass(frozen=True)
class Inside:
    """How a picture stands inside a page.

    id: of its title and description, which screen readers read. boxes, texts, lines: by colour of ours, the
    page's. There is no paper: the page is.
    """

    id: str
    title: str
    description: str
    boxes: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    lines: Mapping[str, str] = field(default_factory=dict)

    def coloured(self, s: Shape) -> Shape:
        """A shape in the page's colours."""
        if isinstance(s, Box):
            return replace(s, fill=self.boxes.get(s.fill, s.fill))
        found = self.texts if isinstance(s, Text) else self.lines
        return replace(s, colour=found.get(s.colour, s.colour))


def to_svg(picture: Picture, inside: Inside | None = None) -> str:
    """The picture as one SVG document, or as an element inside a page."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{picture.width}" height="{picture.height}" '
        f'viewBox="0 0 {picture.width} {picture.height}" font-family="Helvetica, Arial, sans-serif"'
    )
    if inside is None:
        before = [f"{head}>", f'<rect width="100%" height="100%" fill="{PAPER}"/>']
        shapes = picture.shapes
    else:
        name, about = f"{inside.id}-title", f"{inside.id}-desc"
        before = [
            f'{head} role="img" aria-labelledby="{name} {about}">',
            f'<title id="{name}">{escape(inside.title)}</title>',
            f'<desc id="{about}">{escape(inside.description)}</desc>',
        ]
        shapes = tuple(map(inside.coloured, picture.shapes))
    return "\n".join([*before, *map(_svg, shapes), "</svg>"]) + "\n"


def _svg(s: Shape) -> str:
    if isinstance(s, Box):
        round_ = f' rx="{s.radius:.2g}"' if s.radius else ""
        see = f' opacity="{s.opacity:g}"' if s.opacity < 1 else ""
        box = f'x="{s.x:.2f}" y="{s.y:.2f}" width="{s.w:.2f}" height="{s.h:.2f}"'
        return f'<rect {box} fill="{s.fill}"{round_}{see}/>'
    if isinstance(s, Text):
        weight = ' font-weight="600"' if s.bold else ""
        return (
            f'<text x="{s.x:.2f}" y="{s.y:.2f}" font-size="{s.size:g}" fill="{s.colour}" '
            f'text-anchor="{s.anchor}" dominant-baseline="central"{weight}>{escape(s.text)}</text>'
        )
    (x1, y1), (cx1, cy1), (cx2, cy2), (x2, y2) = control_points(s)
    dash = ' stroke-dasharray="4 3"' if s.dashed else ""
    path = f"M{x1:.2f} {y1:.2f}C{cx1:.2f} {cy1:.2f} {cx2:.2f} {cy2:.2f} {x2:.2f} {y2:.2f}"
    return (
        f'<g stroke="{s.colour}" opacity="{s.opacity:g}"><path d="{path}" fill="none" '
        f'stroke-width="{s.width:g}"{dash}/><circle cx="{x2:.2f}" cy="{y2:.2f}" r="{s.width + 0.4:.2g}" '
        f'stroke="none" fill="{s.colour}"/></g>'
    )
