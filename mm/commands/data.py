"""`data prepare|index|inspect`: make shards, index them, look into them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mm.commands.command import Command
from mm.errors import Refused


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="prepare: folder to write to")
    parser.add_argument(
        "--tokenizer", default="bytes", metavar="T", help="index, inspect: as data.tokenizer (default bytes)"
    )
    source = "prepare: what is installed elsewhere: a folder, or a .deb"
    parser.add_argument("--from", type=Path, metavar="PATH", dest="source", help=source)
    parser.add_argument("--seed", type=int, default=0, help="prepare: seed (default 0)")


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    verb, *rest = args.positional or [""]
    if verb == "prepare":
        return _prepare(args, rest)
    if verb not in ("index", "inspect") or not rest:
        raise Refused("needed: data prepare NAME --out DIR, data index SHARDS, or data inspect SHARDS")
    from mm.data.inspect import index_text, inspect_text
    from mm.data.tokenizer import make_tokenizer

    try:
        tokenizer = make_tokenizer(args.tokenizer)
    except ValueError as error:
        raise Refused(str(error)) from error
    print((index_text if verb == "index" else inspect_text)(rest, Path(), tokenizer))
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
    "data prepare NAME --out DIR [--from PATH] | index SHARDS | inspect SHARDS",
    "prepare a corpus (docs/corpora.md), index SHARDS or inspect SHARDS; SHARDS are file names or patterns",
    _options,
)
