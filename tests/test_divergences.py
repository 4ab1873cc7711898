"""Divergences: continuous in alpha, bounded by the exact one where coarse, excluded tokens as in the kernels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from plain_objective import compute_divergence as compute_plain

from imagine_opd.kernels import token_stats
from imagine_opd.kernels.types import LOWEST
from imagine_opd.loss.divergences import Divergence, choose_stats_options, compute_divergence, read_divergence

C, V = 5, 9


def make_logits(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(C, V, generator=generator, dtype=torch.float64) for _ in range(2)]


def measure(student, teacher, **fields):
    return compute_divergence(student.log_softmax(-1), teacher.log_softmax(-1), Divergence(**fields))[:2]


def test_alpha_names_the_direction_by_hand():
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.25, 0.25, 0.5]])
    found = {alpha: float(measure(p.log(), q.log(), alpha=alpha)[0]) for alpha in (0.0, 0.5, 1.0)}
    reverse = 0.7 * math.log(0.7 / 0.25) + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 0.5)
    forward = 0.25 * math.log(0.25 / 0.7) + 0.25 * math.log(0.25 / 0.2) + 0.5 * math.log(0.5 / 0.1)
    jsd = sum(
        0.5 * a * math.log(a / (0.5 * (a + b))) + 0.5 * b * math.log(b / (0.5 * (a + b)))
        for a, b in zip((0.7, 0.2, 0.1), (0.25, 0.25, 0.5), strict=True)
    )
    assert found == pytest.approx({1.0: reverse, 0.0: forward, 0.5: 4 * jsd}, rel=1e-6)


@pytest.mark.parametrize(("end", "near"), [(0.0, 1e-5), (1.0, 1.0 - 1e-5)])
def test_value_and_gradient_have_no_jump_at_the_ends(end, near):
    student, teacher = make_logits()
    for one, other in zip(measure(student, teacher, alpha=end), measure(student, teacher, alpha=near), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_all_alphas_agree_where_the_sides_nearly_do():
    student, other = make_logits()
    teacher = student + 1e-3 * other
    values = [measure(student, teacher, alpha=alpha)[0] for alpha in (0.0, 0.1, 0.5, 0.9, 1.0)]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=5e-3, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_kernels_statistic_is_the_same_divergence(alpha):
    student, teacher = make_logits()
    stats = token_stats(student, teacher, torch.zeros(C, dtype=torch.long), options=choose_stats_options(alpha))
    torch.testing.assert_close(read_divergence(stats, alpha), measure(student, teacher, alpha=alpha)[0])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_coarse_divergence_is_a_lower_bound_that_grows_with_k_to_the_exact_one(alpha):
    student, teacher = make_logits(scale=2.0)
    values = [measure(student, teacher, alpha=alpha, topk=k)[0] for k in range(1, V + 1)]
    for coarse, fine in itertools.pairwise(values):
        assert bool((coarse <= fine + 1e-12).all())
    assert float(values[0].min()) > 0
    exact = measure(student, teacher, alpha=alpha)
    for one, other in zip(measure(student, teacher, alpha=alpha, topk=V + 5), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("topk", [1, 3, V + 5])
def test_both_sides_masses_are_those_of_the_students_likeliest_tokens(topk):
    p, q = (side.softmax(-1) for side in make_logits(scale=2.0))
    found = compute_divergence(p.log(), q.log(), Divergence(topk=topk))
    chosen = p.argsort(dim=1, descending=True)[:, :topk]
    torch.testing.assert_close(found.student_mass_C, p.gather(1, chosen).sum(1))
    torch.testing.assert_close(found.teacher_mass_C, q.gather(1, chosen).sum(1))


def test_the_truncated_sum_that_is_refused_can_be_negative():
    student = torch.tensor([[0.6, 0.2, 0.1, 0.1]]).log()
    teacher = torch.tensor([[0.7, 0.25, 0.04, 0.01]]).log()
    entries = student.exp() * (student - teacher)
    assert float(entries[:, :2].sum()) < 0 < float(measure(student, teacher, topk=2)[0])


def test_a_clip_above_every_entry_changes_nothing_and_one_below_bounds_the_sum():
    student, teacher = make_logits()
    for one, other in zip(measure(student, teacher, kl_clip=100.0), measure(student, teacher), strict=True):
        torch.testing.assert_close(one, other)
    value, gradient = measure(student, teacher, kl_clip=0.01)
    torch.testing.assert_close(value, compute_plain(student.log_softmax(-1), teacher.log_softmax(-1), kl_clip=0.01))
    assert float(value.max()) <= 0.01 * V
    assert float(gradient.sum(1).abs().max()) < 1e-14  # a shift of all logits changes nothing


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_excluded_tokens_count_as_in_the_kernels(alpha):
    student, teacher = make_logits()
    student[0, 1] = -math.inf  # the student alone
    teacher[1, 2] = -math.inf  # the teacher alone
    student[2, 3] = teacher[2, 3] = -math.inf  # both
    leaf = student.clone().requires_grad_()
    stats = token_stats(leaf, teacher, torch.zeros(C, dtype=torch.long), options=choose_stats_options(alpha))
    expected = read_divergence(stats, alpha)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    sides = [side.log_softmax(-1).clamp(min=LOWEST) for side in (student, teacher)]
    for topk in (None, V):
        found = compute_divergence(*sides, Divergence(alpha, topk))
        torch.testing.assert_close(found[0], expected.detach())
        torch.testing.assert_close(found[1], gradient)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_tail_without_probability_gives_finite_gradients(alpha):
    student, teacher = (torch.full((2, V), -300.0), torch.full((2, V), -300.0))
    student[:, 0] = student[:, 1] = teacher[:, 1] = 0.0
    teacher[1, 5] = 0.0
    student[:, 4] = -math.inf
    sides = [side.log_softmax(-1).clamp(min=LOWEST) for side in (student, teacher)]
    value, gradient, *_ = compute_divergence(*sides, Divergence(alpha, topk=2))
    exact, exact_gradient, *_ = compute_divergence(*[side.double() for side in sides], Divergence(alpha))
    assert bool(gradient.isfinite().all())
    torch.testing.assert_close(value.double()[0], exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double()[0], exact_gradient[0], rtol=1e-5, atol=1e-5)
