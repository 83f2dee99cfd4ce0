"""The rule that updates parameters, as a config asks for it."""

from __future__ import annotations

import torch

from mm.config.training import TrainConfig
from parallel.sharding.rules import AdamW, Muon


def update_rule(train: TrainConfig) -> AdamW | Muon:
    """The optimizer of a config."""
    moments = torch.bfloat16 if train.moments == "bfloat16" else None
    adam = AdamW(train.betas, train.eps, train.weight_decay, moments)
    return adam if train.optimizer == "adamw" else Muon(train.momentum, rest=adam)
