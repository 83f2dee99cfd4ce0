"""Memory and FLOPs of what can be counted by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mm.virtual.kernels import grouped_flops
from mm.virtual.ledger import Ledger, Moment
from mm.virtual.recorder import Recorder
from mm.virtual.run import fake_mode
from mm.virtual.source import Site
from mm.virtual.values import Values

CPU = torch.device("cpu")


def test_the_peak_of_an_mlp_is_what_it_keeps_and_what_it_works_with() -> None:
    fake = fake_mode()
    recorder = Recorder(CPU, 0, values=Values(fake, 1.0), names=lambda g: "")
    n, d, h = 64, 16, 256
    with fake, recorder:
        x = torch.rand(n, d)
        up, down = (torch.rand(a, b, requires_grad=True) for a, b in ((h, d), (d, h)))
        recorder.ledger.mark((up, down), "parameters", "llm")
        recorder.recording = True
        recorder.moment(Moment(1, "forward", "llm", True))
        hidden = F.linear(x, up)
        loss = F.linear(torch.relu(hidden), down).sum()
        del hidden
        recorder.moment(Moment(2, "backward", "llm", False))
        loss.backward()
        recorder.moment(Moment(3, "end", "llm", False))
    memory = recorder.ledger.memory()
    weights, wide, narrow = 4 * 2 * h * d, 4 * n * h, 4 * n * d
    # In the backward: what the relu gave, the gradient of the loss, that of `down`, and of the relu's result,
    # whose own gradient is next: three wide tensors.
    assert memory.by_kind["parameters"] == weights
    assert memory.peak == weights + 3 * wide + 4 * h * d + 4 + 4, (memory, narrow)
    assert sum(memory.by_kind.values()) == sum(memory.by_module.values()) == memory.peak
    assert memory.by_kind["activations"] == wide + 4
    flops = sum(k.flops * k.count for k in recorder.kernels.all())
    assert flops == 2 * 2 * n * h * d + 3 * 2 * n * h * d


def test_weights_of_one_rank_are_freed_where_fsdp_goes_on_without_an_operation_of_its_own() -> None:
    ledger = Ledger(CPU)
    weights, grads = torch.empty(64), torch.empty(32)
    ledger.made(weights, "empty", lambda: Site("", 0, "init_all_gather_outputs"))
    weights.untyped_storage().resize_(0)
    ledger.made(grads, "_to_copy", lambda: Site("", 0, "to_accumulated_grad_if_needed"))
    assert ledger.memory().peak == 4 * 64


def test_flops_are_those_of_torchs_counter() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, 2, 1), torch.nn.Flatten(), torch.nn.Linear(256, 8))
    x = torch.rand(5, 1, 16, 16)
    recorder = Recorder(CPU, 0, values=None, names=lambda g: "")
    recorder.recording = True
    with FlopCounterMode(display=False) as theirs, recorder:
        model(x).sum().backward()
    assert sum(k.flops * k.count for k in recorder.kernels.all()) == theirs.get_total_flops()


def test_a_grouped_product_costs_its_rows_once() -> None:
    rows, weight = torch.rand(10, 4), torch.rand(3, 4, 6)
    assert grouped_flops(rows, weight, torch.rand(10, 6)) == 2 * 10 * 4 * 6
    assert grouped_flops(rows.T, torch.rand(10, 6), torch.rand(3, 4, 6)) == 2 * 10 * 4 * 6
