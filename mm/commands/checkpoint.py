"""`checkpoint inspect|verify|import|export|average`: look at checkpoints, average them, and bring published
models in and out."""

from __future__ import annotations

import argparse
from pathlib import Path

from mm.commands.command import Command
from mm.errors import Refused


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
    if verb not in ("inspect", "verify") or len(rest) != 1:
        raise Refused(
            "needed: checkpoint inspect PATH, checkpoint verify PATH, checkpoint import HF_FOLDER OUT, "
            "checkpoint export PATH HF_FOLDER, or checkpoint average OUT PATH PATH .."
        )
    from mm.checkpoint.state import inspect_text, verify_text

    print(inspect_text(Path(rest[0])) if verb == "inspect" else verify_text(Path(rest[0])))
    return 0


COMMAND = Command(
    _run,
    "checkpoint inspect|verify PATH | import HF_FOLDER OUT | export PATH HF_FOLDER | average OUT PATH ..",
    "inspect PATH or verify PATH: a checkpoint's folder; import the model of a Hugging Face folder, a "
    "whole one too, to a checkpoint in OUT; export a checkpoint's to a new folder; average the weights of "
    "checkpoints to one in OUT",
    _options,
)
