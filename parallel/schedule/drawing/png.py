"""The shapes of a drawing, painted by Pillow."""

from __future__ import annotations

from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from parallel.schedule.drawing.shapes import PAPER, Box, Curve, Picture, Text, control_points

OVER = 2  # supersampling factor, for smooth edges
_ANCHOR = {"start": "lm", "middle": "mm", "end": "rm"}


def to_png(picture: Picture, *, scale: int = 2) -> Image.Image:
    """An RGB image of the picture, `scale` pixels a unit."""
    s = scale * OVER
    image = Image.new("RGB", (picture.width * s, picture.height * s), PAPER)
    paint = ImageDraw.Draw(image, "RGBA")
    for shape in picture.shapes:
        if isinstance(shape, Box):
            box = [shape.x * s, shape.y * s, (shape.x + shape.w) * s - 1, (shape.y + shape.h) * s - 1]
            if box[2] > box[0] and box[3] > box[1]:
                paint.rounded_rectangle(box, shape.radius * s, _colour(shape.fill, shape.opacity))
        elif isinstance(shape, Curve):
            _curve(paint, shape, s)
        else:
            _text(paint, shape, s)
    return image.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS)


def _curve(paint: ImageDraw.ImageDraw, c: Curve, s: int) -> None:
    a, b, d, e = control_points(c)
    n = 24
    points = []
    for k in range(n + 1):
        t = k / n
        w = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
        points.append(
            tuple(s * sum(q * p[axis] for q, p in zip(w, (a, b, d, e), strict=True)) for axis in (0, 1))
        )
    colour, width = _colour(c.colour, c.opacity), max(1, round(c.width * s))
    if c.dashed:
        for k in range(0, n, 2):
            paint.line(points[k : k + 2], colour, width)
    else:
        paint.line(points, colour, width, joint="curve")
    r = (c.width + 0.4) * s
    x, y = points[-1]
    paint.ellipse([x - r, y - r, x + r, y + r], colour)


def _text(paint: ImageDraw.ImageDraw, t: Text, s: int) -> None:
    # The font has one weight: bold text is drawn with an outline of its own colour.
    stroke = s / 8 if t.bold else 0
    paint.text(
        (t.x * s, t.y * s), t.text, t.colour, _font(t.size * s), _ANCHOR[t.anchor], stroke_width=stroke
    )


@lru_cache(maxsize=32)
def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _colour(name: str, opacity: float) -> tuple[int, int, int, int]:
    red, green, blue = (int(name[k : k + 2], 16) for k in (1, 3, 5))
    return red, green, blue, round(255 * opacity)
