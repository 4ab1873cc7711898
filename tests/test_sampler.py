"""Drawing: right frequencies, one completion's draw independent of its batch, log-probs of what was drawn."""

from __future__ import annotations

import pytest
import torch

from imagine_opd.config.rollout import SHAPING_KWARGS
from imagine_opd.models.access import read_token_ids
from imagine_opd.prompts import build_prompt
from imagine_opd.rollout import HFEngine, SamplingConfig
from imagine_opd.rollout.sampler import SHAPING_KEYS, SeededSampler, draw_uniforms, mix_seed, pick_tokens
from imagine_opd.teacher.checks import measure_rollout_drift
from imagine_opd.views import make_views


def make_sampler(sampling: SamplingConfig, uniforms_BT: torch.Tensor | None) -> SeededSampler:
    return SeededSampler((), (), sampling, uniforms_BT, torch.device("cpu"))


def test_tokens_come_as_often_as_their_probability():
    scores_V = torch.tensor([1.0, -torch.inf, 0.0, 2.0, -1.0, -torch.inf])
    uniforms = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    picked = pick_tokens(scores_V.expand(len(uniforms), -1), uniforms)
    shares = torch.bincount(picked, minlength=6) / len(uniforms)
    torch.testing.assert_close(shares, scores_V.softmax(0), atol=2e-5, rtol=0)


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_ends_of_the_interval_never_pick_an_excluded_token(number):
    scores_V = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    assert int(pick_tokens(scores_V, torch.tensor([number], dtype=torch.float64))) in (1, 3)
    thin_V = torch.full((1, 152_000), -20.0)
    assert int(pick_tokens(thin_V, torch.tensor([number], dtype=torch.float64))) == pytest.approx(
        152_000 * number, abs=1
    )


def test_row_draws_from_its_own_seed_alone():
    alone = draw_uniforms([7], 1, 5)
    among = draw_uniforms([3, 7, 9], 3, 5)
    assert torch.equal(alone[0], among[1])
    assert torch.equal(draw_uniforms(4, 3, 5)[:2], draw_uniforms(4, 2, 5))
    assert (
        len({mix_seed(seed, step, row) % 2**32 for seed in range(4) for step in range(100) for row in range(64)})
        == 25_600
    )


def test_top_k_top_p_and_min_p_leave_the_tokens_they_should_and_the_logprob_as_it_is():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    numbers = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    for fields, allowed in (
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0}),
        ({"min_p": 0.2}, {0, 1}),
        ({}, {0, 1, 2, 3}),
    ):
        seen = set()
        for number in numbers:
            sampler = make_sampler(SamplingConfig(1, 1.0, **fields), number.reshape(1, 1))
            picked = int(sampler(torch.zeros(1, 1, dtype=torch.long), scores).argmax())
            seen.add(picked)
            expected = float(scores.log_softmax(1)[0, picked])
            assert float(sampler.logprobs[0]) == pytest.approx(expected, abs=1e-6)
        assert seen == allowed


def test_sampling_fields_in_generation_kwargs_are_applied():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    sampling = SamplingConfig(1, 1.0, generation_kwargs={"epsilon_cutoff": 0.1})
    last = torch.tensor([[0.999]], dtype=torch.float64)
    assert int(make_sampler(sampling, last)(torch.zeros(1, 1, dtype=torch.long), scores).argmax()) == 1
    assert int(make_sampler(SamplingConfig(1), last)(torch.zeros(1, 1, dtype=torch.long), scores).argmax()) == 3


SHAPED = (
    SamplingConfig(18, 1.5, repetition_penalty=1.4),
    SamplingConfig(18, 1.5, generation_kwargs={"no_repeat_ngram_size": 2}),
    SamplingConfig(18, 1.5, generation_kwargs={"min_new_tokens": 18}),
    SamplingConfig(18, 1.5, generation_kwargs={"suppress_tokens": [22, 23, 24, 25]}),
    SamplingConfig(18, 1.5, generation_kwargs={"typical_p": 0.5}),
)


@pytest.mark.parametrize("sampling", SHAPED, ids=["penalty", "ngrams", "least length", "suppressed", "typical"])
def test_whatever_shapes_the_draw_the_log_prob_is_the_one_that_is_scored(tiny, make_rows, sampling):
    rows = make_rows(4)
    prompts = [
        build_prompt(row, views.student, tiny.processor, "{question}")
        for row, views in zip(rows, make_views(rows, tiny.view_config), strict=True)
    ]
    engine = HFEngine(read_token_ids(tiny.model, tiny.processor))
    assert measure_rollout_drift(tiny.model, prompts, engine, sampling, 3) < 1e-4
    plain, shaped = (
        engine.generate(tiny.model, prompts, each, 3).completion_ids_BT.tolist()
        for each in (SamplingConfig(18, 1.5), sampling)
    )
    assert plain != shaped


def test_config_and_sampler_know_the_same_shaping_fields():
    assert SHAPING_KEYS - {"top_k", "top_p", "min_p"} == SHAPING_KWARGS
    assert [name for name in sorted(SHAPING_KWARGS) if not is_applied(name)] == []


def is_applied(name: str) -> bool:
    """Whether the field changes which token is drawn from these scores."""
    value = {
        "typical_p": 0.05,
        "epsilon_cutoff": 0.9,
        "eta_cutoff": 0.9,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 1,
        "suppress_tokens": [3],
    }[name]
    ids, scores = torch.tensor([[3]]), torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    last = torch.tensor([[1 - 2**-53]], dtype=torch.float64)
    sampling = SamplingConfig(1, 1.0, generation_kwargs={name: value})
    sampler = SeededSampler((), (3,), sampling, last, torch.device("cpu"))
    return int(sampler(ids, scores).argmax()) != 3


def test_completion_does_not_depend_on_the_batch_around_it(tiny, make_rows):
    rows = make_rows(5)
    prompts = [
        build_prompt(row, views.teacher if i % 2 else views.student, tiny.processor, "{question}")
        for i, (row, views) in enumerate(zip(rows, make_views(rows, tiny.view_config), strict=True))
    ]
    engine = HFEngine(read_token_ids(tiny.model, tiny.processor))
    sampling, seeds = SamplingConfig(18, 2.0), [11, 12, 13, 14, 15]
    whole = engine.generate(tiny.model, prompts, sampling, seeds)
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = engine.generate(tiny.model, [prompt], sampling, [seed])
        length = int(alone.completion_mask_BT.sum())
        mask_T = whole.completion_mask_BT[index]
        assert whole.completion_ids_BT[index][mask_T].tolist() == alone.completion_ids_BT[0, :length].tolist()
        torch.testing.assert_close(
            whole.sampling_logprobs_BT[index][mask_T], alone.sampling_logprobs_BT[0, :length], atol=2e-5, rtol=1e-5
        )
