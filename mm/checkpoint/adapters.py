"""Adapters of a run (train.lora) as a folder of their own."""

from __future__ import annotations

from pathlib import Path

import torch

from llm.hf.peft import write_adapters
from llm.hf.stored import Stored
from mm.checkpoint.whole import one_process
from mm.config.outline import SINK, llm_config
from mm.errors import CheckpointError, Refused
from mm.plan.adapters import low_rank
from parallel import checkpoint as store


def export_adapters(
    checkpoint: Path, out: Path, dtype: torch.dtype | None, family: str | None, *, average: bool = False
) -> str:
    """Write the language model's adapters in a checkpoint, saved under any layout, as a new folder of peft.

    family: a language model's model_type, None for that of the weights. Adapters of encoders have no place in
    it, so a run with such is refused unless a family is named. Raises CheckpointError where there are none,
    and where the checkpoint is damaged.
    """
    try:
        state = store.sound_state(checkpoint)
        if SINK in state:
            raise ValueError("it was imported and has no adapters; needed: a run with train.lora.llm")
        run = one_process(state, checkpoint)
        given = run.train.lora.get(SINK)
        if given is None:
            raise ValueError("its run has no train.lora.llm; needed: a checkpoint with adapters of llm")
        others = sorted(run.train.lora.keys() - {SINK})
        if others and family is None:
            raise ValueError(
                f"{', '.join(others)} has adapters too, and a folder of peft holds those of the language "
                "model; needed: --family, which writes these alone, or export without --adapters"
            )
        # The start of a run as it was given: a checkpoint is no folder that others load.
        bases = [p for p in run.checkpoint.starts if (Path(p) / "config.json").is_file()]
        write_adapters(
            Stored(checkpoint, f"{SINK}.", average),
            llm_config(run),
            out,
            low_rank(given),
            base=bases[0] if bases else None,
            dtype=dtype,
            family=family,
        )
        return f"{out}: adapters of rank {given.rank}, alpha {given.alpha:g}, as peft reads them"
    except (ValueError, KeyError, Refused) as error:
        raise CheckpointError(f"cannot export adapters of {checkpoint}: {error}") from error
