"""The exponential average of weights is torch's own, whatever is done between updates."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from parallel.sharding.average import Average
from parallel.sharding.param import ParamSpec, constant
from parallel.sharding.rules import Shard


def shard(name: str, param: nn.Parameter) -> Shard:
    return Shard(name, param, param, ParamSpec(constant(0.0)), 1.0)


def test_it_is_that_of_torch() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 4).double()
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ours = Average([shard(name, param) for name, param in net.named_parameters()], 0.9)
    for step in range(6):
        with torch.no_grad():
            for param in net.parameters():
                param += torch.randn_like(param)
        theirs.update_parameters(net)
        ours.step(1.0)
        before = [p.detach().clone() for p in net.parameters()]
        ours.swap()
        for param, averaged in zip(net.parameters(), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(param, averaged, rtol=1e-13, atol=1e-15)
        ours.swap()
        assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)), step
