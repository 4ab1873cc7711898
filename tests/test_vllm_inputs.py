"""Prompts to vLLM's inputs and its outputs to rollouts: pictures exact, one placeholder an image, mismatches named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import ConfigError, EngineError
from imagine_opd.models.access import TokenIds, read_token_ids
from imagine_opd.prompts import build_prompt
from imagine_opd.rollout import SamplingConfig
from imagine_opd.rollout.sampler import mix_seed
from imagine_opd.rollout.vllm_inputs import (
    EngineOutput,
    collapse_placeholders,
    collect_rollouts,
    make_requests,
    make_sampling_params,
    make_seeds,
    rebuild_images,
    refuse_other_layout,
    refuse_other_prompt,
)
from imagine_opd.types import Tiling, ViewConfig
from imagine_opd.views import make_views

IDS = TokenIds(eos=(2,), pad=0, vision=(3, 4, 5, 6))
DEGRADED = {"student_scale": 0.5, "student_blur_px": 1.0}
CLIP = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}


@pytest.fixture
def prompts(tiny, make_rows):
    views = make_views(make_rows(2), tiny.view_config)
    return [
        build_prompt(row, view, tiny.processor, TINY_RECIPE["student_prompt_template"])
        for row, v in zip(make_rows(2), views, strict=True)
        for view in (v.student, v.teacher)
    ]


@pytest.mark.parametrize("output", ["float32", "uint8", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, DEGRADED], ids=["plain", "degraded"])
def test_rebuilt_image_gives_the_models_pixels_bit_for_bit_through_the_models_processor(
    tiny, make_rows, output, changes
):
    config = dataclasses.replace(tiny.view_config, **changes)
    seen = make_views(make_rows(3), config)
    given = make_views(make_rows(3), dataclasses.replace(config, output=output))
    for exact, compact in zip(seen, given, strict=True):
        images = rebuild_images(compact.student, config)  # the dtype says how pixels came, not the config
        made = tiny.processor.image_processor(images=images, return_tensors="np")
        assert images[0].shape == (48, 48, 3)
        np.testing.assert_array_equal(made["image_grid_thw"], exact.student.image_grid_thw)
        np.testing.assert_array_equal(made["pixel_values"], exact.student.pixel_values)


def test_rebuilt_images_of_a_degraded_student_are_not_the_plain_ones(tiny, make_rows):
    plain, degraded = (
        rebuild_images(make_views(make_rows(1), config)[0].student, config)[0]
        for config in (tiny.view_config, dataclasses.replace(tiny.view_config, **DEGRADED))
    )
    assert plain.shape == degraded.shape
    assert np.abs(plain.astype(int) - degraded).mean() > 1


def test_collapsed_prompt_has_one_placeholder_an_image_and_expands_to_ours(prompts):
    for prompt in prompts:
        placeholder = prompt.input_ids[prompt.mm_token_type_ids.index(1)]
        ids = collapse_placeholders(prompt)
        assert ids.count(placeholder) == len(prompt.image_tokens)
        runs = iter(prompt.image_tokens)
        expanded = [token for id_ in ids for token in [id_] * (next(runs) if id_ == placeholder else 1)]
        assert tuple(expanded) == prompt.input_ids
    assert max(len(prompt.image_tokens) for prompt in prompts) > 1


def test_generations_of_a_row_share_their_pictures_and_other_rows_have_other_names(prompts, tiny):
    first, again, other = make_requests([prompts[0], prompts[0], prompts[2]], tiny.view_config)
    assert first.images[0] is again.images[0]
    assert first.image_names == again.image_names
    assert first.image_names != other.image_names


def test_sampling_params_map_each_field_and_ban_vision_ids(tiny):
    ids = read_token_ids(tiny.model, tiny.processor)
    sampling = SamplingConfig(18, 1.0, 0.9, 7, 0.1, 1.2, {"min_new_tokens": 3, "suppress_tokens": [20]})
    params = make_sampling_params(sampling, ids, 11)
    assert params["logit_bias"] == dict.fromkeys(sorted({*ids.vision, 20}), -100.0)
    expected = {
        "max_tokens": 18, "min_tokens": 3, "temperature": 1.0, "top_p": 0.9, "top_k": 7, "min_p": 0.1,
        "repetition_penalty": 1.2, "seed": 11, "stop_token_ids": list(ids.eos), "ignore_eos": True, "logprobs": 0,
    }  # fmt: skip
    assert {name: params[name] for name in expected} == expected


def test_seeds_are_those_of_the_hf_engine():
    assert make_seeds([5, 6], 2) == [5, 6]
    assert make_seeds(9, 2) == [mix_seed(9, 0), mix_seed(9, 1)]


def test_other_image_size_in_the_engine_is_refused_with_both_lengths(prompts):
    prompt = prompts[0]
    refuse_other_prompt(prompt, EngineOutput(prompt.input_ids, (), ()))
    longer = (*prompt.input_ids[:4], *prompt.input_ids[3:])
    with pytest.raises(EngineError, match=f"made {len(longer)} tokens of a prompt that has {len(prompt.input_ids)}"):
        refuse_other_prompt(prompt, EngineOutput(longer, (), ()))
    other = (prompt.input_ids[0], 9, *prompt.input_ids[2:])
    with pytest.raises(EngineError, match=f"at token 1 of {len(other)}: 9, expected {prompt.input_ids[1]}"):
        refuse_other_prompt(prompt, EngineOutput(other, (), ()))


def test_outputs_become_padded_rollouts_and_a_vision_id_drops_its_row():
    outputs = [
        EngineOutput((), (7, 8, 2), (-0.1, -0.2, -0.3)),
        EngineOutput((), (9, 5, 9, 9), (-1.0, -1.0, -1.0, -1.0)),
        EngineOutput((), (7, 8), (-0.5, -0.6)),  # cut short without an end token
    ]
    rollouts = collect_rollouts(outputs, IDS, torch.device("cpu"))
    assert rollouts.completion_ids_BT.tolist() == [[7, 8, 2, 0], [0, 0, 0, 0], [7, 8, 0, 0]]
    assert rollouts.completion_mask_BT.long().tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    expected = torch.tensor([[-0.1, -0.2, -0.3, 0.0], [0.0] * 4, [-0.5, -0.6, 0.0, 0.0]])
    torch.testing.assert_close(rollouts.sampling_logprobs_BT, expected)
    assert rollouts.dropped == {"vision_token": 1}


def test_families_whose_pictures_cannot_be_rebuilt_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"'internvl'.*Qwen3-VL"):
        refuse_other_layout(ViewConfig(tiling=Tiling("internvl", 448)))


def test_bfloat16_pixels_are_refused_where_levels_collapse_only():
    refuse_other_layout(ViewConfig(output="bfloat16"))  # mean and deviation 0.5
    refuse_other_layout(ViewConfig(output="uint8", **CLIP))
    with pytest.raises(ConfigError, match="256 levels"):
        refuse_other_layout(ViewConfig(output="bfloat16", **CLIP))
