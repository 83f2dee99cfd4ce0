"""`eval PATH`: losses by modality and source on held-out samples, and exact answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.commands.command import Command, nproc_option
from mm.errors import Refused
from mm.ranks import launch

if TYPE_CHECKING:
    from mm.inference.asked import Asked
    from mm.inference.exact import Answered
    from mm.inference.source import Source
    from mm.plan.blueprint import Blueprint
    from mm.ranks.launch import RankInfo
    from mm.train.evaluate import Losses


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples", type=int, metavar="N", help="held-out samples (default eval.samples); 0: no losses"
    )
    parser.add_argument("--ask", type=Path, metavar="JSONL", help="questions with answers, for exact match")
    parser.add_argument(
        "--ask-samples", type=int, default=0, metavar="N", help="ask the first N held-out samples (default 0)"
    )
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="longest answer (default 32)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers there")
    nproc_option(parser)


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    paths = [x for x in args.positional if "=" not in x]
    if len(paths) != 1:
        raise Refused("needed: eval PATH: the folder of a run, a checkpoint, or a published folder")
    for name, least in (("samples", 0), ("ask_samples", 0), ("tokens", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise Refused(f"--{name.replace('_', '-')} {getattr(args, name)}; needed: at least {least}")
    if args.ask is not None and not args.ask.is_file():
        raise Refused(f"no file {args.ask}")
    from mm.inference.source import check_layout, source_of
    from mm.plan.blueprint import draw_up

    launched = launch.launched()
    world = launch.world_size() if launched else args.nproc or 1
    if args.ask is not None or args.ask_samples:
        check_layout(Path(paths[0]), world)
    source = source_of(Path(paths[0]), [x for x in args.positional if "=" in x], world)
    if not source.cfg.data.eval and not (args.samples == 0 and not args.ask_samples):
        raise Refused("the run has no held-out data; needed: data.eval='[SHARDS]', or --samples 0 with --ask")
    blueprint = draw_up(source.cfg, world)
    if not launched:
        return launch.launch_local(world, argv)
    launch.follow_launcher()
    _on_rank(args, source, blueprint)
    return 0


def _on_rank(args: argparse.Namespace, source: Source, blueprint: Blueprint) -> None:
    import torch.distributed as dist

    rank = launch.init_distributed(blueprint.cfg)
    try:
        found = _losses(args, source, blueprint, rank)
        answered = _answers(args, source, blueprint, rank)
    finally:
        dist.destroy_process_group()
    if rank.rank:
        return
    out = _numbers(source, found, answered)
    print(_table(out), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


def _losses(args: argparse.Namespace, source: Source, blueprint: Blueprint, rank: RankInfo) -> Losses | None:
    """None where none are asked for."""
    from mm.ranks.job import build_job, open_data, open_index
    from mm.train.evaluate import losses

    if args.samples == 0 or not blueprint.cfg.data.eval:
        return None
    index = open_index(blueprint, blueprint.cfg.data.eval, blueprint.cfg.base)
    job = build_job(blueprint, rank)
    data = open_data(job, index)
    try:
        source.fill(job)
        limit = blueprint.cfg.eval.samples if args.samples is None else args.samples
        found = losses(job, data, index.usable[:limit])
    finally:
        data.assembler.reader.close()
    job.control.any(False)  # none closes what another still uses
    job.close()
    return found


def _answers(
    args: argparse.Namespace, source: Source, blueprint: Blueprint, rank: RankInfo
) -> list[Answered]:
    from mm.inference.exact import ask, questions_of, read_questions
    from mm.ranks.job import open_index

    questions = [] if args.ask is None else read_questions(args.ask)
    if args.ask_samples:
        index = open_index(blueprint, blueprint.cfg.data.eval, blueprint.cfg.base)
        questions += questions_of(index.usable, args.ask_samples, blueprint.storage)
    if not questions:
        return []
    model: Asked = source.model(blueprint, rank)
    found = list(ask(model, questions, args.tokens))
    model.close()
    return found


def _numbers(source: Source, found: Losses | None, answered: Sequence[Answered]) -> dict[str, Any]:
    """What --json writes."""
    out: dict[str, Any] = {"path": str(source.path)}
    if found is not None:
        out |= found.every._asdict()
        for by in ("modality", "source"):
            out[f"loss_by_{by}"] = {name: own._asdict() for name, own in found.by(by).items()}
    if answered:
        every = _score(answered)
        out["exact_match"] = {
            **every,
            "by_modality": _scores(answered, lambda a: a.modality),
            "by_source": _scores(answered, lambda a: a.question.source),
            "answers": [
                {
                    "name": a.question.name,
                    "said": a.said,
                    "answer": list(a.question.answers),
                    "right": a.right,
                }
                for a in answered
            ],
        }
    return out


def _scores(answered: Sequence[Answered], key: Callable[[Answered], str]) -> dict[str, Any]:
    return {name: _score([a for a in answered if key(a) == name]) for name in sorted({*map(key, answered)})}


def _score(answered: Sequence[Answered]) -> dict[str, float | int]:
    right = sum(a.right for a in answered)
    return {"score": right / len(answered), "right": right, "asked": len(answered)}


def _table(out: dict[str, Any]) -> str:
    """The numbers as a table for the console."""
    lines = [out["path"]]
    if "loss" in out:
        lines.append(f"{'loss':<28} {out['loss']:>10.4f} {out['tokens']:>10} tokens")
        for by in ("modality", "source"):
            own: dict[str, dict[str, float]] = out[f"loss_by_{by}"]
            lines += [f"  {by} {n:<25.25} {x['loss']:>7.4f} {x['tokens']:>10} tokens" for n, x in own.items()]
    if "exact_match" in out:
        match = out["exact_match"]
        lines.append(f"{'exact match':<28} {match['score']:>10.4f} {match['right']:>4} of {match['asked']}")
        for by in ("modality", "source"):
            rows = match[f"by_{by}"].items()
            lines += [
                f"  {by} {n:<25.25} {x['score']:>7.4f} {x['right']:>4} of {x['asked']}" for n, x in rows
            ]
    return "\n".join(lines)


COMMAND = Command(
    _run,
    "eval PATH: losses by modality and source on held-out samples, and exact answers",
    "PATH: the folder of a run (its newest checkpoint), a checkpoint, or a Hugging Face folder; and "
    "overrides of its config, such as data.eval='[SHARDS]' or, with --nproc or torchrun, layout.llm.tp=2",
    _options,
)
