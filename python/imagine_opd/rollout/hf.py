"""Rollouts by `transformers` generate: left-padded prompts in, sampled (or greedy) completions out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from imagine_opd.devices import move_to
from imagine_opd.models import TokenIds, fit_inputs, get_base, get_body, get_device
from imagine_opd.pixel_inputs import join_pixels
from imagine_opd.rollout.finish import finish_completions
from imagine_opd.rollout.prefill import can_copy_cache, fill_cache, find_copies
from imagine_opd.rollout.sampler import SHAPING_KEYS, SamplingConfig, SeededSampler, draw_uniforms
from imagine_opd.types import Prompt, Rollouts
from imagine_opd.vision_features import VisionFeatures, supplying

# B rows, L prompt tokens, T completion tokens, V vocabulary

_CACHE_KEYS = {"cache_implementation", "cache_config", "prefill_chunk_size"}
"""Of `generation_kwargs`: with one of them `generate` makes the cache itself."""


class HFEngine:
    """`generate(prompts)` with a Hugging Face model. Vision ids are banned; no gradient; eval mode while it runs.

    features: of the images of a step, to be made once and kept for its other forwards.
    share_prefill: completions of one prompt share its way through the model.
    """

    def __init__(self, token_ids: TokenIds, features: VisionFeatures | None = None, share_prefill: bool = True) -> None:
        self.token_ids = token_ids
        self.features = features
        self.share_prefill = share_prefill

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
        different, places_B = find_copies(prompts)
        shares = self.share_prefill and len(different) < len(prompts) and can_copy_cache(model)
        shares = shares and not _CACHE_KEYS & {*sampling.generation_kwargs}
        shown = different if shares else prompts
        inputs: dict[str, Any] = pad_prompts(shown, self.token_ids.pad, device, self.features)
        length = inputs["input_ids"].shape[1]
        uniforms_BT = None
        if sampling.temperature > 0.0:
            start = int(torch.randint(2**62, ()).item()) if seed is None else seed
            uniforms_BT = draw_uniforms(start, len(prompts), sampling.max_completion_length).to(device)
        sampler = SeededSampler(self.token_ids.vision, self.token_ids.eos, sampling, uniforms_BT, device)
        was_training = model.training
        model.eval()
        try:
            with (
                _blank_generation_config(model),
                supplying(self.features, get_body(model), shown, "rollout"),
                torch.no_grad(),
            ):
                inputs = fill_cache(model, inputs, places_B) if shares else fit_inputs(model, inputs)
                output = model.generate(
                    **inputs,
                    generation_config=self._generation_config(sampling),
                    logits_processor=LogitsProcessorList([sampler]),
                    synced_gpus=False,  # sharded weights are gathered around this call (`parallel.gather_parameters`)
                )
        finally:
            model.train(was_training)
        completion_ids_BT = output[:, length:]
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


def pad_prompts(
    prompts: Sequence[Prompt], pad_id: int, device: torch.device, features: VisionFeatures | None = None
) -> dict[str, torch.Tensor]:
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
    return {
        **{name: move_to(tensor, device) for name, tensor in inputs.items()},
        **join_pixels(prompts, device, in_full=features is None),
    }
