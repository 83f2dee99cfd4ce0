"""The shapes of a picture as SVG."""

from __future__ import annotations

from html import escape

from parallel.schedule.drawing.shapes import PAPER, Box, Picture, Shape, Text, control_points


def to_svg(picture: Picture) -> str:
    """The picture as one SVG document."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{picture.width}" height="{picture.height}" '
        f'viewBox="0 0 {picture.width} {picture.height}" font-family="Helvetica, Arial, sans-serif">'
    )
    paper = f'<rect width="100%" height="100%" fill="{PAPER}"/>'
    return "\n".join([head, paper, *(_svg(s) for s in picture.shapes), "</svg>"]) + "\n"


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
