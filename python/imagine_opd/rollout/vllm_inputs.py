"""Prompts to what vLLM takes, and what it gives back to `Rollouts`; needs no vLLM.

Images are handed over once, as images, with one placeholder each: vLLM expands placeholders itself, and would expand
expanded ones again. The picture is the student's own pixels laid out again, on the grid of its patches, so that the
engine's processor has nothing to resize and makes the same numbers of it.
"""

# B completions, T completion tokens

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from imagine_opd.compact import expand_pixels
from imagine_opd.errors import ConfigError, EngineError
from imagine_opd.models import TokenIds
from imagine_opd.pictures import Pixels, restore_pictures
from imagine_opd.rollout.finish import finish_completions
from imagine_opd.rollout.sampler import SamplingConfig, mix_seed
from imagine_opd.types import Prompt, Rollouts, View, ViewConfig

BAN_BIAS = -100.0
"""Added to the logits of tokens that must not be sampled; the most that the OpenAI protocol allows."""
_OUTPUT_OF_DTYPE = {"float32": "float32", "uint16": "bfloat16", "uint8": "uint8"}


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One prompt: ids with one placeholder an image, the images `[H, W, 3]`, and names that tell images apart."""

    token_ids: tuple[int, ...]
    images: tuple[Pixels, ...]
    image_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """One completion: the prompt as the engine expanded it, the sampled ids (the end token among them) with the
    log-prob of each."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def make_requests(prompts: Sequence[Prompt], config: ViewConfig) -> list[EngineRequest]:
    """One request a prompt. The generations of a row share its pictures."""
    made: dict[int, EngineRequest] = {}
    for prompt in prompts:
        if id(prompt) not in made:
            images = rebuild_images(prompt.view, config)
            names = tuple(hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest() for image in images)
            made[id(prompt)] = EngineRequest(collapse_placeholders(prompt), tuple(images), names)
    return [made[id(prompt)] for prompt in prompts]


def collapse_placeholders(prompt: Prompt) -> tuple[int, ...]:
    """The prompt's ids with each image's run of placeholders as one."""
    ids: list[int] = []
    runs = iter(prompt.image_tokens)
    place = 0
    while place < len(prompt.input_ids):
        ids.append(prompt.input_ids[place])
        place += next(runs) if prompt.mm_token_type_ids[place] else 1
    assert next(runs, None) is None, "an image without placeholders"
    return tuple(ids)


def rebuild_images(view: View, config: ViewConfig) -> list[Pixels]:
    """The images of a view as `[H, W, 3]` uint8, exactly as the model is given them, degraded ones too."""
    output = _OUTPUT_OF_DTYPE[str(view.pixel_values.dtype)]
    config = dataclasses.replace(config, output=output)
    return [
        np.ascontiguousarray(restore_pictures(view, index, config)[0].pixels_HWC)
        for index in range(len(view.frame_counts))
    ]


def refuse_other_layout(config: ViewConfig) -> None:
    """Raise `ConfigError` where pictures cannot be made of the pixels again, level by level."""
    if config.tiling is not None:
        raise ConfigError(
            f"use_vllm=True: images of the family {config.tiling.family!r} are cut into frames, of which the picture "
            "cannot be rebuilt exactly; vLLM samples for Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5, others by "
            "use_vllm=False"
        )
    if config.output != "bfloat16":
        return
    side = config.patch_size * config.merge_size
    ramp = np.arange(3 * side * side, dtype=np.int64).reshape(side, side, 3).astype(np.uint8)
    patches = config.merge_size**2
    split = ramp.reshape(config.merge_size, config.patch_size, config.merge_size, config.patch_size, 3)
    samples = split.transpose(0, 2, 4, 1, 3).reshape(patches, -1)
    exact = expand_pixels(samples, dataclasses.replace(config, output="uint8"))
    rounded = exact.to(torch.bfloat16).view(torch.uint16).numpy()
    grid = np.array([[1, config.merge_size, config.merge_size]], dtype=np.int64)
    view = View(rounded, grid, (patches,), ((config.merge_size, config.merge_size),), ((side, side),))
    if not np.array_equal(rebuild_images(view, config)[0], ramp):
        raise ConfigError(
            "use_vllm=True: pixels in bfloat16, with this processor's mean and deviation, do not tell all 256 levels "
            "apart; have views made in float32 or uint8"
        )


def make_sampling_params(sampling: SamplingConfig, token_ids: TokenIds, seed: int) -> dict[str, Any]:
    """Fields of vLLM's `SamplingParams` for one completion."""
    more = sampling.generation_kwargs
    banned = {*token_ids.vision, *(more.get("suppress_tokens") or ())}
    return {
        "max_tokens": sampling.max_completion_length,
        "min_tokens": more.get("min_new_tokens") or 0,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": seed,
        # Ours alone: the engine's own end tokens may be others.
        "stop_token_ids": list(token_ids.eos),
        "ignore_eos": True,
        "logit_bias": {int(token): BAN_BIAS for token in sorted(banned)} or None,
        "logprobs": 0,  # the sampled token's alone
        "detokenize": False,
    }


def make_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed a completion, as `HFEngine` takes them."""
    if seed is None:
        seed = int(torch.randint(2**62, ()).item())
    return [mix_seed(seed, row) for row in range(count)] if isinstance(seed, int) else list(seed)


def refuse_other_prompt(prompt: Prompt, output: EngineOutput) -> None:
    """Raise `EngineError` unless the engine's expanded prompt is ours, token for token."""
    if output.prompt_ids == prompt.input_ids:
        return
    found, expected = len(output.prompt_ids), len(prompt.input_ids)
    if found == expected:
        place = next(
            i for i, pair in enumerate(zip(output.prompt_ids, prompt.input_ids, strict=True)) if len({*pair}) > 1
        )
        raise EngineError(
            f"vLLM's prompt differs from ours at token {place} of {expected}: {output.prompt_ids[place]}, expected "
            f"{prompt.input_ids[place]}; serve the model that is trained"
        )
    raise EngineError(
        f"vLLM made {found} tokens of a prompt that has {expected} here, {sum(prompt.image_tokens)} of them of "
        f"{len(prompt.image_tokens)} images: its pixel budget differs from the run's, or it takes no images; start it "
        "with the run's min_pixels and max_pixels (--mm-processor-kwargs), on a vLLM that takes images with token ids"
    )


def collect_rollouts(outputs: Sequence[EngineOutput], token_ids: TokenIds, device: torch.device) -> Rollouts:
    """Completions of different lengths as padded tensors; a row with a vision id is dropped, as with any engine."""
    longest = max(1, *(len(output.token_ids) for output in outputs))
    ids_BT = torch.full((len(outputs), longest), token_ids.pad, dtype=torch.long)
    logprobs_BT = torch.zeros(len(outputs), longest)
    length_B = torch.tensor([len(output.token_ids) for output in outputs])
    for row, output in enumerate(outputs):
        ids_BT[row, : length_B[row]] = torch.tensor(output.token_ids)
        logprobs_BT[row, : length_B[row]] = torch.tensor(output.logprobs)
    rollouts = finish_completions(ids_BT.to(device), logprobs_BT.to(device), token_ids)
    # `finish_completions` finds ends, not padding: what the length cap or the engine cut has none.
    sampled_BT = torch.arange(longest)[None] < length_B[:, None]
    mask_BT = rollouts.completion_mask_BT & sampled_BT.to(device)
    return dataclasses.replace(
        rollouts,
        completion_mask_BT=mask_BT,
        sampling_logprobs_BT=rollouts.sampling_logprobs_BT * mask_BT,
    )
