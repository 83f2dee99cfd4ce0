"""`data prepare|convert|index|inspect`: make shards, index them, look into them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.commands.command import Command
from mm.errors import Refused

if TYPE_CHECKING:
    from mm.data.storage import Storage
    from mm.data.tokenizer import AnyTokenizer


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="prepare, convert: folder to write to")
    parser.add_argument(
        "--tokenizer", default="bytes", metavar="T", help="index, inspect: as data.tokenizer (default bytes)"
    )
    parser.add_argument("--again", action="store_true", help="index: scan shards that have an index too")
    source = "prepare: what is installed elsewhere: a folder, or a .deb"
    parser.add_argument("--from", type=Path, metavar="PATH", dest="source", help=source)
    parser.add_argument(
        "--cache", metavar="DIR", help="index, inspect: as data.remote.cache, where shards are URLs"
    )
    parser.add_argument("--seed", type=int, default=0, help="prepare: seed (default 0)")
    parser.add_argument(
        "--layout",
        metavar="L",
        help="convert, index, inspect: as data.layout (default: as they look)",
    )
    parser.add_argument(
        "--shard-size", type=int, default=1000, metavar="N", help="convert: records a shard (default 1000)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="convert: processes (default: a core each)")
    parser.add_argument(
        "--media", action="append", default=[], metavar="DIR", help="convert: folder that media paths are in"
    )
    parser.add_argument("--html", type=Path, metavar="OUT", help="inspect: write a page of samples")
    parser.add_argument(
        "--samples", type=int, default=8, metavar="N", help="inspect: the first N (default 8)"
    )
    parser.add_argument(
        "--sample", action="append", default=[], metavar="KEY", help="inspect: a sample by its key or number"
    )
    parser.add_argument("--split", metavar="NAME", help="convert: split of an Energon folder")


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    verb, *rest = args.positional or [""]
    if verb == "prepare":
        return _prepare(args, rest)
    if verb == "convert":
        return _convert(args, rest)
    if verb not in ("index", "inspect") or not rest:
        raise Refused(
            "needed: data prepare NAME --out DIR, data convert IN --out DIR, data index SHARDS, or data "
            "inspect SHARDS"
        )
    from mm.config.remote import RemoteConfig
    from mm.data.inspect import index_text, inspect_text
    from mm.data.storage import Storage
    from mm.data.tokenizer import make_tokenizer

    try:
        tokenizer = make_tokenizer(args.tokenizer)
    except ValueError as error:
        raise Refused(str(error)) from error
    limits = RemoteConfig()
    storage = Storage.of(rest, args.cache, limits.cache_bytes, limits.timeout_s)
    if verb == "index":
        print(index_text(rest, Path(), tokenizer, _layout(args), again=args.again, storage=storage))
    elif args.html is None:
        print(inspect_text(rest, Path(), tokenizer, _layout(args), storage))
    else:
        _show(args, rest, tokenizer, storage)
    return 0


def _show(args: argparse.Namespace, shards: list[str], tokenizer: AnyTokenizer, storage: Storage) -> None:
    """Write samples as a page."""
    from mm.data.index import load_index
    from mm.pages.frame import write_page
    from mm.pages.samples_page import choose, samples_page

    index = load_index(shards, Path(), layout=_layout(args), tokenizer=tokenizer, storage=storage)
    chosen = choose(index.samples, args.sample, args.samples)
    write_page(samples_page(index, chosen, tokenizer), args.html)
    print(f"{args.html}: {len(chosen)} samples, {args.html.stat().st_size} bytes")


def _layout(args: argparse.Namespace) -> str | dict[str, Any] | None:
    """--layout as a config would have it: a name, or a mapping in YAML."""
    import yaml

    try:
        found = None if args.layout is None else yaml.safe_load(args.layout)
    except yaml.YAMLError as error:
        raise Refused(f"--layout {args.layout!r} is no YAML: {error}") from error
    if not isinstance(found, str | dict | None):
        raise Refused(f"--layout {args.layout!r}; needed: a name, a mapping or module:function")
    return found


def _convert(args: argparse.Namespace, inputs: list[str]) -> int:
    if not inputs or args.out is None:
        raise Refused("needed: data convert IN .. --out DIR; IN are files, patterns or folders")
    from mm.data.convert.run import BAD, Request, convert

    request = Request(tuple(inputs), args.out, _layout(args), args.shard_size, tuple(args.media), args.split)
    workers = min(16, os.cpu_count() or 1) if args.workers is None else args.workers
    counts = convert(request, workers, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"{counts['samples']} samples in {counts['shards']} shards of {args.out}")
    if counts["bad"]:
        print(
            f"{counts['bad']} records are left out, {counts['missing']} of them for missing media; "
            f"{args.out / BAD} names each"
        )
    return 0


def _prepare(args: argparse.Namespace, names: list[str]) -> int:
    from mm.data.corpora.recipes import RECIPES, prepare

    if len(names) != 1 or names[0] not in RECIPES or args.out is None:
        known = "|".join(sorted(RECIPES))
        raise Refused(f"data prepare {' '.join(names)}: needed: data prepare NAME --out DIR, NAME: {known}")
    made = prepare(names[0], args.out, args.source, args.seed)
    print(*made.shards, sep="\n")
    print(f"{made.summary} Licences: {args.out / 'ATTRIBUTION.md'}", file=sys.stderr)
    return 0


COMMAND = Command(
    _run,
    "data prepare NAME --out DIR [--from PATH] | convert IN --out DIR | index SHARDS | inspect SHARDS",
    "prepare a corpus (docs/corpora.md), convert FILES or FOLDERS, index SHARDS or inspect SHARDS; all may "
    "be patterns",
    _options,
)
