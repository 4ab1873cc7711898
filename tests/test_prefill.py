"""A prompt that goes through the model once gives each of its completions what a pass of its own would give it."""

from __future__ import annotations

import pytest
import torch
from family_cases import find_family, make_pairs, make_rows
from model_families import BUILDERS

from imagine_opd.models.access import read_token_ids
from imagine_opd.rollout import HFEngine, SamplingConfig
from imagine_opd.rollout.prefill import find_copies
from imagine_opd.vision_features import VisionFeatures

FAMILIES = [name for name in BUILDERS if name != "aya_vision"]


def generate(family, prompts, share, features=None, **fields):
    engine = HFEngine(read_token_ids(family.model, family.processor), features, share)
    seeds = list(range(40, 40 + len(prompts)))
    return engine.generate(family.model, prompts, SamplingConfig(8, **fields), seeds)


@pytest.mark.parametrize("name", FAMILIES)
def test_completions_are_those_of_a_prefill_each(name, tmp_path) -> None:
    family = find_family(name)
    prompts = [pair.student for pair in make_pairs(family, make_rows(), tmp_path)]
    copies = [prompts[0]] * 3 + [prompts[1]] + [prompts[2]] * 2 + [prompts[3]]
    alone, shared = (generate(family, copies, share) for share in (False, True))
    assert torch.equal(alone.completion_ids_BT, shared.completion_ids_BT)
    assert torch.equal(alone.completion_mask_BT, shared.completion_mask_BT)
    torch.testing.assert_close(alone.sampling_logprobs_BT, shared.sampling_logprobs_BT, rtol=1e-4, atol=1e-5)
    assert len({tuple(row.tolist()) for row in shared.completion_ids_BT[:3]}) > 1  # own seeds, own completions


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_prefill_and_features_are_shared_together(name, tmp_path) -> None:
    family = find_family(name)
    prompts = [pair.student for pair in make_pairs(family, make_rows(), tmp_path)]
    copies = [prompt for prompt in prompts for _ in range(2)]
    features = VisionFeatures(is_frozen=True, teacher_shares=True)
    plain, shared = generate(family, copies, False), generate(family, copies, True, features)
    assert torch.equal(plain.completion_ids_BT, shared.completion_ids_BT)
    assert features.computed == sum(len(prompt.view.frame_counts) for prompt in prompts)


def test_a_pass_is_made_for_each_prompt_not_for_each_completion(tmp_path, monkeypatch) -> None:
    family = find_family("qwen3_vl")
    prompts = [pair.student for pair in make_pairs(family, make_rows(), tmp_path)]
    tokens: list[int] = []
    layer = family.model.model.language_model.layers[0]

    def count(module, args, kwargs):
        tokens.append(args[0].shape[0] * args[0].shape[1])

    hook = layer.register_forward_pre_hook(count, with_kwargs=True)
    try:
        generate(family, [prompts[0]] * 4, True)
        shared = tokens[0]
        tokens.clear()
        generate(family, [prompts[0]] * 4, False)
    finally:
        hook.remove()
    length = len(prompts[0].input_ids)
    assert (shared, tokens[0]) == (length - 1, 4 * length)


def test_caches_of_other_kinds_are_left_to_generate(tmp_path) -> None:
    family = find_family("qwen3_vl")
    prompts = [pair.student for pair in make_pairs(family, make_rows(), tmp_path)]
    static = {"cache_implementation": "static", "disable_compile": True}
    copies = [prompts[0]] * 2
    plain, found = generate(family, copies, True), generate(family, copies, True, generation_kwargs=static)
    assert torch.equal(plain.completion_ids_BT, found.completion_ids_BT)


def test_copies_are_found_by_identity_in_any_order(tmp_path) -> None:
    family = find_family("qwen3_vl")
    first, second, *_ = (pair.student for pair in make_pairs(family, make_rows(), tmp_path))
    different, places = find_copies([first, second, first])
    assert places == [0, 1, 0]
    assert [prompt is found for prompt, found in zip((first, second), different, strict=True)] == [True, True]
