"""The other ways to run `token_stats`: no teacher, weights in advance, in place, rows split over programs; refusals."""

# N kept tokens, V vocabulary

import math
from collections.abc import Callable

import pytest
import torch
from kernel_cases import DEVICE, Case, make_case
from option_cases import EVERY, FIELDS, run

from imagine_opd.errors import ConfigError
from imagine_opd.kernels import RowWeights, StatsOptions, token_stats, tuning

INF = math.inf
FP32, BF16 = torch.float32, torch.bfloat16


# Without a teacher


@pytest.mark.usefixtures("small_tiles")
def test_without_teacher_log_prob_and_entropy_are_as_ever(backend: str) -> None:
    case = make_case(7, 1003, use=(True, False, True))
    results = []
    for teacher_NV in (None, case.teacher_NV):
        leaf_NV = case.student_NV.clone().requires_grad_()
        stats = token_stats(leaf_NV, teacher_NV, case.token_ids_N, backend=backend)
        (stats.student_logprob_N @ case.weights_3N[0] + stats.entropy_N @ case.weights_3N[2]).backward()
        results.append((stats.student_logprob_N.detach(), stats.entropy_N.detach(), leaf_NV.grad))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)
    alone = token_stats(case.student_NV, None, case.token_ids_N, backend=backend)
    for name in ("teacher_logprob_N", "reverse_kl_N", "missing_mass_N"):
        assert getattr(alone, name).isnan().all(), name


# Weights in advance, in place


def make_weights(case: Case, forward: bool = False) -> RowWeights:
    logprob_N, kl_N, entropy_N = case.weights_3N
    return RowWeights(logprob_N, kl_N, entropy_N, forward_kl_N=kl_N * 0.5 if forward else None)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("rows_in_flight", [0, 2])
@pytest.mark.parametrize(
    "options", [StatsOptions(), StatsOptions(forward_kl=True, missing="drop"), StatsOptions(exact_kl=True)]
)
def test_weights_in_advance_give_the_same_loss_and_gradient(
    options: StatsOptions, rows_in_flight: int, backend: str
) -> None:
    case = make_case(7, 300)
    keep_N = torch.tensor([1, 1, 0, 1, 1, 1, 1], device=DEVICE)
    weights = make_weights(case, options.forward_kl)
    tile = tuning.TileConfig(128, 4, 1)
    with tuning.override(tuning.Tuning(tile, tile, tile, rows_in_flight)):
        leaf_NV = case.student_NV.clone().requires_grad_()
        stats = token_stats(
            leaf_NV, case.teacher_NV, case.token_ids_N, backend=backend, mask_N=keep_N, options=options, weights=weights
        )
        (3.0 * stats.loss).backward()
        plain_NV = case.student_NV.clone().requires_grad_()
        plain = token_stats(
            plain_NV, case.teacher_NV, case.token_ids_N, backend=backend, mask_N=keep_N, options=options
        )
    loss_N = (
        plain.student_logprob_N * weights.student_logprob_N
        + plain.reverse_kl_N * weights.reverse_kl_N
        + plain.entropy_N * weights.entropy_N
    )
    if options.forward_kl:
        loss_N = loss_N + plain.forward_kl_N * weights.forward_kl_N
    (3.0 * loss_N.sum()).backward()
    assert not stats.reverse_kl_N.requires_grad
    torch.testing.assert_close(stats.loss_N, loss_N.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(leaf_NV.grad, plain_NV.grad, atol=2e-6, rtol=1e-5)
    with pytest.raises(RuntimeError, match="differentiated already"):
        stats.loss.backward()


@pytest.mark.parametrize("make", [lambda case: None, make_weights], ids=["two_passes", "weights"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_in_place_equals_out_of_place_bit_by_bit(
    make: Callable[[Case], RowWeights | None], dtype: torch.dtype, backend: str
) -> None:
    case = make_case(7, 1003, dtype, dtype)
    grads = []
    for in_place in (False, True):
        leaf_NV = case.student_NV.clone().requires_grad_()
        logits_NV = leaf_NV + 0.0
        stats = token_stats(
            logits_NV, case.teacher_NV, case.token_ids_N, backend=backend, weights=make(case), in_place=in_place
        )
        loss = stats.loss if stats.loss is not None else (stats.reverse_kl_N @ case.weights_3N[1])
        loss.backward()
        grads.append(leaf_NV.grad)
        assert torch.equal(logits_NV.detach(), leaf_NV.grad if in_place else case.student_NV)
    assert torch.equal(*grads)


@pytest.mark.parametrize("make", [lambda case: None, make_weights], ids=["two_passes", "weights"])
def test_in_place_is_an_error_where_somebody_still_needs_the_logits(
    make: Callable[[Case], RowWeights | None], backend: str
) -> None:
    case = make_case(3, 129)
    leaf_NV = case.student_NV.clone().requires_grad_()
    logits_NV = leaf_NV.exp()  # its backward needs its output
    stats = token_stats(
        logits_NV, case.teacher_NV, case.token_ids_N, backend=backend, weights=make(case), in_place=True
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (stats.loss if stats.loss is not None else stats.reverse_kl_N.sum()).backward()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("make", [lambda case: None, make_weights], ids=["two_passes", "weights"])
def test_second_derivative_raises_in_every_mode(
    make: Callable[[Case], RowWeights | None], in_place: bool, backend: str
) -> None:
    case = make_case(3, 129)
    leaf_NV = case.student_NV.clone().requires_grad_()
    stats = token_stats(
        leaf_NV + 0.0, case.teacher_NV, case.token_ids_N, backend=backend, weights=make(case), in_place=in_place
    )
    loss = stats.loss if stats.loss is not None else stats.reverse_kl_N.sum()
    (grad_NV,) = torch.autograd.grad(loss, leaf_NV, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        (grad_NV.square().sum() + leaf_NV.sum()).backward()


# Splitting rows


@pytest.mark.parametrize("splits", [2, 3, 5])
@pytest.mark.parametrize(
    "options",
    [
        StatsOptions(),
        StatsOptions(forward_kl=True),
        StatsOptions(forward_kl=True, teacher_temperature=1.5, missing="drop"),
    ],
)
def test_rows_split_over_programs_give_the_same_answer(
    options: StatsOptions, splits: int, monkeypatch: pytest.MonkeyPatch, small_tiles: None
) -> None:
    case = make_case(4, 1003)
    case.teacher_NV[1, :300] = -INF
    case.student_NV[2, 200:700] = -INF
    case.token_ids_N[:] = torch.tensor([0, 999, 150, 1002])
    fields = FIELDS[: 4 if options.forward_kl else 3]
    weighted = tuple(name for name in fields if name != "student_logprob_N")  # row 2's is -inf: its id is excluded
    values, grad_NV = run(case, "triton", options, weighted)
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: allocate(*args, **kwargs).fill_(math.nan))
    monkeypatch.setattr(tuning, "choose_splits", lambda *_: splits)
    split_values, split_grad_NV = run(case, "triton", options, weighted)
    for name in (*fields, "teacher_logprob_N", "missing_mass_N"):
        torch.testing.assert_close(getattr(split_values, name), getattr(values, name), atol=1e-6, rtol=1e-6)
    assert split_values.reverse_kl_N.isfinite().all()
    torch.testing.assert_close(split_grad_NV, grad_NV, atol=1e-6, rtol=1e-5)
    identical = token_stats(case.student_NV, case.student_NV.clone(), case.token_ids_N, backend="triton")
    assert not identical.reverse_kl_N.any()


def test_twenty_runs_repeat_bit_by_bit(backend: str) -> None:
    case = make_case(3, 300, BF16)
    stats, grad_NV = run(case, backend, EVERY, FIELDS)
    for _ in range(20):
        again, grad_again_NV = run(case, backend, EVERY, FIELDS)
        assert torch.equal(grad_again_NV, grad_NV)
        assert all(torch.equal(getattr(again, name), getattr(stats, name)) for name in FIELDS)


@pytest.mark.parametrize("power", [-4, 4])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_upstream_gradient_scales_what_stands_ready(factor: float, power: int, backend: str) -> None:
    case = make_case(3, 129)
    weights = RowWeights(reverse_kl_N=torch.ones(3, device=DEVICE))
    grads = []
    for scale in (1.0, factor * 10.0**power):
        leaf_NV = case.student_NV.clone().requires_grad_()
        stats = token_stats(leaf_NV, case.teacher_NV, case.token_ids_N, backend=backend, weights=weights)
        (stats.loss * scale).backward()
        grads.append(leaf_NV.grad)
    torch.testing.assert_close(grads[1], grads[0] * (factor * 10.0**power), atol=0, rtol=1e-6)


# What is refused

S, T, Y, ONE = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.ones(2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StatsOptions(jsd_beta=1.0), "jsd_beta is 1.0; expected a number between 0 and 1"),
        (lambda: StatsOptions(missing="skip"), "missing is 'skip'; expected one of clamp, drop, inf"),
        (lambda: StatsOptions(teacher_temperature=0.0), "teacher_temperature is 0.0"),
        (lambda: token_stats(S, T, Y, mask_N=torch.ones(3)), r"mask_N is \[3\]; expected \[2\]"),
        (lambda: token_stats(S, T, Y, weights=RowWeights()), "weights has no weight"),
        (
            lambda: token_stats(S, T, Y, weights=RowWeights(ONE[:1])),
            r"student_logprob_N is \[1\]; expected \[2\]",
        ),
        (lambda: token_stats(S, T, Y, weights=RowWeights(jsd_N=ONE)), "weights.jsd_N needs options"),
        (lambda: token_stats(S, T, Y, weights=RowWeights(forward_kl_N=ONE)), "weights.forward_kl_N needs options"),
        (lambda: token_stats(S, T, Y, weights=RowWeights(ONE.clone().requires_grad_())), "requires a gradient"),
        (lambda: token_stats(S, None, Y, options=StatsOptions(forward_kl=True)), "forward_kl needs a teacher"),
        (lambda: token_stats(S, None, Y, weights=RowWeights(reverse_kl_N=ONE)), "reverse_kl_N needs a teacher"),
        (
            lambda: token_stats(S.clone().requires_grad_(), T, Y, in_place=True),
            "in_place=True writes the gradient over",
        ),
    ],
)
def test_refuses_what_does_not_fit(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
