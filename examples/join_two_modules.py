"""Two plain modules of your own, on different layouts and ranks, trained in a loop of your own.

    torchrun --nproc-per-node 4 -m examples.join_two_modules                            # colocated
    torchrun --nproc-per-node 5 -m examples.join_two_modules --encoder 0-2 --decoder 3-4 --tp 2

A sample is LENGTH tokens, some of them rows of its ragged items, which the encoder computes. Losses and
gradients are the same for every layout and any number of ranks.
"""

import argparse
import random

import torch
import torch.distributed as dist
from torch import nn

from parallel.boundary import BoundaryCommunicator, dest_side, plan_edge, row_positions, source_side
from parallel.topology.layout import make_layout

SAMPLES, LENGTH, WIDTH = 6, 12, 16


def batch(step):
    """One global batch, as every rank can work it out: (sample, position in it, rows) of each item."""
    rng = random.Random(step)
    items = [(j, at, rng.randint(0, 4)) for j in range(SAMPLES) for at in (1, 6)]
    values = torch.randn(SAMPLES * LENGTH + 99, 8, generator=torch.Generator().manual_seed(step)).double()
    return items, values


def train(encoder_spec, decoder_spec, steps=5):
    """Losses of each step, and the last gradients of the module that this rank hosts, by name."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layouts = [make_layout("encoder", world, encoder_spec), make_layout("decoder", world, decoder_spec)]
    enc, dec = layouts
    torch.manual_seed(0)  # the same start everywhere
    modules = [nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, WIDTH)), nn.Linear(WIDTH, 1)]
    encoder, decoder = (m.double() for m in modules)
    groups = [dist.new_group(layout.ranks) for layout in layouts]
    boundary = BoundaryCommunicator(dist.group.WORLD)
    losses = []
    for step in range(steps):
        items, values = batch(step)
        rows = [n for *_, n in items]
        share = [j * dec.dp // SAMPLES for j in range(SAMPLES)]  # sample -> dp rank of the decoder
        first = {d: share.index(d) for d in share}
        source = source_side(enc, rows, [i % enc.dp for i in range(len(items))])
        lane = [share[j] for j, *_ in items]
        position = [(j - first[share[j]]) * LENGTH + at for j, at, _ in items]
        tokens = [LENGTH * share.count(d) for d in range(dec.dp)]
        plan = plan_edge("encoder -> decoder", source, dest_side(dec, rows, lane, position, tokens), rank)

        x = torch.zeros(0, WIDTH, dtype=torch.float64)
        if rank in enc.ranks:  # the items of my dp rank, end to end
            starts = [sum(rows[:i]) for i in range(len(rows))]
            mine = range(enc.coord(rank).dp, len(items), enc.dp)
            x = encoder(torch.cat([values[starts[i] : starts[i] + rows[i]] for i in mine]))
        y = boundary.exchange(plan, x)
        loss = y.sum()  # no rows, but every rank goes through backward
        if rank in dec.ranks:
            here = tokens[dec.coord(rank).dp] // (dec.tp if dec.sequence_parallel else 1)
            positions = torch.from_numpy(row_positions(dec, rank, rows, lane, position, tokens))
            hidden = torch.ones(here, WIDTH, dtype=torch.float64).index_copy(0, positions, y)
            loss = decoder(hidden).square().sum() / (SAMPLES * LENGTH)  # by the global number of tokens
        loss.backward()

        for layout, module, group in zip(layouts, (encoder, decoder), groups, strict=True):
            for p in module.parameters() if rank in layout.ranks else ():
                dist.all_reduce(p.grad, group=group)  # pure sums
                p.data -= 0.01 * p.grad
                p.last, p.grad = p.grad, None
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
    hosted = zip(layouts, ("encoder", "decoder"), (encoder, decoder), strict=True)
    found = {f"{k}.{n}": p.last for o, k, m in hosted if rank in o.ranks for n, p in m.named_parameters()}
    return losses, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="all", help="its ranks, all data parallel")
    parser.add_argument("--decoder", default="all", help="its ranks")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share out the decoder's tokens")
    args = parser.parse_args()
    dist.init_process_group()
    spec = {"ranks": args.decoder, "tp": args.tp, "sequence_parallel": True}
    print(f"rank {dist.get_rank()}: losses {train({'ranks': args.encoder}, spec)[0]}")
    dist.destroy_process_group()
