"""Rollouts by `transformers` generate: left-padded prompts in, sampled (or greedy) completions out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from imagine_opd.models import TokenIds, get_device
from imagine_opd.rollout.finish import finish_completions
from imagine_opd.types import Prompt, Rollouts

# B rows, L prompt tokens, T completion tokens, V vocabulary


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


class HFEngine:
    """`generate(prompts)` with a Hugging Face model. Vision ids are banned; no gradient; eval mode while it runs."""

    def __init__(self, token_ids: TokenIds) -> None:
        self.token_ids = token_ids

    def generate(
        self, model: Any, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int | None = None
    ) -> Rollouts:
        """One completion per prompt. With `seed` the draw depends on nothing else, and the caller's random state is
        left as it was: a resumed run samples what the uninterrupted one did."""
        device = get_device(model)
        inputs = pad_prompts(prompts, self.token_ids.pad, device)
        recorder = _BanAndRecord(self.token_ids.vision, sampling.temperature)
        config = self._generation_config(sampling)
        was_training = model.training
        model.eval()
        devices = [device] if device.type == "cuda" else []
        try:
            with (
                _blank_generation_config(model),
                torch.no_grad(),
                torch.random.fork_rng(devices=devices, enabled=seed is not None),
            ):
                if seed is not None:
                    torch.manual_seed(seed)
                output = model.generate(
                    **inputs, generation_config=config, logits_processor=LogitsProcessorList([recorder])
                )
        finally:
            model.train(was_training)
        completion_ids_BT = output[:, inputs["input_ids"].shape[1] :]
        logprobs_BT = recorder.finish(completion_ids_BT)
        return finish_completions(completion_ids_BT, logprobs_BT, self.token_ids)

    def _generation_config(self, sampling: SamplingConfig) -> GenerationConfig:
        greedy = sampling.temperature == 0.0
        return GenerationConfig(
            max_new_tokens=sampling.max_completion_length,
            do_sample=not greedy,
            temperature=None if greedy else sampling.temperature,
            top_p=None if greedy else sampling.top_p,
            top_k=None if greedy else sampling.top_k,
            min_p=None if greedy else sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=list(self.token_ids.eos),
            pad_token_id=self.token_ids.pad,
            use_cache=True,
            **sampling.generation_kwargs,
        )


@contextmanager
def _blank_generation_config(model: Any) -> Iterator[None]:
    """Hides the checkpoint's own generation config: `generate` fills every unset field from it (Qwen's carries
    top_k=20, top_p=0.8), and the student would be trained off its own distribution."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    saved = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = saved


def pad_prompts(prompts: Sequence[Prompt], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Left-padded model inputs of one side. Positions are never passed: the model derives them from these."""
    length = max(len(prompt.input_ids) for prompt in prompts)
    ids_BL = torch.full((len(prompts), length), pad_id, dtype=torch.long)
    attention_BL = torch.zeros_like(ids_BL)
    types_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        start = length - len(prompt.input_ids)
        ids_BL[row, start:] = torch.tensor(prompt.input_ids)
        attention_BL[row, start:] = 1
        types_BL[row, start:] = torch.tensor(prompt.mm_token_type_ids)
    inputs = {"input_ids": ids_BL, "attention_mask": attention_BL, "mm_token_type_ids": types_BL}
    inputs.update(join_pixels(prompts))
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def join_pixels(prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """`pixel_values` and `image_grid_thw` of all prompts, in order."""
    pixels = [torch.from_numpy(prompt.view.pixel_values) for prompt in prompts]
    grids = [torch.from_numpy(prompt.view.image_grid_thw) for prompt in prompts]
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}


class _BanAndRecord(LogitsProcessor):
    """Bans ids, and keeps one step of scores so that the next call can look up the sampled token's log-prob.

    Peak memory is [B, V] instead of the [T, B, V] of `output_logits=True`. The log-prob is of the distribution at
    `temperature` before bans, top-k and top-p: the one the loss sees, so that the ratio of a fresh sample is 1.
    (A repetition penalty comes before this; the config refuses it in `full` mode.)
    """

    def __init__(self, banned: Sequence[int], temperature: float) -> None:
        self.banned = list(banned)
        self.temperature = temperature or 1.0
        self.last_scores_BV: torch.Tensor | None = None
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.last_scores_BV is not None:
            self._record(input_ids[:, -1])
        self.last_scores_BV = scores
        if not self.banned:
            return scores
        return scores.index_fill(1, torch.tensor(self.banned, device=scores.device), -torch.inf)

    def _record(self, sampled_B: torch.Tensor) -> None:
        assert self.last_scores_BV is not None
        scores_BV = self.last_scores_BV.float() / self.temperature
        picked_B = scores_BV.gather(1, sampled_B[:, None])[:, 0]
        self.logprobs.append(picked_B - scores_BV.logsumexp(dim=1))

    def finish(self, completion_ids_BT: torch.Tensor) -> torch.Tensor:
        if completion_ids_BT.shape[1] > 0:
            self._record(completion_ids_BT[:, -1])
        self.last_scores_BV = None
        steps = self.logprobs[: completion_ids_BT.shape[1]]
        if not steps:
            return torch.zeros_like(completion_ids_BT, dtype=torch.float32)
        return torch.stack(steps, dim=1)
