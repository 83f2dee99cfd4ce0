"""`data prepare|index|inspect`: make shards, index them, look into them."""

from __future__ import annotations

import argparse
from pathlib import Path

from mm.commands.command import Command
from mm.errors import Refused


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="prepare: folder to write to")
    parser.add_argument(
        "--tokenizer", default="bytes", metavar="T", help="index, inspect: as data.tokenizer (default bytes)"
    )
    parser.add_argument("--again", action="store_true", help="index: scan shards that have an index too")
    parser.add_argument(
        "--cache", metavar="DIR", help="index, inspect: as data.remote.cache, where shards are URLs"
    )
    parser.add_argument("--seed", type=int, default=0, help="prepare: seed (default 0)")


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    verb, *rest = args.positional or [""]
    if verb == "prepare":
        return _prepare(args, rest)
    if verb not in ("index", "inspect") or not rest:
        raise Refused("needed: data prepare digits --out DIR, data index SHARDS, or data inspect SHARDS")
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
        print(index_text(rest, Path(), tokenizer, again=args.again, storage=storage))
    else:
        print(inspect_text(rest, Path(), tokenizer, storage))
    return 0


def _prepare(args: argparse.Namespace, names: list[str]) -> int:
    if names != ["digits"] or args.out is None:
        raise Refused(f"data prepare {' '.join(names)}: needed: data prepare digits --out DIR")
    from mm.data.digits import prepare_digits

    try:
        shards = prepare_digits(args.out, args.seed)
    except ModuleNotFoundError as error:
        raise Refused(f"data prepare needs {error.name}: pip install -e '.[data]'") from error
    print(*shards, sep="\n")
    return 0


COMMAND = Command(
    _run,
    "data prepare digits --out DIR | index SHARDS | inspect SHARDS",
    "prepare digits, index SHARDS or inspect SHARDS; SHARDS are file names or patterns",
    _options,
)
