"""What `token_stats` does beside its defaults: other divergences and temperatures, excluded tokens, masks.

Everything against the formula in fp64 under autograd, for both implementations.
"""

# N kept tokens, V vocabulary

import math

import pytest
import torch
from kernel_cases import DEVICE, TOLERANCE, Case, make_case, measure_error
from option_cases import BETA, EVERY, FIELDS, run, weigh
from torch import Tensor

from imagine_opd.kernels import StatsOptions, TokenStats, token_stats
from imagine_opd.kernels.reference import naive_token_stats

INF, NAN = math.inf, math.nan
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def logits(*rows: list[float], dtype: torch.dtype = FP32) -> Tensor:
    return torch.tensor(rows, dtype=dtype, device=DEVICE)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def run_formula(case: Case, options: StatsOptions, use: tuple[str, ...]):
    """The same by the textbook formulas in fp64."""
    student_NV = case.student_NV.detach().double().requires_grad_()
    logp_NV = torch.log_softmax(student_NV / case.temperature, 1)
    teacher_temperature = options.teacher_temperature or case.temperature
    logq_NV = torch.log_softmax(case.teacher_NV.double() / teacher_temperature, 1)
    p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
    log_mixture_NV = (BETA * q_NV + (1 - BETA) * p_NV).log()
    stats = TokenStats(
        student_logprob_N=logp_NV.gather(1, case.token_ids_N[:, None])[:, 0],
        teacher_logprob_N=logq_NV.gather(1, case.token_ids_N[:, None])[:, 0],
        reverse_kl_N=(p_NV * (logp_NV - logq_NV)).sum(1),
        entropy_N=-(p_NV * logp_NV).sum(1),
        forward_kl_N=(q_NV * (logq_NV - logp_NV)).sum(1),
        jsd_N=(BETA * q_NV * (logq_NV - log_mixture_NV) + (1 - BETA) * p_NV * (logp_NV - log_mixture_NV)).sum(1),
    )
    weigh(stats, use, case.weights_3N[0]).backward()
    return stats, student_NV.grad


def assert_matches_formula(case: Case, backend: str, options: StatsOptions, use: tuple[str, ...]) -> None:
    (stats, grad_NV), (true_stats, true_grad_NV) = run(case, backend, options, use), run_formula(case, options, use)
    scale = max(1.0, 1.0 / case.temperature)
    for name in (*FIELDS, "teacher_logprob_N"):
        if (value_N := getattr(stats, name)) is not None:
            truth_N = getattr(true_stats, name).detach()
            assert measure_error(value_N.detach(), truth_N) <= 4 * TOLERANCE[FP32] * scale, name
    assert measure_error(grad_NV, true_grad_NV) <= 4 * TOLERANCE[case.student_NV.dtype] * scale


# Other divergences and temperatures


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("use", [*((name,) for name in FIELDS), FIELDS], ids=[*FIELDS, "all"])
def test_every_divergence_alone_and_together(use: tuple[str, ...], backend: str) -> None:
    assert_matches_formula(make_case(7, 1003), backend, EVERY, use)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_divergence_from_half_precision_logits(dtype: torch.dtype, backend: str) -> None:
    assert_matches_formula(make_case(7, 300, dtype, dtype), backend, EVERY, FIELDS)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 2.0, 100.0])
def test_temperatures_far_from_one(temperature: float, backend: str) -> None:
    case = make_case(7, 300, temperature=temperature, scale=3.0 * temperature)
    assert_matches_formula(case, backend, EVERY, FIELDS)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("student", "teacher"), [(1.0, 2.0), (0.7, 0.5)])
def test_the_teacher_may_have_its_own_temperature(student: float, teacher: float, backend: str) -> None:
    options = StatsOptions(teacher_temperature=teacher, forward_kl=True, jsd_beta=BETA, exact_kl=True)
    assert_matches_formula(make_case(7, 300, temperature=student), backend, options, FIELDS)


def test_directions_and_mixture_by_hand(backend: str) -> None:
    # p = (1/2, 1/4, 1/4), q = (1/8, 1/8, 3/4)
    student_NV, teacher_NV = logits([0.5, 0.25, 0.25]).log(), logits([0.125, 0.125, 0.75]).log()
    options = StatsOptions(forward_kl=True, jsd_beta=0.5)
    stats = token_stats(student_NV, teacher_NV, ids(2), backend=backend, options=options)
    assert stats.reverse_kl_N.item() == pytest.approx(1.25 * math.log(2) - 0.25 * math.log(3), abs=1e-6)
    assert stats.forward_kl_N.item() == pytest.approx(0.75 * math.log(3) - 0.375 * math.log(2), abs=1e-6)
    mixture = (0.3125, 0.1875, 0.5)
    to_mixture = [
        sum(x * math.log(x / m) for x, m in zip(side, mixture, strict=True))
        for side in ((0.5, 0.25, 0.25), (0.125, 0.125, 0.75))
    ]
    assert stats.jsd_N.item() == pytest.approx(sum(to_mixture) / 2, abs=1e-6)


@pytest.mark.parametrize(("beta", "limit"), [(1e-4, "forward_kl_N"), (1 - 1e-4, "reverse_kl_N")])
def test_scaled_jsd_tends_to_the_kls_at_its_ends(beta: float, limit: str, backend: str) -> None:
    case = make_case(7, 129, FP64 if backend == "reference" else FP32, scale=1.0)
    options = StatsOptions(forward_kl=True, jsd_beta=beta)
    stats = token_stats(case.student_NV, case.teacher_NV, case.token_ids_N, backend=backend, options=options)
    scaled_N = stats.jsd_N / (beta * (1 - beta))
    torch.testing.assert_close(scaled_N.double(), getattr(stats, limit).double(), rtol=5e-3, atol=2e-3)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("step", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_exact_kl_is_right_to_1e_9_near_zero(step: float, backend: str) -> None:
    case = make_case(7, 1003)
    student_NV, teacher_NV = case.student_NV, case.student_NV + step * case.teacher_NV
    stats = token_stats(student_NV, teacher_NV, case.token_ids_N, backend=backend, options=StatsOptions(exact_kl=True))
    truth_N = naive_token_stats(student_NV.double(), teacher_NV.double(), case.token_ids_N)[2]
    assert stats.reverse_kl_N.min() >= 0
    assert (stats.reverse_kl_N.double() - truth_N).abs().max() <= 1e-9 + 1e-5 * truth_N.max()


def test_usual_kl_is_never_negative(backend: str) -> None:
    case = make_case(7, 1003)
    stats = token_stats(case.student_NV, case.student_NV + 1e-6 * case.teacher_NV, case.token_ids_N, backend=backend)
    assert stats.reverse_kl_N.min() >= 0


# Tokens that one side excludes

DEAD_RATIO = {"clamp": 30.0, "drop": 0.0, "inf": INF}
POLICY_CASES = [(StatsOptions(missing=missing, forward_kl=True), missing) for missing in ("clamp", "drop", "inf")]


@pytest.mark.parametrize("mask_value", [-INF, torch.finfo(FP32).min], ids=["inf", "lowest_float"])
@pytest.mark.parametrize(("options", "missing"), POLICY_CASES, ids=[name for _, name in POLICY_CASES])
@pytest.mark.usefixtures("small_tiles")
def test_tokens_that_the_teacher_excludes(options: StatsOptions, missing: str, mask_value: float, backend: str) -> None:
    case = make_case(4, 300)
    dead = torch.zeros(4, 300, dtype=torch.bool, device=DEVICE)
    dead[1, 5:9], dead[2, 100:290] = True, True
    teacher_NV = case.teacher_NV.masked_fill(dead, mask_value)
    student_NV = case.student_NV.clone().requires_grad_()
    stats = token_stats(student_NV, teacher_NV, case.token_ids_N * 0, backend=backend, options=options)
    (grad_NV,) = torch.autograd.grad(stats.reverse_kl_N[[0, 1, 2, 3]].sum(), student_NV)

    wide_NV = case.student_NV.double().requires_grad_()
    logp_NV = wide_NV.log_softmax(1)
    logq_NV = teacher_NV.double().log_softmax(1)
    mass_N = torch.where(dead, logp_NV.exp(), 0.0).sum(1)
    if missing == "drop":
        logp_NV = logp_NV - torch.log1p(-mass_N)[:, None]
    ratio_NV = torch.where(dead, DEAD_RATIO[missing], logp_NV - logq_NV.masked_fill(dead, 0.0))
    kl_N = (logp_NV.exp() * ratio_NV).sum(1)
    torch.testing.assert_close(stats.missing_mass_N.double(), mass_N.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(stats.reverse_kl_N.detach().double(), kl_N.detach(), rtol=1e-5, atol=1e-5)
    if missing == "inf":
        assert stats.reverse_kl_N.isinf().tolist() == [False, True, True, False]
        assert grad_NV.isnan().all(1).tolist() == [False, True, True, False]
        assert grad_NV[[0, 3]].isfinite().all()
    else:
        (true_grad_NV,) = torch.autograd.grad(kl_N.sum(), wide_NV)
        torch.testing.assert_close(grad_NV.double(), true_grad_NV, rtol=1e-4, atol=1e-6)
        if missing == "drop":
            assert not grad_NV[dead].any()


@pytest.mark.parametrize(("options", "missing"), POLICY_CASES, ids=[name for _, name in POLICY_CASES])
def test_tokens_that_the_student_excludes_count_in_the_forward_kl(
    options: StatsOptions, missing: str, backend: str
) -> None:
    case = make_case(3, 129)
    dead = torch.zeros(3, 129, dtype=torch.bool, device=DEVICE)
    dead[1, 5:60] = True
    student_NV = case.student_NV.masked_fill(dead, -INF).requires_grad_()
    stats = token_stats(student_NV, case.teacher_NV, case.token_ids_N * 0, backend=backend, options=options)
    (grad_NV,) = torch.autograd.grad(stats.forward_kl_N.sum(), student_NV)

    wide_NV = case.student_NV.double().requires_grad_()
    logp_NV, logq_NV = wide_NV.masked_fill(dead, -INF).log_softmax(1), case.teacher_NV.double().log_softmax(1)
    if missing == "drop":
        logq_NV = logq_NV - torch.log1p(-torch.where(dead, logq_NV.exp(), 0.0).sum(1))[:, None]
    ratio_NV = torch.where(dead, DEAD_RATIO[missing], logq_NV - logp_NV.masked_fill(dead, 0.0))
    kl_N = (logq_NV.exp() * ratio_NV).sum(1)
    torch.testing.assert_close(stats.forward_kl_N.detach().double(), kl_N.detach(), rtol=1e-5, atol=1e-5)
    if missing == "inf":
        assert grad_NV.isnan().any(1).tolist() == [False, True, False]
    else:
        (true_grad_NV,) = torch.autograd.grad(kl_N.sum(), wide_NV)
        torch.testing.assert_close(grad_NV.double(), true_grad_NV, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("exact_kl", [False, True])
def test_clamp_is_the_default_and_drop_of_everything_is_zero(exact_kl: bool, backend: str) -> None:
    student_NV, teacher_NV = logits([1.0, -INF], [0.0, 0.0]), logits([-INF, 1.0], [0.0, 0.0])
    stats = token_stats(student_NV, teacher_NV, ids(0, 0), backend=backend, options=StatsOptions(exact_kl=exact_kl))
    assert stats.reverse_kl_N.tolist() == [30.0, 0.0]
    assert stats.missing_mass_N.tolist() == [1.0, 0.0]
    leaf_NV = student_NV.requires_grad_()
    dropped = token_stats(leaf_NV, teacher_NV, ids(0, 0), backend=backend, options=StatsOptions(missing="drop"))
    assert dropped.reverse_kl_N.tolist() == [0.0, 0.0]
    (grad_NV,) = torch.autograd.grad(dropped.reverse_kl_N.sum(), leaf_NV)
    assert not grad_NV.any()
    options = StatsOptions(missing="drop", exact_kl=exact_kl)
    kl_N = token_stats(student_NV, teacher_NV, ids(0, 0), backend=backend, options=options).reverse_kl_N
    assert kl_N.tolist() == [0.0, 0.0]


def test_opposite_one_hot_rows_are_finite_in_every_statistic(backend: str) -> None:
    student_NV = logits([100.0, -100.0, -100.0], [100.0, -INF, -INF]).requires_grad_()
    teacher_NV = logits([-100.0, 100.0, -100.0], [-INF, 100.0, -INF])
    stats = token_stats(student_NV, teacher_NV, ids(0, 0), backend=backend, options=EVERY)
    assert stats.reverse_kl_N.tolist() == [200.0, 30.0]
    assert stats.forward_kl_N.tolist() == [200.0, 30.0]
    entropy_of_beta = -BETA * math.log(BETA) - (1 - BETA) * math.log(1 - BETA)
    assert stats.jsd_N.tolist() == pytest.approx([entropy_of_beta] * 2, abs=1e-6)
    total = stats.reverse_kl_N + stats.forward_kl_N + stats.jsd_N + stats.entropy_N
    (grad_NV,) = torch.autograd.grad(total.sum(), student_NV)
    assert grad_NV.isfinite().all()


def test_fp16_logits_at_the_edge_of_their_range(backend: str) -> None:
    case = make_case(3, 129, FP16, FP16, scale=2e4)
    student_NV = case.student_NV.clamp(-6e4, 6e4)
    stats = token_stats(student_NV, student_NV.clone(), case.token_ids_N, backend=backend)
    truth = naive_token_stats(student_NV.double(), student_NV.double(), case.token_ids_N)
    torch.testing.assert_close(stats.student_logprob_N.double(), truth[0], rtol=1e-6, atol=1e-3)
    assert not stats.reverse_kl_N.any()


# Rows left out


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32])
@pytest.mark.parametrize("options", [StatsOptions(), StatsOptions(forward_kl=True, jsd_beta=BETA, exact_kl=True)])
@pytest.mark.usefixtures("small_tiles")
def test_masked_rows_hold_zero_whatever_is_in_them(options: StatsOptions, kind: torch.dtype, backend: str) -> None:
    case = make_case(5, 300)
    keep_N = torch.tensor([True, False, True, False, True], device=DEVICE)
    student_NV, teacher_NV, ids_N = case.student_NV.clone(), case.teacher_NV.clone(), case.token_ids_N.clone()
    student_NV[1], teacher_NV[1], ids_N[1] = NAN, INF, -100
    student_NV[3], teacher_NV[3], ids_N[3] = -INF, NAN, 2**31
    leaf_NV = student_NV.requires_grad_()
    stats = token_stats(leaf_NV, teacher_NV, ids_N, backend=backend, mask_N=keep_N.to(kind), options=options)
    alone = token_stats(case.student_NV, case.teacher_NV, case.token_ids_N, backend=backend, options=options)
    for name in (*FIELDS, "teacher_logprob_N", "missing_mass_N"):
        if getattr(stats, name) is not None:
            assert not getattr(stats, name)[~keep_N].any(), name
            assert torch.equal(getattr(stats, name)[keep_N], getattr(alone, name)[keep_N]), name
    (stats.reverse_kl_N + stats.student_logprob_N + stats.entropy_N).mean().backward()
    assert not leaf_NV.grad[~keep_N].any()
    assert leaf_NV.grad[keep_N].isfinite().all()
    assert leaf_NV.grad[keep_N].any(1).all()


def test_all_rows_masked_give_zero_loss_and_zero_gradient(backend: str) -> None:
    case = make_case(3, 129)
    leaf_NV = torch.full_like(case.student_NV, NAN).requires_grad_()
    stats = token_stats(
        leaf_NV, case.teacher_NV, case.token_ids_N, backend=backend, mask_N=torch.zeros(3, device=DEVICE)
    )
    loss = stats.reverse_kl_N.sum()
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(leaf_NV.grad, torch.zeros_like(leaf_NV))
