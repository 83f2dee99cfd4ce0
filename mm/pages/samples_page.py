"""Samples as a page to look at.

Whatever a sample has is somebody else's: all of it is escaped, types of media are from a list of ours, and
the page forbids itself scripts and requests.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from mm.data.encode import TokenSegment, encode_samples, parse_sample
from mm.data.layouts.tar import ending
from mm.data.published import PublishedTokenizer
from mm.data.reader import BadSample, ShardReader
from mm.data.sample import Broken, Index, Part, Sample
from mm.data.tokenizer import AnyTokenizer
from mm.errors import Refused
from mm.pages.frame import Section, document
from mm.pages.html import content, el, join

LARGEST = 8 << 20  # bytes of a medium that is put into the page
MOST_TOKENS = 3000  # of a text that are shown one by one
MOST_BROKEN = 50
TYPES = {
    "img": {**{e: e for e in ("png", "jpeg", "gif", "webp", "bmp", "avif")}, "jpg": "jpeg"},
    "audio": {"wav": "wav", "flac": "flac", "mp3": "mpeg", "ogg": "ogg", "oga": "ogg", "opus": "ogg"},
    "video": {"mp4": "mp4", "m4v": "mp4", "webm": "webm", "mov": "mp4", "mkv": "webm"},
}  # by element and ending, the second half of the type
ROOTS = {"img": "image", "audio": "audio", "video": "video"}


def choose(samples: Sequence[Sample], keys: Sequence[str], n: int) -> list[Sample]:
    """The samples with these keys or numbers, in this order; the first n where none are given.

    Raises Refused.
    """
    if not keys:
        return list(samples[:n])
    wanted, found = set(keys), dict[str, Sample]()
    for sample in samples:
        for name in {sample.key, str(sample.id)} & wanted:
            found.setdefault(name, sample)
    missing = [k for k in keys if k not in found]
    if missing:
        some = ", ".join(s.key for s in samples[:3])
        raise Refused(f"there is no sample {', '.join(missing)}; needed: keys such as {some}, or numbers")
    return [found[k] for k in keys]


def samples_page(index: Index, samples: Iterable[Sample], tokenizer: AnyTokenizer) -> str:
    """The page of some samples of an index. Reads their payloads."""
    reader = ShardReader()
    try:
        articles = [_article(sample, reader, tokenizer) for sample in samples]
    finally:
        reader.close()
    title = f"{len(articles)} of {len(index.samples)} samples in {len(index.shards)} shards"
    kind = "tokens" if isinstance(tokenizer, PublishedTokenizer) else "bytes"
    about = (
        f"Texts are in {kind}, each on a ground of its own. Blue: learned. Grey: read only. A bar at the "
        "left: it depends on the module that is named."
    )
    body = join([*articles, _broken(index.broken)])
    return document(title, el("p", about), [Section("samples", "Samples", body)], script=False)


def _article(sample: Sample, reader: ShardReader, tokenizer: AnyTokenizer) -> Markup:
    facts = [f"number {sample.id}", f"source {sample.source}", f"layout {sample.layout}", sample.shard]
    out = [el("h3", el("bdi", sample.key)), el("p", ", ".join(facts), class_="soft")]
    try:
        payload = reader.read(sample, sample.json)
        written = parse_sample(payload, sample.layout, sample.json.name, sample.names)
        found = encode_samples([written], tokenizer)[0]
        if isinstance(found, str):
            raise ValueError(found)
        items = iter([s.part for s in sample.segments if s.part is not None])
        for segment in found:
            out.append(
                _text(segment, tokenizer)
                if segment.ids is not None
                else _item(segment.kind, next(items), sample, reader)
            )
        learned = sum(len(s.ids) for s in found if s.ids is not None and s.loss)
        read = sum(len(s.ids) for s in found if s.ids is not None and not s.loss)
        counts = f"{learned} learned, {read} read only, markers and rows of items not counted"
        out.append(el("p", counts, class_="soft"))
    except (BadSample, ValueError) as error:
        out.append(el("p", el("b", "cannot be used:"), " ", error))
    return el("article", *out)


def _text(segment: TokenSegment, tokenizer: AnyTokenizer) -> Markup:
    ids = segment.ids or ()
    classes = ["text", *(["learned"] if segment.loss else []), *(["needs"] if segment.depends else [])]
    label = content(f"{len(ids)} {'learned' if segment.loss else 'read only'}")
    if segment.depends:
        label += join([", depends on ", el("b", el("bdi", segment.depends))])
    shown = [el("span", piece) for piece in _pieces(ids[:MOST_TOKENS], tokenizer)]
    more = f" and {len(ids) - MOST_TOKENS} more" if len(ids) > MOST_TOKENS else ""
    return el("div", el("p", label, class_="soft"), el("div", *shown, more), class_=" ".join(classes))


def _pieces(ids: Sequence[int], tokenizer: AnyTokenizer) -> list[str]:
    """Texts of tokens; of bytes those of whole characters."""
    if not isinstance(tokenizer, PublishedTokenizer):
        return list(bytes(ids).decode(errors="replace"))
    out = []
    for token in ids:
        said = tokenizer.decode([token])
        whole = said and "\ufffd" not in said
        out.append(said if whole else tokenizer.core.id_to_token(token) or f"[{token}]")
    return out


def _item(module: str, part: Part, sample: Sample, reader: ShardReader) -> Markup:
    meta = ", ".join(f"{k} {v}" for k, v in part.meta.items())
    caption = f"{module}: {part.name}, {part.size} bytes" + (f", {meta}" if meta else "")
    if part.size > LARGEST:
        return el("figure", el("figcaption", f"{caption} (too large for this page)"))
    return el("figure", _element(part, reader.read(sample, part)), el("figcaption", caption))


def _element(part: Part, payload: bytes) -> Markup:
    """What shows a medium; nothing for what no browser shows."""
    end = ending(part.name)
    if end in ("tif", "tiff"):
        end, payload = "png", _as_png(payload)
    element = next((e for e, types in TYPES.items() if end in types), None)
    if element is None:
        return Markup()
    kind = f"{ROOTS[element]}/{TYPES[element][end]}"
    source = f"data:{kind};base64,{base64.b64encode(payload).decode()}"
    if element == "img":
        small = " small" if part.meta.get("width", 999) < 64 else ""
        return el("img", alt=part.name, class_=f"medium{small}", src=source)
    return el(element, controls=True, class_="medium" if element == "video" else None, src=source)


def _as_png(payload: bytes) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    try:
        with Image.open(io.BytesIO(payload)) as image:
            image.convert("RGB").save(out, "PNG")
    except (OSError, ValueError) as error:
        raise ValueError(f"a picture cannot be shown: {error}") from error
    return out.getvalue()


def _broken(broken: Sequence[Broken]) -> Markup:
    if not broken:
        return Markup()
    lines = [f"{key or 'a part'} of {shard}: {why}" for shard, key, why in broken[:MOST_BROKEN]]
    more = [f"and {len(broken) - MOST_BROKEN} more"] if len(broken) > MOST_BROKEN else []
    listed = [el("p", line) for line in [*lines, *more]]
    return el("details", el("summary", f"{len(broken)} broken"), *listed, class_="card")
