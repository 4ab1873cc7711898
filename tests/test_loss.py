"""The objective: every mode against its plain formula, and the identity that joins KL and policy gradient."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from plain_objective import compute_objective, project
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from imagine_opd.kernels import OutputHead
from imagine_opd.loss.objective import ObjectiveConfig, objective
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
    from imagine_opd.loss.objective import clip_policy_loss

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


# Every field that changes the loss, alone and together; heads with bias, scale and softcap.
MENU = {
    "full": {},
    "forward KL": {"distillation_alpha": 0.0},
    "JSD": {"distillation_alpha": 0.5},
    "skewed JSD": {"distillation_alpha": 0.1, "temperature": 0.7},
    "reverse KL clipped": {"distillation_kl_clip": 0.1, "temperature": 1.3},
    "forward KL clipped": {"distillation_alpha": 0.0, "distillation_kl_clip": 0.05},
    "JSD clipped": {"distillation_alpha": 0.5, "distillation_kl_clip": 0.2},
    "top 3": {"distillation_mode": "topk_tail", "distillation_topk": 3, "temperature": 0.8},
    "top 3 forward": {"distillation_mode": "topk_tail", "distillation_topk": 3, "distillation_alpha": 0.0},
    "top 3 JSD": {"distillation_mode": "topk_tail", "distillation_topk": 3, "distillation_alpha": 0.5},
    "top 3 clipped": {"distillation_mode": "topk_tail", "distillation_topk": 3, "distillation_kl_clip": 0.1},
    "importance ratio": {"distillation_is_clip": 2.0},
    "importance ratio, top 3": {"distillation_mode": "topk_tail", "distillation_topk": 3, "distillation_is_clip": 2.0},
    "clamped": {"loss_max_clamp": 4.0},
    "sampled": {"distillation_mode": "sampled_token"},
    "sampled, clamped": {"distillation_mode": "sampled_token", "log_ratio_clamp": 1.0, "temperature": 1.2},
    "sampled, log-prob floor": {"distillation_mode": "sampled_token", "log_prob_min_clamp": -6.0},
    "sampled, whitened": {"distillation_mode": "sampled_token", "whiten_advantages": True},
    "tilted": {"contrast_beta": 2.0},
    "tilted JSD, top 3": {"contrast_beta": 4.0, "distillation_mode": "topk_tail", "distillation_topk": 3}
    | {"distillation_alpha": 0.5},
    "tilted, sampled": {"contrast_beta": 1.0, "distillation_mode": "sampled_token"},
    "tilted, weighted": {"contrast_beta": 1.0, "contrast_token_weight": True, "temperature": 1.1},
    "weighted by evidence": {"contrast_beta": 0.0, "contrast_token_weight": True, "distillation_alpha": 0.5},
}


def make_head(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    if kind == "linear":
        return OutputHead(nn.Parameter(weight))
    return OutputHead(nn.Parameter(weight), nn.Parameter(bias), logit_scale=1.5, softcap=3.0)


def make_menu_scores(config, student_head, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher, neutral = (torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(3))
    ids = torch.randint(V, (N,), generator=generator)
    logprobs = (project(student, student_head) / config.temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    # Near the student's own: some ratios are clipped and some are not.
    sampling = logprobs.detach() + 0.5 * torch.randn(N, generator=generator, dtype=torch.float64)
    has_contrast = config.contrast_token_weight or config.contrast_beta != ObjectiveConfig().contrast_beta
    return Scores(
        student.requires_grad_(),
        teacher,
        ids,
        sampling,
        row_N=torch.tensor([0, 0, 0, 1, 1, 2]),
        position_N=torch.tensor([0, 1, 2, 0, 1, 0]),
        weights_N=torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.25], dtype=torch.float64),
        neutral_hidden_ND=neutral if has_contrast else None,
        advantages_N=torch.randn(N, generator=generator, dtype=torch.float64) if config.shapes_advantages else None,
    )


@pytest.mark.parametrize("kind", ["linear", "softcap"])
@pytest.mark.parametrize("fields", MENU.values(), ids=MENU)
def test_every_mode_equals_its_plain_formula_in_value_and_gradient(fields, kind):
    config = ObjectiveConfig(**fields)
    heads = make_head(kind, 1), make_head(kind, 2)
    found = []
    for run in ("plain", "objective"):
        scores = make_menu_scores(config, heads[0])
        if run == "plain":
            loss_N = compute_objective(scores, *heads, config)
            loss = loss_N.sum()
        else:
            result = objective(scores, *heads, config)
            loss_N, loss = result.loss_N, result.loss_sum
        inputs = [scores.student_hidden_ND, heads[0].weight_VD]
        inputs += [] if heads[0].bias_V is None else [heads[0].bias_V]
        found.append([loss_N.detach(), *torch.autograd.grad(loss, inputs)])
    assert float(found[0][1].abs().max()) > 1e-3
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("fields", [{}, {"distillation_mode": "sampled_token"}, {"distillation_kl_clip": 0.1}])
def test_distillation_loss_is_each_tokens_own_without_weights_rewards_and_unlikelihood(fields):
    config = ObjectiveConfig(**fields)
    heads = make_head("softcap", 1), make_head("softcap", 2)
    plain = dataclasses.replace(make_menu_scores(config, heads[0]), weights_N=None)
    mixed = dataclasses.replace(
        make_menu_scores(config, heads[0]),
        distill_N=torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 1.0]),
        reward_advantages_N=torch.tensor([0.5, 0.5, 0.5, -1.0, -1.0, 2.0]),
        leaked_N=torch.tensor([False, True, False, False, True, True]),
    )
    expected = compute_objective(plain, *heads, config).detach()
    expected[2:5] = 0.0  # one without weight, and the completion that the teacher has no share in
    found = objective(mixed, *heads, config)
    torch.testing.assert_close(found.distillation_loss_N, expected, atol=1e-10, rtol=1e-9)
    assert float((found.loss_N - mixed.weights_N * expected).abs().max()) > 1e-2


@pytest.mark.parametrize("fields", MENU.values(), ids=MENU)
def test_each_mode_of_no_tokens_is_exactly_zero_and_attached(fields):
    config = ObjectiveConfig(**fields)
    heads = make_head("softcap", 1), make_head("softcap", 2)
    whole = make_menu_scores(config, heads[0])
    parts = {item.name: getattr(whole, item.name) for item in dataclasses.fields(whole)}
    empty = Scores(**{name: None if part is None else part[:0] for name, part in parts.items()})
    result = objective(empty, *heads, config)
    hidden, weight = torch.autograd.grad(result.loss_sum, [whole.student_hidden_ND, heads[0].weight_VD])
    assert result.loss_sum.item() == 0.0
    assert not hidden.any()
    assert not weight.any()


def test_tokens_of_weight_zero_leave_no_trace():
    heads = make_head("linear", 1), make_head("linear", 2)
    for fields in ({}, {"distillation_kl_clip": 0.1}, {"distillation_mode": "sampled_token"}):
        config = ObjectiveConfig(**fields)
        clean, dirty = make_menu_scores(config, heads[0]), make_menu_scores(config, heads[0])
        with torch.no_grad():
            dirty.student_hidden_ND[2] = 7.0  # the token of weight 0
        losses = [objective(scores, *heads, config).loss_sum for scores in (clean, dirty)]
        gradients = [
            torch.autograd.grad(loss, [scores.student_hidden_ND, heads[0].weight_VD])
            for loss, scores in zip(losses, (clean, dirty), strict=True)
        ]
        assert float(losses[0].detach()) == float(losses[1].detach())
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_equal_sides_give_a_loss_and_gradient_of_exactly_zero():
    head = make_head("linear", 1)
    for fields in ({}, {"distillation_kl_clip": 0.1}, {"distillation_mode": "topk_tail", "distillation_topk": 3}):
        for alpha in (0.0, 0.5, 1.0):
            config = ObjectiveConfig(**fields, distillation_alpha=alpha)
            scores = make_menu_scores(config, head)
            scores = dataclasses.replace(scores, teacher_hidden_ND=scores.student_hidden_ND.detach().clone())
            result = objective(scores, head, head, config)
            (gradient,) = torch.autograd.grad(result.loss_sum, [scores.student_hidden_ND])
            assert abs(float(result.loss_sum.detach())) < 1e-14
            assert float(gradient.abs().max()) < 1e-14


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("fields", [{"distillation_kl_clip": 0.1}, {"distillation_mode": "topk_tail"}])
def test_the_plain_path_never_holds_all_logits_either(fields):
    rows, vocabulary = 1024, 20_000
    heads = [nn.Linear(D, vocabulary, bias=False) for _ in range(2)]
    ids = torch.randint(vocabulary, (rows,))
    scores = Scores(torch.randn(rows, D).requires_grad_(), torch.randn(rows, D), ids, torch.zeros(rows), ids, ids)
    with LargestTensor() as largest:
        objective(scores, *heads, ObjectiveConfig(**fields)).loss_sum.backward()
    assert vocabulary <= largest.elements <= rows * vocabulary / 4
