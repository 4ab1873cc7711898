"""Rollouts: ends found by position, vision ids never sampled, a planted one drops its row only."""

from __future__ import annotations

import copy

import pytest
import torch

from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.models.access import TokenIds, read_token_ids
from imagine_opd.prompts import build_prompt
from imagine_opd.rollout import HFEngine, SamplingConfig, finish_completions
from imagine_opd.rollout.finish import find_truncated, join_rollouts
from imagine_opd.rollout.hf import pad_prompts
from imagine_opd.scoring import score_side
from imagine_opd.views import make_views


@pytest.fixture
def prompts(tiny, make_rows):
    rows = make_rows(6)
    views = make_views(rows, tiny.view_config)
    template = TINY_RECIPE["student_prompt_template"]
    return [
        build_prompt(row, v.student if i % 2 else v.teacher, tiny.processor, template)
        for i, (row, v) in enumerate(zip(rows, views, strict=True))
    ]


def test_mask_ends_with_the_first_end_token_even_when_padding_is_the_end_token():
    ids = TokenIds(eos=(9,), pad=9, vision=(3,))
    completions = torch.tensor([[5, 6, 9, 9], [5, 6, 7, 8], [9, 9, 9, 9], [5, 9, 5, 9]])
    rollouts = finish_completions(completions, torch.zeros(4, 4), ids)
    assert rollouts.completion_mask_BT.long().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert find_truncated(rollouts, ids).tolist() == [False, True, False, False]


def test_several_end_tokens_each_end_a_completion():
    rollouts = finish_completions(torch.tensor([[5, 8, 1], [9, 8, 1]]), torch.zeros(2, 3), TokenIds((8, 9), 0, ()))
    assert rollouts.completion_mask_BT.long().tolist() == [[1, 1, 0], [1, 0, 0]]


def test_rollouts_of_none_lie_on_the_device_asked_for():
    """A process all of whose rows are bad goes on with them, beside tensors of its device."""
    none = join_rollouts([], 0, torch.device("meta"))
    for tensor in (none.completion_ids_BT, none.completion_mask_BT, none.sampling_logprobs_BT):
        assert (tensor.device.type, tensor.shape[0]) == ("meta", 0)


def test_planted_vision_token_drops_its_row_and_no_other():
    ids = TokenIds(eos=(9,), pad=0, vision=(3, 4))
    completions = torch.tensor([[5, 3, 9], [5, 6, 9], [5, 9, 4]])  # the last one lies behind the end
    rollouts = finish_completions(completions, torch.full((3, 3), -1.0), ids)
    assert rollouts.completion_mask_BT.long().tolist() == [[0, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert rollouts.completion_ids_BT.tolist() == [[0, 0, 0], [5, 6, 9], [5, 9, 0]]
    assert rollouts.dropped == {"vision_token": 1}
    assert rollouts.sampling_logprobs_BT[0].tolist() == [0.0, 0.0, 0.0]


def test_vision_ids_are_never_sampled_even_when_the_model_wants_nothing_else(tiny, prompts):
    model = copy.deepcopy(tiny.model)
    ids = read_token_ids(model, tiny.processor)
    image_id = tiny.processor.tokenizer.convert_tokens_to_ids(tiny.processor.image_token)
    assert image_id in ids.vision
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    head.weight.data = model.lm_head.weight.data.clone()
    head.bias.data.zero_()
    head.bias.data[list(ids.vision)] = 100.0
    model.lm_head = head
    unbanned = HFEngine(TokenIds(ids.eos, ids.pad, ()))
    sampled = unbanned.generate(model, prompts[:1], SamplingConfig(1), seed=0)
    assert int(sampled.completion_ids_BT[0, 0]) in ids.vision  # the plant works
    rollouts = HFEngine(ids).generate(model, prompts, SamplingConfig(8), seed=0)
    assert not torch.isin(rollouts.completion_ids_BT, torch.tensor(ids.vision)).any()
    assert rollouts.dropped == {}
    assert rollouts.completion_mask_BT.any()


def test_sampling_logprobs_are_those_of_the_scored_tokens(tiny, prompts):
    ids = read_token_ids(tiny.model, tiny.processor)
    for temperature in (1.0, 0.7):
        rollouts = HFEngine(ids).generate(tiny.model, prompts, SamplingConfig(18, temperature), seed=3)
        mask_BT = rollouts.completion_mask_BT
        with torch.no_grad():
            hidden_ND = score_side(tiny.model, prompts, rollouts, mask_BT, ids.pad)
            logits_NV = tiny.model.lm_head(hidden_ND) / temperature
        expected_N = logits_NV.log_softmax(-1).gather(1, rollouts.completion_ids_BT[mask_BT][:, None])[:, 0]
        torch.testing.assert_close(rollouts.sampling_logprobs_BT[mask_BT], expected_N, atol=2e-5, rtol=1e-5)


def test_left_and_right_padding_score_the_same_hidden_states(tiny, prompts):
    ids = read_token_ids(tiny.model, tiny.processor)
    rollouts = HFEngine(ids).generate(tiny.model, prompts, SamplingConfig(18), seed=1)
    mask_BT = rollouts.completion_mask_BT
    assert len({len(prompt.input_ids) for prompt in prompts}) > 1  # the padding is real
    with torch.no_grad():
        right_ND = score_side(tiny.model, prompts, rollouts, mask_BT, ids.pad)
        left = pad_prompts(prompts, ids.pad, torch.device("cpu"))
        width = left["input_ids"].shape[1]
        zeros_BT = torch.zeros_like(rollouts.completion_ids_BT)
        inputs = {
            **left,
            "input_ids": torch.cat([left["input_ids"], rollouts.completion_ids_BT], 1),
            "attention_mask": torch.cat([left["attention_mask"], mask_BT.long()], 1),
            "mm_token_type_ids": torch.cat([left["mm_token_type_ids"], zeros_BT], 1),
        }
        hidden_BLD = tiny.model.model(**inputs, use_cache=False).last_hidden_state
    left_ND = hidden_BLD[:, width - 1 : -1][mask_BT]
    torch.testing.assert_close(left_ND, right_ND, atol=2e-5, rtol=1e-4)


def test_seeded_draw_repeats_and_leaves_the_random_state_alone(tiny, prompts):
    engine = HFEngine(read_token_ids(tiny.model, tiny.processor))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = engine.generate(tiny.model, prompts, SamplingConfig(18, 2.0), seed=11)
    assert torch.equal(torch.rand(3), expected)
    second = engine.generate(tiny.model, prompts, SamplingConfig(18, 2.0), seed=11)
    other = engine.generate(tiny.model, prompts, SamplingConfig(18, 2.0), seed=12)
    assert torch.equal(first.completion_ids_BT, second.completion_ids_BT)
    assert first.completion_ids_BT.tolist() != other.completion_ids_BT.tolist()


@pytest.mark.parametrize(
    "defaults",
    [
        {"top_k": 1, "top_p": 0.1, "temperature": 0.01},
        {"min_p": 0.9},
        {"typical_p": 0.1},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 17},
        {"suppress_tokens": [22, 23, 24]},
        {"num_beams": 2},
        {"num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"repetition_penalty": 3.0},
    ],
    ids=lambda defaults: next(iter(defaults)),
)
def test_checkpoint_sampling_defaults_do_not_leak_into_rollouts(tiny, prompts, defaults):
    model = copy.deepcopy(tiny.model)
    engine = HFEngine(read_token_ids(model, tiny.processor))
    plain = engine.generate(model, prompts, SamplingConfig(18), seed=2)
    for name, value in defaults.items():
        setattr(model.generation_config, name, value)
    again = engine.generate(model, prompts, SamplingConfig(18), seed=2)
    assert torch.equal(plain.completion_ids_BT, again.completion_ids_BT)
    assert all(getattr(model.generation_config, name) == value for name, value in defaults.items())
