"""Samples as a page to look at: one HTML file with everything in it, without network and scripts.

Whatever a sample has is somebody else's: all of it is escaped, types of media are from a list of ours, and
the page forbids itself scripts and requests.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from mm.data.encode import TokenSegment, encode_samples, parse_sample
from mm.data.layouts.tar import ending
from mm.data.published import PublishedTokenizer
from mm.data.reader import BadSample, ShardReader
from mm.data.sample import Broken, Index, Part, Sample
from mm.data.tokenizer import AnyTokenizer
from mm.errors import Refused

LARGEST = 8 << 20  # bytes of a medium that is put into the page
MOST_TOKENS = 3000  # of a text that are shown one by one
MOST_BROKEN = 50
TYPES = {
    "img": {**{e: e for e in ("png", "jpeg", "gif", "webp", "bmp", "avif")}, "jpg": "jpeg"},
    "audio": {"wav": "wav", "flac": "flac", "mp3": "mpeg", "ogg": "ogg", "oga": "ogg", "opus": "ogg"},
    "video": {"mp4": "mp4", "m4v": "mp4", "webm": "webm", "mov": "mp4", "mkv": "webm"},
}  # by element and ending, the second half of the type
ROOTS = {"img": "image", "audio": "audio", "video": "video"}
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --page: #fafafa; --card: #fff; --ink: #1c1c1e; --soft: #62626a;
  --line: #d9d9de; --learned: #d9ecff; --learned2: #c3dffc; --read: #f0f0f2; --read2: #e5e5e9;
  --needs: #a5480b; }
@media (prefers-color-scheme: dark) { :root { --page: #141416; --card: #1f1f22; --ink: #ededf0;
  --soft: #a2a2ab; --line: #3a3a40; --learned: #143556; --learned2: #1c4570; --read: #2a2a2e;
  --read2: #343439; --needs: #ffb27a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; } h2 { font-size: 1.05rem; margin: 0; }
article, details { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .9rem; margin: 1rem 0; }
p, figcaption { color: var(--soft); font-size: .85rem; margin: .2rem 0; }
figure { margin: .8rem 0; } audio { width: 100%; }
img, video { max-width: 100%; max-height: 26rem; border: 1px solid var(--line); }
img.small { image-rendering: pixelated; min-width: 8rem; }
.text { margin: .8rem 0; } .text div { white-space: pre-wrap; font: 14px/1.9 ui-monospace, monospace; }
.text span { border-radius: .2rem; padding: .1rem 0; background: var(--read); color: var(--soft); }
.text span:nth-child(even) { background: var(--read2); }
.learned span { background: var(--learned); color: var(--ink); }
.learned span:nth-child(even) { background: var(--learned2); }
.needs { border-left: .25rem solid var(--needs); padding-left: .6rem; } .needs b { color: var(--needs); }
"""


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


def page(index: Index, samples: Iterable[Sample], tokenizer: AnyTokenizer) -> str:
    """The page of some samples of an index. Reads their payloads."""
    reader = ShardReader()
    try:
        articles = [_article(sample, reader, tokenizer) for sample in samples]
    finally:
        reader.close()
    title = f"{len(articles)} of {len(index.samples)} samples in {len(index.shards)} shards"
    kind = "tokens" if isinstance(tokenizer, PublishedTokenizer) else "bytes"
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>",
            f"<p>Texts are in {kind}, each on a ground of its own. Blue: learned. Grey: read only. A bar at "
            "the left: it depends on the module that is named.</p>",
            *articles,
            *_broken(index.broken),
            "</body></html>\n",
        ]
    )


def _article(sample: Sample, reader: ShardReader, tokenizer: AnyTokenizer) -> str:
    facts = [f"number {sample.id}", f"source {sample.source}", f"layout {sample.layout}", sample.shard]
    out = [f"<article><h2>{escape(sample.key)}</h2><p>{escape(', '.join(facts))}</p>"]
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
        out.append(f"<p>{learned} learned, {read} read only, markers and rows of items not counted</p>")
    except (BadSample, ValueError) as error:
        out.append(f"<p><b>cannot be used:</b> {escape(str(error))}</p>")
    return "".join([*out, "</article>"])


def _text(segment: TokenSegment, tokenizer: AnyTokenizer) -> str:
    ids = segment.ids or ()
    classes = ["text", *(["learned"] if segment.loss else []), *(["needs"] if segment.depends else [])]
    label = f"{len(ids)} {'learned' if segment.loss else 'read only'}"
    if segment.depends:
        label += f", depends on <b>{escape(segment.depends)}</b>"
    shown = "".join(f"<span>{escape(piece)}</span>" for piece in _pieces(ids[:MOST_TOKENS], tokenizer))
    more = f" and {len(ids) - MOST_TOKENS} more" if len(ids) > MOST_TOKENS else ""
    return f'<div class="{" ".join(classes)}"><p>{label}</p><div>{shown}{more}</div></div>'


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


def _item(module: str, part: Part, sample: Sample, reader: ShardReader) -> str:
    meta = ", ".join(f"{k} {v}" for k, v in part.meta.items())
    caption = escape(f"{module}: {part.name}, {part.size} bytes" + (f", {meta}" if meta else ""))
    if part.size > LARGEST:
        return f"<figure><figcaption>{caption} (too large for this page)</figcaption></figure>"
    return f"<figure>{_element(part, reader.read(sample, part))}<figcaption>{caption}</figcaption></figure>"


def _element(part: Part, payload: bytes) -> str:
    """What shows a medium; nothing for what no browser shows."""
    end = ending(part.name)
    if end in ("tif", "tiff"):
        end, payload = "png", _as_png(payload)
    element = next((e for e, types in TYPES.items() if end in types), None)
    if element is None:
        return ""
    kind = f"{ROOTS[element]}/{TYPES[element][end]}"
    source = f'src="data:{kind};base64,{base64.b64encode(payload).decode()}"'
    if element == "img":
        small = ' class="small"' if part.meta.get("width", 999) < 64 else ""
        return f'<img alt="{escape(part.name)}"{small} {source}>'
    return f"<{element} controls {source}></{element}>"


def _as_png(payload: bytes) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    try:
        with Image.open(io.BytesIO(payload)) as image:
            image.convert("RGB").save(out, "PNG")
    except (OSError, ValueError) as error:
        raise ValueError(f"a picture cannot be shown: {error}") from error
    return out.getvalue()


def _broken(broken: Sequence[Broken]) -> list[str]:
    if not broken:
        return []
    lines = [f"{key or 'a part'} of {shard}: {why}" for shard, key, why in broken[:MOST_BROKEN]]
    more = [f"and {len(broken) - MOST_BROKEN} more"] if len(broken) > MOST_BROKEN else []
    listed = "".join(f"<p>{escape(line)}</p>" for line in [*lines, *more])
    return [f"<details><summary>{len(broken)} broken</summary>{listed}</details>"]
