"""`generate PATH`: ask a trained model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mm.commands.command import Command, nproc_option
from mm.errors import Refused
from mm.ranks import launch

if TYPE_CHECKING:
    import torch

    from llm.decode import Sampling
    from mm.inference.asked import Asked
    from mm.inference.source import Source
    from mm.plan.blueprint import Blueprint

KINDS = ("image", "audio")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", default="", metavar="T", help="what the answer follows, after the items")
    parser.add_argument("--chat", action="store_true", help="ask in a conversation, by the chat template")
    for kind in KINDS:
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
    parser.add_argument("--device", default="cpu", help="of one process: cpu (default) or cuda")
    nproc_option(parser)


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    paths = [x for x in args.positional if "=" not in x]
    if len(paths) != 1:
        raise Refused("needed: generate PATH: the folder of a run, a checkpoint, or a published folder")
    if args.tokens < 1:
        raise Refused(f"--tokens {args.tokens}; needed: at least 1")
    for kind in KINDS:
        for path in getattr(args, kind):
            if not path.is_file():
                raise Refused(f"no file {path}")
    overrides = [x for x in args.positional if "=" in x]
    if not launch.launched() and args.nproc is None:
        if overrides:
            raise Refused(f"{overrides[0]}; layouts are of several ranks: needed with --nproc N, or torchrun")
        _alone(args, Path(paths[0]))
        return 0
    from mm.inference.source import check_layout, source_of
    from mm.plan.blueprint import draw_up

    world = launch.world_size() if launch.launched() else args.nproc
    if world < 1:
        raise Refused(f"--nproc {world}; needed: at least 1")
    check_layout(Path(paths[0]), world)
    source = source_of(Path(paths[0]), overrides, world)
    blueprint = draw_up(source.cfg, world)
    if not launch.launched():
        return launch.launch_local(world, argv)
    launch.follow_launcher()
    _spread(args, source, blueprint)
    return 0


def _alone(args: argparse.Namespace, path: Path) -> None:
    """Ask a whole model in this process."""
    from mm.inference.whole import load_whole

    sampling = _sampling(args)
    _ask(args, load_whole(path, _dtype(args), args.device), sampling, lead=True)


def _spread(args: argparse.Namespace, source: Source, blueprint: Blueprint) -> None:
    """Ask a model over the ranks of a job, of which this is one; rank 0 writes the answer."""
    import torch.distributed as dist

    sampling = _sampling(args)
    rank = launch.init_distributed(blueprint.cfg)
    try:
        model = source.model(blueprint, rank, _dtype(args))
        _ask(args, model, sampling, lead=rank.rank == 0)
        model.close()
    finally:
        dist.destroy_process_group()


def _sampling(args: argparse.Namespace) -> Sampling:
    from llm.decode import Sampling

    try:
        return Sampling(args.temperature, args.top_p, args.seed)
    except ValueError as error:
        raise Refused(str(error)) from error


def _dtype(args: argparse.Namespace) -> torch.dtype | None:
    import torch

    return None if args.dtype is None else getattr(torch, args.dtype)


def _ask(args: argparse.Namespace, model: Asked, sampling: Sampling, *, lead: bool) -> None:
    """Answer the prompt of the command line; lead: whether this process writes the answer."""
    from mm.inference.answer import TextStream, answer
    from mm.inference.prompt import read_prompt, sample_of

    files = [(kind, path) for kind in KINDS for path in getattr(args, kind)]
    prompt = read_prompt(model, *sample_of(model, args.text, files, chat=args.chat))
    if not len(prompt.ids):
        raise Refused("the prompt has no tokens; needed: --text, --image or --audio")
    stream, text = TextStream(model.tokenizer), ""
    for token in answer(model, prompt, args.tokens, sampling, chat=args.chat):
        if lead:
            new = stream.add(token)
            text += new
            print(new, end="", flush=True)
    if not lead:
        return
    new = stream.rest()
    print(new, flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"text": text + new, "ids": stream.ids}) + "\n")


COMMAND = Command(
    _run,
    "generate PATH: ask the model of a run, a checkpoint or a published folder",
    "PATH: the folder of a run (its newest checkpoint), a checkpoint, or a Hugging Face folder; with --nproc "
    "or torchrun a run's, and key=value overrides of its config, such as layout.llm.tp=2",
    _options,
)
