"""`checkpoint list|inspect|verify|diff|prune|fetch|import|export|average`: look at checkpoints, compare,
remove and average them, bring them from a store, and published models in and out."""

from __future__ import annotations

import argparse
from pathlib import Path

from mm.commands.command import Command
from mm.data.remote.urls import is_remote
from mm.errors import Refused

LOOKS = {"list": 1, "prune": 1, "inspect": 1, "verify": 1, "diff": 2}  # how many paths each takes


def _options(parser: argparse.ArgumentParser) -> None:
    kinds = ("float64", "float32", "bfloat16")
    parser.add_argument("--dtype", choices=kinds, help="of exported tensors (default: as the checkpoint's)")
    parser.add_argument(
        "--family",
        help="export as this model_type: a container's (llava, ..), or a language model's, which is then "
        "written alone (default: what can hold the model)",
    )
    parser.add_argument(
        "--average", action="store_true", help="export the average of the weights (train.average)"
    )
    parser.add_argument(
        "--adapters",
        action="store_true",
        help="export the language model's adapters (train.lora) alone, as the peft package reads them",
    )
    parser.add_argument("--sums", action="store_true", help="list: compare the sum of every file too")
    parser.add_argument("--all", action="store_true", help="diff: name every tensor and key that differs")
    parser.add_argument("--keep", type=int, help="prune: newest checkpoints that stay (default: the run's)")
    parser.add_argument("--keep-every", type=int, help="prune: as checkpoint.keep_every (default: the run's)")
    best = "prune: as checkpoint.keep_best (default: the run's)"
    parser.add_argument("--keep-best", choices=("loss", "eval_loss"), help=best)
    parser.add_argument("--yes", action="store_true", help="prune: remove what is listed")
    of = "of checkpoints that are averaged (default: all alike)"
    parser.add_argument("--shares", nargs="+", type=float, metavar="W", help=of)


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    verb, *rest = args.positional or [""]
    if verb in ("import", "export") and len(rest) == 2:
        import torch

        from mm.checkpoint.adapters import export_adapters
        from mm.checkpoint.folders import export_hf, import_hf

        source, out = Path(rest[0]), Path(rest[1])
        if verb == "import":
            print(import_hf(source, out))
        else:
            dtype = None if args.dtype is None else getattr(torch, args.dtype)
            export = export_adapters if args.adapters else export_hf
            print(export(source, out, dtype, args.family, average=args.average))
        return 0
    if verb == "average" and len(rest) >= 2:
        from mm.checkpoint.average import average_checkpoints

        out, *paths = map(Path, rest)
        print(average_checkpoints(out, paths, args.shares))
        return 0
    remote = [is_remote(path) for path in rest]
    if any(remote) and len(rest) in (1, 2):
        print(_remote(verb, rest, remote, sums=args.sums))
        return 0
    if verb not in LOOKS or len(rest) != LOOKS[verb]:
        raise Refused(
            "needed: checkpoint inspect PATH, checkpoint verify PATH, checkpoint list RUN, checkpoint diff "
            "PATH PATH, checkpoint prune RUN, checkpoint fetch URL FOLDER, checkpoint import HF_FOLDER OUT, "
            "checkpoint export PATH HF_FOLDER, or checkpoint average OUT PATH PATH .."
        )
    print(_look(verb, [Path(p) for p in rest], args))
    return 0


def _remote(verb: str, paths: list[str], remote: list[bool], *, sums: bool) -> str:
    """What is said of checkpoints in a store, or brought from there."""
    from mm.checkpoint.remote.shown import fetch_remote, inspect_remote, list_remote, verify_remote

    if verb == "fetch" and remote == [True, False]:
        return fetch_remote(paths[0], Path(paths[1]))
    if verb == "list" and remote == [True]:
        return list_remote(paths[0], sums=sums)
    if verb not in ("inspect", "verify") or remote != [True]:
        raise Refused(
            f"checkpoint {verb} with a URL; needed: checkpoint list URL, checkpoint inspect URL/step-.., "
            "checkpoint verify URL/step-.., or checkpoint fetch URL/step-.. FOLDER, and that for all else"
        )
    return inspect_remote(paths[0]) if verb == "inspect" else verify_remote(paths[0])


def _look(verb: str, paths: list[Path], args: argparse.Namespace) -> str:
    """What is said of checkpoints that are there."""
    from mm.checkpoint.compared import diff_text
    from mm.checkpoint.listed import list_text, prune_text
    from mm.checkpoint.state import inspect_text
    from mm.checkpoint.verified import verify_text

    if verb == "diff":
        return diff_text(paths[0], paths[1], everything=args.all)
    if verb == "list":
        return list_text(paths[0], sums=args.sums)
    if verb == "prune":
        given = {"keep": args.keep, "keep_every": args.keep_every, "keep_best": args.keep_best}
        return prune_text(paths[0], {k: v for k, v in given.items() if v is not None}, remove=args.yes)
    return inspect_text(paths[0]) if verb == "inspect" else verify_text(paths[0])


COMMAND = Command(
    _run,
    "checkpoint list|prune RUN | inspect|verify PATH | diff PATH PATH | fetch URL OUT | "
    "import HF_FOLDER OUT | export PATH HF_FOLDER | average OUT PATH ..",
    "list RUN or prune RUN: the checkpoints of a run, and what its rules let go (--yes removes it); inspect "
    "PATH or verify PATH: a checkpoint's folder; diff PATH PATH: config, layout and tensors of two; list, "
    "inspect and verify take a URL (checkpoint.remote.url) too, and fetch brings a checkpoint from there to "
    "OUT; import the model of a Hugging Face folder, a whole one too, to a checkpoint in OUT; export a "
    "checkpoint's to a new folder; average the weights of checkpoints to one in OUT",
    _options,
)
