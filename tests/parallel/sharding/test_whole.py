"""Gathers under way when weights change, and sums that outlast their backward."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from parallel.sharding import ShardPolicy, constant, declare, materialise, normal, shard_module, whole
from parallel.sharding.param import local
from parallel.topology.layout import make_layout
from parallel.topology.mesh import build_mesh


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
        under_way = sums_under_way(module)
        whole.finish_sums(module)
    return found, under_way, sums_under_way(module)


def sums_under_way(module: Any) -> int:
    context = module._get_fsdp_state()._comm_ctx
    if hasattr(context, "reduce_scatter_states"):
        return len(context.reduce_scatter_states)
    return int(context.reduce_scatter_state is not None)  # torch 2.11 keeps the last alone


class Layer(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        declare(self, "weight", (4, 4), normal(1.0), device=device, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Net(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        declare(self, "scale", (4,), constant(1.0), device=device, dtype=torch.float64)
        self.layers = nn.ModuleList(Layer(device) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


def under_way_when_layers_compute() -> tuple[list[list[int]], list[list[int]]]:
    """As each of three layers computes forward, and backward: the layers whose gather is under way."""
    net, mesh = Net("meta"), build_mesh(make_layout("net", 2, {}), "cpu")
    assert mesh is not None
    layers = list(net.layers)
    shard_module(net, mesh, ShardPolicy(layers), param_dtype=torch.float64)
    materialise(net, mesh, seed=1, name="net", device=torch.device("cpu"))

    def gathers() -> list[int]:
        results = [layer._get_fsdp_state()._fsdp_param_group._all_gather_result for layer in layers]
        return [
            k for k, found in enumerate(results) if found is not None and found.all_gather_work is not None
        ]

    seen: tuple[list[list[int]], list[list[int]]] = ([], [])
    for layer in layers:
        layer.register_forward_hook(lambda *_: seen[0].append(gathers()))
        layer.register_full_backward_hook(lambda *_: seen[1].append(gathers()))
    net(torch.ones(2, 4, dtype=torch.float64, requires_grad=True)).sum().backward()
    return seen


def test_each_layer_computes_while_the_next_one_is_gathered(ranks: Any) -> None:
    for forward, backward in ranks(2, under_way_when_layers_compute):
        assert forward == [[1], [2], []]
        assert backward == [[1], [0], []]


def test_a_gather_under_way_does_not_outlive_the_weights_and_sums_wait_for_the_end(ranks: Any) -> None:
    for found, under_way, left in ranks(2, gathered_after_an_update):
        assert torch.equal(found, torch.full((4, 4), 2.0))
        assert (under_way, left) == (1, 0)
