"""Answers of a language model: prompts once, then a token at a time.

decode() has a whole model in one process; decode_by() leaves open who computes. A prompt is computed as in
training, rows of encoders included; then each layer continues from what it kept (llm.cache). Prompts of a
batch may have any lengths: none is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llm.cache import Cache, CachedPacking
from llm.config import LLMConfig
from llm.model import LLM, LLMBatch
from llm.moe import ForwardContext
from llm.rotary import AXES
from parallel.comm.collectives import gather_tokens
from parallel.sequence.host import to_device
from parallel.sequence.packed import Packing
from parallel.tensor_parallel.loss import logits


@dataclass(frozen=True)
class Prompt:
    """What an answer follows."""

    ids: Tensor
    """[n] int64, n >= 1; any id where a row enters."""
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    """By edge, [R, d] or [R, levels, d], as LLM.forward takes them."""
    positions: Mapping[str, Tensor] = field(default_factory=dict)
    """By edge, [R] int64: where the rows enter."""
    places: Tensor | None = None
    """[3, n] int64: positions of a model that has three axes (LLMConfig.rope_axes); None: as text."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0: the likeliest token. Otherwise logits are divided by it."""
    top_p: float = 1.0
    """The likeliest tokens that have this probability together are drawn from (arXiv 1904.09751)."""
    seed: int = 0
    """Of the draws; prompt number i draws by seed + i, whatever is computed with it."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; needed: 0 for the likeliest token, or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; needed: more than 0, at most 1")


GREEDY = Sampling()


@dataclass(frozen=True)
class Next:
    """What a step of decode_by() computes: the next tokens of some documents."""

    batch: LLMBatch
    """The tokens; filled up with documents of no meaning, which come last."""
    rows: Mapping[str, Tensor]
    """By edge, rows of encoders for batch.row_positions, with all levels."""
    ctx: ForwardContext
    """Of the layers."""
    documents: int
    """How many of the documents have a next token."""
    choose: Callable[[Tensor], list[int]]
    """Their next tokens from logits [documents, vocab]; must be called once a step where it is called."""


def decode(
    model: LLM,
    prompts: Sequence[Prompt],
    limit: int,
    sampling: Sampling = GREEDY,
    stops: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """decode_by() of a whole model in one process."""
    assert model.stage.first and model.stage.last and model.axes.tp.size == model.axes.cp.size == 1

    def compute(step: Next) -> list[int]:
        packing = step.batch.packing
        return step.choose(next_logits(model, model.states(step.batch, step.rows, step.ctx), packing))

    return decode_by(compute, model.cfg, prompts, limit, sampling, stops)


@torch.no_grad()
def decode_by(
    compute: Callable[[Next], list[int]],
    cfg: LLMConfig,
    prompts: Sequence[Prompt],
    limit: int,
    sampling: Sampling = GREEDY,
    stops: Collection[int] = (),
    *,
    multiple: int = 1,
) -> Iterator[list[int | None]]:
    """The next token of each prompt, `limit` times at most; None for a prompt that has ended.

    compute: the next tokens of a step. stops: ids that end an answer; they are given too. multiple: of which
    the tokens of a step are one, as experts under tp need it. Ends once all answers have. A step costs one
    token of each prompt, and attention to its keys. Raises ValueError for an empty prompt.
    """
    if not prompts or not all(len(p.ids) for p in prompts):
        raise ValueError("a prompt has no tokens; needed: one at least, such as the begin marker")
    device, documents = prompts[0].ids.device, len(prompts)
    generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(documents)]
    every = [*prompts, *_fill(prompts, multiple)]
    cache, past, open_ = Cache(), [0] * len(every), [True] * documents
    said: list[list[int]] = [[] for _ in every]
    ids, rows, positions = _joined(every)
    lengths, places, shifts = tuple(len(p.ids) for p in every), _places(every), _shifts(every)
    for step in range(limit):
        packing = CachedPacking(lengths, device, places, tuple(past), cache)
        real = sum(lengths[:documents])
        batch = LLMBatch(ids, ids, packing, real, positions)

        def choose(scores: Tensor) -> list[int]:
            return _choose(scores[:documents], sampling, generators)

        new = compute(Next(batch, rows, ForwardContext(packing, real), documents, choose))
        yield [token if alive else None for token, alive in zip(new, open_, strict=True)]
        open_ = [alive and token not in stops for token, alive in zip(new, open_, strict=True)]
        if not any(open_) or step == limit - 1:
            return
        new = [*new, *[0] * (len(every) - documents)]
        past = [n + p for n, p in zip(lengths, past, strict=True)]
        said = [[*own, token] for own, token in zip(said, new, strict=True)]
        if _turns_long(cfg, packing.whole[:documents]):
            # Longer documents have other rotary positions from their beginning on: they are computed anew.
            cache, past = Cache(), [0] * len(new)
            longer = [_with(p, more) for p, more in zip(every, said, strict=True)]
            ids, rows, positions = _joined(longer)
            lengths, places = tuple(len(p.ids) for p in longer), _places(longer)
        else:
            ids, rows, positions = to_device(torch.tensor(new), device), {}, {}
            lengths = (1,) * len(new)
            if places is not None:
                after = torch.tensor([n + shift for n, shift in zip(past, shifts, strict=True)])
                places = to_device(after.expand(AXES, -1), device)


def generate(
    model: LLM,
    prompts: Sequence[Prompt],
    limit: int,
    sampling: Sampling = GREEDY,
    stops: Collection[int] = (),
) -> list[list[int]]:
    """The answers of decode(), each with the id that ended it."""
    steps = list(decode(model, prompts, limit, sampling, stops))
    return [[token for token in own if token is not None] for own in zip(*steps, strict=True)]


def _fill(prompts: Sequence[Prompt], multiple: int) -> list[Prompt]:
    """Prompts of no meaning, so that the tokens of all prompts, and the number of prompts, are multiples."""
    if multiple == 1:
        return []
    more = -len(prompts) % multiple or multiple
    first = 1 + (-sum(len(p.ids) for p in prompts) - more) % multiple
    device = prompts[0].ids.device
    lengths = [first, *[1] * (more - 1)]
    return [Prompt(torch.zeros(n, dtype=torch.int64, device=device)) for n in lengths]


def _turns_long(cfg: LLMConfig, lengths: Sequence[int]) -> bool:
    """Whether one more token makes a document long for longrope (arXiv 2402.13753)."""
    scaling = cfg.rope_scaling
    return scaling is not None and scaling.kind == "longrope" and scaling.original in lengths


def _with(prompt: Prompt, more: Sequence[int]) -> Prompt:
    """The prompt with tokens of its answer."""
    ids, places, device = prompt.ids, prompt.places, prompt.ids.device
    if places is not None:
        after = torch.arange(len(more)) + len(ids) + _shifts([prompt])[0]
        places = torch.cat([places, to_device(after.expand(AXES, -1), device)], 1)
    ids = torch.cat([ids, to_device(torch.tensor(more, dtype=ids.dtype), device)])
    return replace(prompt, ids=ids, places=places)


def _shifts(prompts: Sequence[Prompt]) -> list[int]:
    """By how many positions on all axes what follows each prompt is ahead of its number in the document."""
    return [0 if p.places is None else int(p.places.max()) + 1 - len(p.ids) for p in prompts]


def _places(prompts: Sequence[Prompt]) -> Tensor | None:
    """Prompt.places of all prompts, packed; None where none has them."""
    if all(p.places is None for p in prompts):
        return None
    text = [torch.arange(len(p.ids), device=p.ids.device).expand(AXES, -1) for p in prompts]
    return torch.cat([t if p.places is None else p.places for p, t in zip(prompts, text, strict=True)], 1)


def _joined(prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """(ids, rows by edge, positions of these) of all prompts, packed."""
    starts = Packing.of([len(p.ids) for p in prompts]).starts
    edges = list(dict.fromkeys(edge for p in prompts for edge in p.rows))
    rows, positions = {}, {}
    for edge in edges:
        having = [i for i, p in enumerate(prompts) if edge in p.rows]
        rows[edge] = torch.cat([prompts[i].rows[edge] for i in having])
        positions[edge] = torch.cat([prompts[i].positions[edge] + int(starts[i]) for i in having])
    return torch.cat([p.ids for p in prompts]), rows, positions


def next_logits(model: LLM, states: Tensor, packing: Packing) -> Tensor:
    """Logits [B, vocab] after the last of each document's tokens, float32 at least; the same on all tp
    ranks."""
    last = to_device(packing.starts[1:] - 1, states.device)
    found = logits(states[last], model.head_weight(), model.cfg.logit_scale, model.cfg.logit_cap)
    tp = model.axes.tp
    return found if tp.size == 1 else gather_tokens(found.T.contiguous(), tp).T


def _choose(scores: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """The next token of each prompt."""
    if sampling.temperature == 0:
        return [int(n) for n in scores.argmax(-1).tolist()]
    probability = torch.softmax(scores.double() / sampling.temperature, -1).cpu()
    ordered, tokens = torch.sort(probability, dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < sampling.top_p, ordered, 0.0)
    reached = kept.cumsum(-1)
    draws = [torch.rand((), generator=g, dtype=torch.float64) for g in generators]
    at = torch.searchsorted(reached, torch.stack(draws).unsqueeze(1) * reached[:, -1:], right=True)
    return [int(n) for n in tokens.gather(1, at.clamp(max=scores.shape[1] - 1)).squeeze(1).tolist()]
