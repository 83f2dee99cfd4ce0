"""Gathers under way when weights change, and sums that outlast their backward."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from parallel.sharding import whole
from parallel.sharding.param import local


def gathered_after_an_update() -> tuple[Tensor, int, int]:
    """A weight [4, 4] of ones to which one is added while it is gathered; how many buffers FSDP keeps for
    sums after a last backward as on an accelerator, and after they are waited for."""
    module = nn.Linear(4, 4, bias=False)
    nn.init.ones_(module.weight)
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    whole.gather(module)
    with torch.no_grad():
        local(module.weight).add_(1)
    whole.free(module)
    whole.gather(module)
    whole.wait(module)
    found = module.weight.detach().clone()
    with mock.patch.object(whole, "on_host", lambda _: False):
        whole.sum_in_backward(module, True, final=True)
        module(torch.ones(2, 4)).sum().backward()
        kept = module._get_fsdp_state()._comm_ctx.reduce_scatter_states
        under_way = len(kept)
        whole.finish_sums(module)
    return found, under_way, len(kept)


def test_a_gather_under_way_does_not_outlive_the_weights_and_sums_wait_for_the_end(ranks: Any) -> None:
    for found, under_way, left in ranks(2, gathered_after_an_update):
        assert torch.equal(found, torch.full((4, 4), 2.0))
        assert (under_way, left) == (1, 0)
