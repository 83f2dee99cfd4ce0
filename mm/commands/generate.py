"""`generate PATH`: ask a trained model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mm.commands.command import Command
from mm.errors import Refused


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", default="", metavar="T", help="what the answer follows, after the items")
    parser.add_argument("--chat", action="store_true", help="ask in a conversation, by the chat template")
    for kind in ("image", "audio"):
        what = f"an {kind}, or several"
        parser.add_argument(f"--{kind}", type=Path, action="append", default=[], metavar="FILE", help=what)
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="longest answer (default 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0, the default, is the likeliest token"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="share that is drawn from")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write text and ids there")
    kinds = ("float64", "float32", "bfloat16")
    parser.add_argument("--dtype", choices=kinds, help="of the weights (default: as they are stored)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    if len(args.positional) != 1:
        raise Refused("needed: generate PATH: the folder of a run, a checkpoint, or a published folder")
    if args.tokens < 1:
        raise Refused(f"--tokens {args.tokens}; needed: at least 1")
    files = [(kind, path) for kind in ("image", "audio") for path in getattr(args, kind)]
    for _, path in files:
        if not path.is_file():
            raise Refused(f"no file {path}")
    import torch

    from llm.decode import Sampling
    from mm.inference.answer import TextStream, answer
    from mm.inference.prompt import read_prompt, sample_of
    from mm.inference.whole import load_whole

    try:
        sampling = Sampling(args.temperature, args.top_p, args.seed)
    except ValueError as error:
        raise Refused(str(error)) from error
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    model = load_whole(Path(args.positional[0]), dtype, args.device)
    prompt = read_prompt(model, *sample_of(model, args.text, files, chat=args.chat))
    if not len(prompt.ids):
        raise Refused("the prompt has no tokens; needed: --text, --image or --audio")
    stream, text = TextStream(model.tokenizer), ""
    for token in answer(model, prompt, args.tokens, sampling, chat=args.chat):
        new = stream.add(token)
        text += new
        print(new, end="", flush=True)
    new = stream.rest()
    print(new, flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"text": text + new, "ids": stream.ids}) + "\n")
    return 0


COMMAND = Command(
    _run,
    "generate PATH: ask the model of a run, a checkpoint or a published folder",
    "PATH: the folder of a run (its newest checkpoint), a checkpoint, or a Hugging Face folder",
    _options,
)
