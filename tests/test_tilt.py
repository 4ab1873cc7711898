"""The contrast in the loss: the tilted target by the formula, and token weights that keep each completion's sum."""

from __future__ import annotations

import pytest
import torch
from plain_objective import project

from imagine_opd.kernels import OutputHead
from imagine_opd.loss.advantages import measure_advantages
from imagine_opd.loss.objective import ObjectiveConfig
from imagine_opd.loss.tilt import measure_target_logprobs, tilt_target, weigh_evidence

N, D, V = 6, 8, 11


def make_inputs(softcap=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    teacher, neutral = (torch.randn(N, D, generator=generator, dtype=dtype) for _ in range(2))
    weight, bias = torch.randn(V, D, generator=generator, dtype=dtype), torch.randn(V, generator=generator, dtype=dtype)
    ids = torch.randint(V, (N,), generator=generator)
    return teacher, neutral, OutputHead(weight, bias, logit_scale=0.7, softcap=softcap), ids


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_target_is_proportional_to_p_times_the_evidence_ratio(softcap, beta):
    teacher, neutral, head, ids = make_inputs(softcap)
    config = ObjectiveConfig(contrast_beta=beta, temperature=1.3)
    found = measure_target_logprobs(teacher, head, ids, config, neutral)
    plus, zero = ((project(h, head) / 1.3).softmax(-1) for h in (teacher, neutral))
    target = plus * (plus / zero) ** beta
    expected = (target / target.sum(-1, keepdim=True)).gather(1, ids[:, None])[:, 0].log()
    torch.testing.assert_close(found, expected)
    sampling = torch.full((N,), -1.0, dtype=torch.float64)
    advantages = measure_advantages(teacher, head, ids, sampling, config, neutral)
    torch.testing.assert_close(advantages, expected + 1.0)


def test_bf16_states_are_tilted_in_fp32():
    teacher, neutral, head, _ = make_inputs(dtype=torch.bfloat16)
    close = teacher + 0.01 * neutral
    found, tilt = tilt_target(teacher, close, head, 4.0)
    assert tilt is None
    expected = teacher.float() + 4.0 * (teacher.float() - close.float())
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)


def test_without_a_neutral_pass_the_target_is_the_teacher_itself():
    teacher, _, head, _ = make_inputs()
    found, tilt = tilt_target(teacher, None, head, 4.0)
    assert found is teacher
    assert tilt is None


def test_evidence_weights_keep_each_completions_sum_and_follow_the_gain():
    teacher, neutral, head, ids = make_inputs()
    rows, weights = torch.tensor([4, 4, 4, 7, 7, 7]), torch.tensor([1.0, 2.0, 1.0, 0.5, 0.5, 0.0])
    weights = weights.double()
    found = weigh_evidence(teacher, neutral, head, ids, rows, weights, ObjectiveConfig())
    for row in (4, 7):
        torch.testing.assert_close(found[rows == row].sum(), weights[rows == row].sum())
    plus, zero = (project(h, head).log_softmax(-1).gather(1, ids[:, None])[:, 0] for h in (teacher, neutral))
    gain = (plus - zero).clamp(min=0) + 0.01
    ratio = found[:3] / weights[:3] / gain[:3]
    torch.testing.assert_close(ratio, ratio[:1].expand(3))
    assert float(found[5]) == 0.0


def test_evidence_weights_do_not_depend_on_what_is_batched_with_a_completion():
    teacher, neutral, head, ids = make_inputs()
    rows, weights = torch.tensor([0, 0, 0, 1, 1, 1]), torch.ones(N, dtype=torch.float64)
    whole = weigh_evidence(teacher, neutral, head, ids, rows, weights, ObjectiveConfig())
    part = weigh_evidence(teacher[3:], neutral[3:], head, ids[3:], rows[3:], weights[3:], ObjectiveConfig())
    torch.testing.assert_close(whole[3:], part)


def test_evidence_that_changes_nothing_weighs_tokens_alike():
    teacher, _, head, ids = make_inputs()
    weights = torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    found = weigh_evidence(teacher, teacher.clone(), head, ids, torch.zeros(N).long(), weights, ObjectiveConfig())
    torch.testing.assert_close(found, weights)
