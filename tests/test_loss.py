"""The objective: exact KL, the clipped policy gradient, and the identity that joins them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from imagine_opd.loss import ObjectiveConfig, objective
from imagine_opd.types import Scores

N, D, V = 6, 8, 11


def make_heads(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    heads = []
    for _ in range(2):
        head = nn.Linear(D, V, bias=False, dtype=dtype)
        head.weight.data = torch.randn(V, D, generator=generator, dtype=dtype)
        heads.append(head)
    return heads


def make_scores(token_ids=None, sampling=None, hidden=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(N, D, generator=generator, dtype=dtype) if hidden is None else hidden
    teacher = torch.randn(N, D, generator=generator, dtype=dtype)
    ids = torch.randint(V, (N,), generator=generator) if token_ids is None else token_ids
    sampling = torch.full((N,), -2.0) if sampling is None else sampling
    return Scores(student.requires_grad_(), teacher, ids, sampling, torch.zeros(N), torch.arange(N))


def test_full_mode_is_the_kl_from_student_to_teacher():
    student_head, teacher_head = make_heads(torch.float32)
    scores = make_scores()
    result = objective(scores, student_head, teacher_head, ObjectiveConfig(temperature=1.5))
    log_p = (student_head(scores.student_hidden_ND) / 1.5).log_softmax(-1)
    log_q = (teacher_head(scores.teacher_hidden_ND) / 1.5).log_softmax(-1)
    torch.testing.assert_close(result.loss_N, (log_p.exp() * (log_p - log_q)).sum(-1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(result.loss_sum, result.loss_N.sum())


def test_full_gradient_is_the_expectation_of_the_sampled_token_gradient():
    student_head, teacher_head = make_heads(torch.float32)
    base = make_scores().student_hidden_ND.detach()

    def gradient(mode, token_ids, baseline="none"):
        hidden = base.clone().requires_grad_()
        logprobs = student_head(base).log_softmax(-1).detach()
        sampling = logprobs.gather(1, token_ids[:, None])[:, 0]
        scores = make_scores(token_ids, sampling, hidden)
        config = ObjectiveConfig(distillation_mode=mode, advantage_baseline=baseline)
        objective(scores, student_head, teacher_head, config).loss_sum.backward()
        return hidden.grad

    probabilities = student_head(base).softmax(-1).detach()
    exact = gradient("full", torch.zeros(N, dtype=torch.long))
    for baseline in ("none", "expected"):
        draws = [gradient("sampled_token", torch.full((N,), token), baseline) for token in range(V)]
        expected = sum(p[:, None] * g for p, g in zip(probabilities.T, draws, strict=True))
        torch.testing.assert_close(expected, exact, atol=1e-5, rtol=1e-4)
        assert max(float((draw - exact).abs().max()) for draw in draws) > 0.1


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "has_gradient"),
    [
        (1.0, 2.0, -2.0, True),
        (1.5, 2.0, -1.3 * 2.0, False),  # clipped above: no reward for going further
        (0.5, 2.0, -0.5 * 2.0, True),
        (1.5, -2.0, 1.5 * 2.0, True),
        (0.5, -2.0, 0.8 * 2.0, False),  # clipped below
        (5.0, -2.0, 3.0 * 2.0, False),  # dual clip bounds the loss of a bad token
    ],
)
def test_policy_loss_clips_as_ppo_with_dual_clip(ratio, advantage, loss, has_gradient):
    from imagine_opd.kernels import TokenStats
    from imagine_opd.loss import clip_policy_loss

    old = torch.tensor([-1.0])
    student = (old + torch.tensor([ratio]).log()).requires_grad_()
    zero = torch.zeros(1)
    stats = TokenStats(student, old + advantage, zero, zero)
    value = clip_policy_loss(stats, old, ObjectiveConfig(distillation_mode="sampled_token"))
    assert float(value.detach()) == pytest.approx(loss, rel=1e-5)
    value.sum().backward()
    assert (abs(float(student.grad)) > 0) is has_gradient


def test_logits_are_fp32_even_from_bf16_weights_under_autocast():
    student_head, teacher_head = make_heads(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.bfloat16)
    scores = make_scores(hidden=hidden, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = objective(scores, student_head, teacher_head, ObjectiveConfig())
    log_p = (hidden.double() @ student_head.weight.double().T).log_softmax(-1)
    log_q = (scores.teacher_hidden_ND.double() @ teacher_head.weight.double().T).log_softmax(-1)
    exact = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(result.loss_N.double(), exact, atol=1e-5, rtol=1e-5)  # bf16 logits: off by 1e-2


def test_no_tokens_give_a_zero_loss_that_is_still_attached():
    student_head, teacher_head = make_heads(torch.float32)
    empty = torch.zeros(0)
    scores = Scores(torch.zeros(0, D).requires_grad_(), torch.zeros(0, D), empty.long(), empty, empty, empty)
    result = objective(scores, student_head, teacher_head, ObjectiveConfig())
    result.loss_sum.backward()
    assert result.loss_sum.item() == 0.0
    assert not student_head.weight.grad.any()


def test_objective_never_holds_all_logits(monkeypatch):
    rows, vocabulary = 4096, 20_000
    heads = [nn.Linear(D, vocabulary, bias=False) for _ in range(2)]
    largest = []
    for name in ("empty", "zeros"):
        allocate = getattr(torch, name)

        def note(*args, allocate=allocate, **kwargs):
            largest.append(allocate(*args, **kwargs))
            return largest[-1]

        monkeypatch.setattr(torch, name, note)
    hidden = torch.randn(rows, D)
    ids = torch.randint(vocabulary, (rows,))
    scores = Scores(hidden.requires_grad_(), torch.randn(rows, D), ids, torch.zeros(rows), ids, ids)
    objective(scores, *heads, ObjectiveConfig()).loss_sum.backward()
    assert largest
    assert max(tensor.numel() for tensor in largest) <= rows * vocabulary / 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are compiled; tests/gpu covers them")
@pytest.mark.parametrize("mode", ["full", "sampled_token"])
def test_fused_objective_equals_the_plain_one(mode):
    student_head, teacher_head = make_heads(torch.float32)
    results = {}
    for backend in ("reference", "triton"):
        scores = make_scores()
        config = ObjectiveConfig(distillation_mode=mode, kernel_backend=backend, temperature=0.8)
        with np.errstate(all="ignore"):  # the interpreter computes with numpy, where an inf warns
            result = objective(scores, student_head, teacher_head, config)
            result.loss_sum.backward()
        results[backend] = (result.loss_N.detach(), scores.student_hidden_ND.grad, student_head.weight.grad.clone())
        student_head.zero_grad()
    for plain, fused in zip(results["reference"], results["triton"], strict=True):
        torch.testing.assert_close(fused, plain, atol=2e-5, rtol=1e-4)
