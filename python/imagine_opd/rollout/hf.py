"""Rollouts by `transformers` generate: left-padded prompts in, sampled (or greedy) completions out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from imagine_opd.adapters import join_views
from imagine_opd.models import TokenIds, fit_inputs, get_base, get_device
from imagine_opd.rollout.finish import finish_completions
from imagine_opd.rollout.sampler import SHAPING_KEYS, SamplingConfig, SeededSampler, draw_uniforms
from imagine_opd.types import Prompt, Rollouts

# B rows, L prompt tokens, T completion tokens, V vocabulary


class HFEngine:
    """`generate(prompts)` with a Hugging Face model. Vision ids are banned; no gradient; eval mode while it runs."""

    def __init__(self, token_ids: TokenIds) -> None:
        self.token_ids = token_ids

    @contextmanager
    def opened(self, model: Any, step: int) -> Iterator[None]:
        """Nothing to do: the model itself samples."""
        yield

    def generate(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seed: int | Sequence[int] | None = None,
    ) -> Rollouts:
        """One completion per prompt; the caller's random state is neither read nor changed with a `seed`.

        seed: one number a completion, or one for all, from which each takes its own. `None`: drawn from torch's
            random state. A completion depends on its prompt and its seed, not on the batch around it.
        """
        device = get_device(model)
        inputs = fit_inputs(model, pad_prompts(prompts, self.token_ids.pad, device))
        uniforms_BT = None
        if sampling.temperature > 0.0:
            start = int(torch.randint(2**62, ()).item()) if seed is None else seed
            uniforms_BT = draw_uniforms(start, len(prompts), sampling.max_completion_length).to(device)
        sampler = SeededSampler(self.token_ids.vision, self.token_ids.eos, sampling, uniforms_BT, device)
        was_training = model.training
        model.eval()
        try:
            with _blank_generation_config(model), torch.no_grad():
                output = model.generate(
                    **inputs,
                    generation_config=self._generation_config(sampling),
                    logits_processor=LogitsProcessorList([sampler]),
                    synced_gpus=False,  # sharded weights are gathered around this call (`parallel.gather_parameters`)
                )
        finally:
            model.train(was_training)
        completion_ids_BT = output[:, inputs["input_ids"].shape[1] :]
        return finish_completions(completion_ids_BT, sampler.stack_logprobs(completion_ids_BT), self.token_ids)

    def _generation_config(self, sampling: SamplingConfig) -> GenerationConfig:
        extra = {name: value for name, value in sampling.generation_kwargs.items() if name not in SHAPING_KEYS}
        return GenerationConfig(
            max_new_tokens=sampling.max_completion_length,
            do_sample=False,  # the sampler leaves one token to choose
            eos_token_id=list(self.token_ids.eos),
            pad_token_id=self.token_ids.pad,
            use_cache=True,
            **extra,
        )


@contextmanager
def _blank_generation_config(model: Any) -> Iterator[None]:
    """Hides the checkpoint's own generation config: `generate` fills every unset field from it (Qwen's carries
    top_k=20, top_p=0.8), and the student would be trained off its own distribution."""
    inner = get_base(model)
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
    """The pixel inputs of all prompts, in order, as their family's model takes them."""
    arrays = join_views(prompts[0].family, [prompt.view for prompt in prompts])
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
