"""Drawing tokens: each completion from its own seed, whatever batch or process it is sampled in.

`generate` would draw a whole batch from one random state, so that a completion depended on its neighbours. Here each
completion has its own uniform numbers, and a token is where its number falls in the cumulated distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# B rows, T completion tokens, V vocabulary

_WARPERS = {
    "top_k": TopKLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
"""In the order in which `generate` applies those that are on."""
_OFF = {"top_k": 0, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "min_p": None}

SHAPING_KEYS = frozenset({*_WARPERS, "no_repeat_ngram_size", "min_new_tokens", "suppress_tokens"})
"""Fields of a generation config that are applied here; the rest are `generate`'s own."""


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How completions are drawn. `temperature=0` is greedy."""

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: dict[str, Any] = field(default_factory=dict)


def draw_uniforms(seed: int | Sequence[int], rows: int, steps: int) -> torch.Tensor:
    """`[B, T]` uniform numbers in [0, 1), fp64: row i from `seed[i]` alone, or from (seed, i) where one is given."""
    seeds = [mix_seed(seed, row) for row in range(rows)] if isinstance(seed, int) else seed
    assert len(seeds) == rows
    drawn = [torch.rand(steps, generator=torch.Generator().manual_seed(each), dtype=torch.float64) for each in seeds]
    return torch.stack(drawn)


def mix_seed(*numbers: int) -> int:
    """One seed of 63 bits out of several numbers, by the steps of SplitMix64: torch seeds from the lower half."""
    seed = 0
    for number in numbers:
        seed = (seed + number + 0x9E3779B97F4A7C15) % 2**64
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) % 2**64
        seed ^= seed >> 31
    return seed >> 1


class SeededSampler(LogitsProcessor):
    """Bans ids, picks each row's next token, and keeps its log-prob.

    The log-prob is of the distribution at `temperature` before penalties, bans, top-k and top-p: the one the loss
    sees, so that the ratio of a fresh sample is 1. All that shapes the draw is therefore here, and `generate` has none
    of it. The two lists of ids are on `device`: a copy from the host at each token would wait for it.
    """

    def __init__(
        self,
        banned: Sequence[int],
        ends: Sequence[int],
        sampling: SamplingConfig,
        uniforms_BT: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        more = sampling.generation_kwargs
        self.banned = torch.tensor([*banned, *(more.get("suppress_tokens") or ())], dtype=torch.long, device=device)
        self.ends = torch.tensor(ends, dtype=torch.long, device=device)
        self.min_new_tokens = more.get("min_new_tokens") or 0
        self.temperature = sampling.temperature or 1.0
        self.uniforms_BT = uniforms_BT
        self.logprobs: list[torch.Tensor] = []
        self.penalties: list[LogitsProcessor] = []
        if sampling.repetition_penalty != 1.0:
            self.penalties.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if more.get("no_repeat_ngram_size"):
            self.penalties.append(NoRepeatNGramLogitsProcessor(more["no_repeat_ngram_size"]))
        chosen = {name: more.get(name, getattr(sampling, name, None)) for name in _WARPERS}
        self.warpers = [
            _WARPERS[name](value) for name, value in chosen.items() if value is not None and value != _OFF[name]
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        scores_BV = scores / self.temperature
        for penalty in self.penalties:
            scores = penalty(input_ids, scores)
        allowed_BV = (scores / self.temperature).index_fill(1, self.banned, -torch.inf)
        if len(self.logprobs) < self.min_new_tokens:
            allowed_BV.index_fill_(1, self.ends, -torch.inf)
        if self.uniforms_BT is None:
            picked_B = allowed_BV.argmax(dim=1)
        else:
            for warper in self.warpers:
                allowed_BV = warper(input_ids, allowed_BV)
            picked_B = pick_tokens(allowed_BV, self.uniforms_BT[:, len(self.logprobs)])
        self.logprobs.append(scores_BV.gather(1, picked_B[:, None])[:, 0] - scores_BV.logsumexp(dim=1))
        return torch.full_like(scores, -torch.inf).scatter_(1, picked_B[:, None], 0.0)

    def stack_logprobs(self, completion_ids_BT: torch.Tensor) -> torch.Tensor:
        """`[B, T]` log-probs of the completions."""
        steps = self.logprobs[: completion_ids_BT.shape[1]]
        if not steps:
            return torch.zeros_like(completion_ids_BT, dtype=torch.float32)
        return torch.stack(steps, dim=1)


def pick_tokens(scores_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """`[B]` ids: the first whose cumulated probability exceeds the row's uniform number."""
    # fp64: over 150,000 entries an fp32 sum loses the thin tail.
    cumulated_BV = scores_BV.softmax(dim=1, dtype=torch.float64).cumsum(dim=1)
    total_B1 = cumulated_BV[:, -1:].contiguous()
    picked_B1 = torch.searchsorted(cumulated_BV, uniforms_B[:, None] * total_B1, right=True)
    last_B1 = torch.searchsorted(cumulated_BV, total_B1)  # the last id with any probability
    return torch.minimum(picked_B1, last_B1)[:, 0]
