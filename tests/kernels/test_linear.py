"""`linear_token_stats` against the formula in fp64: chunks, slabs, both ways to a gradient, masks, heads and options.

Without a GPU the Triton kernels run in Triton's interpreter, with one they run compiled.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, TOLERANCE, measure_error
from linear_cases import (
    HIDDEN,
    ROWS,
    SLABBED,
    VOCABULARY,
    Answer,
    Case,
    assert_bitwise_equal,
    assert_equals_formula,
    make_case,
    paths,
    run,
    run_formula,
    run_on_logits,
    select,
    small_blocks,  # noqa: F401
    ways,
    weigh_all,
    weigh_kl,
    weigh_student,
    whiten_kl,
)
from torch import Tensor

from imagine_opd.kernels import OutputHead, StatsOptions, TokenStats, linear, linear_token_stats
from imagine_opd.loss.objective import ObjectiveConfig, clip_policy_loss

INF, NAN = math.inf, math.nan
pytestmark = pytest.mark.usefixtures("small_blocks")


# Agreement with fp64


@pytest.mark.parametrize(
    "arguments",
    [{"chunk_rows": 1}, {"chunk_rows": ROWS - 1}, {"chunk_rows": ROWS}, {"chunk_rows": ROWS + 1}, {}, SLABBED],
    ids=["1", "N-1", "N", "N+1", "default", "slabs"],
)
@paths
def test_every_chunking_equals_the_formula(through: str, arguments: dict[str, Any], backend: str) -> None:
    assert_equals_formula(make_case(), backend, through=through, **arguments)


@pytest.mark.parametrize("arguments", [{"chunk_rows": 11}, SLABBED], ids=["chunks", "slabs"])
def test_more_rows_and_tiles_than_one_program_takes(arguments: dict[str, Any], backend: str) -> None:
    assert_equals_formula(make_case(rows=18, vocabulary=600), backend, **arguments)


def test_gradient_takes_the_logits_place_in_a_chunk_that_could_be_higher(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []
    get_buffer = linear.ChunkProjector.get_gradient_buffer

    def note(self: linear.ChunkProjector, rows: int) -> Tensor:
        found = get_buffer(self, rows)
        made.append(found.data_ptr() == self.logits.data_ptr())
        return found

    monkeypatch.setattr(linear.ChunkProjector, "get_gradient_buffer", note)
    assert_equals_formula(make_case(), backend, through="row_loss", chunk_rows=ROWS + 1)
    assert made
    assert all(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_chunks_that_share_one_product_with_the_head_equal_the_formula(
    dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Groups of three chunks of two rows, of which the last is cut; rows without a gradient close a group early.
    monkeypatch.setattr(linear, "choose_heights", lambda *_: (2, 6 if dtype == torch.float32 else 2))
    products: list[int] = []
    add = linear.add_gradients
    monkeypatch.setattr(
        linear, "add_gradients", lambda *args, **flags: (products.append(len(args[3])), add(*args, **flags))[1]
    )
    assert_equals_formula(make_case(rows=11, dtype=dtype), backend, through="row_loss")
    assert products == ([6, 5] if dtype == torch.float32 else [2, 2, 2, 2, 2, 1])


def test_a_chunk_without_a_gradient_between_others_leaves_theirs_whole(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(rows=7)
    chunks = iter([True, False, True, True])

    def weigh_some(stats: TokenStats, weights_C: torch.Tensor) -> torch.Tensor:
        # A constant has no gradient in the statistics: such a chunk is passed over.
        return weights_C * stats.reverse_kl_N if next(chunks) else torch.zeros_like(weights_C)

    def find_gradients(heights: tuple[int, int], row_loss: Any, weights_N: torch.Tensor) -> list[torch.Tensor]:
        monkeypatch.setattr(linear, "choose_heights", lambda *_: heights)
        hidden_ND, weight_VD = (x.clone().requires_grad_() for x in (case.hidden_ND, case.head.weight_VD))
        stats = linear_token_stats(
            hidden_ND, weight_VD, case.teacher_hidden_NE, case.teacher_head, case.token_ids_N, row_loss,
            row_inputs=(weights_N,), backend=backend,
        )  # fmt: skip
        return list(torch.autograd.grad(stats.loss, (hidden_ND, weight_VD)))

    weights_N = case.weights_N.clone()
    found = find_gradients((2, 6), weigh_some, weights_N)
    weights_N[2:4] = 0.0
    wanted = find_gradients((7, 7), lambda stats, weights_C: weights_C * stats.reverse_kl_N, weights_N)
    assert max(float(value.abs().max()) for value in wanted) > 1e-3
    for value, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)


@ways
def test_equals_token_stats_on_materialised_logits(arguments: dict[str, Any], backend: str) -> None:
    case = make_case(options=StatsOptions(forward_kl=True))
    answer, other = run(case, backend, **arguments), run_on_logits(case, backend)
    for values, others in zip(answer, other, strict=True):
        assert values.keys() == others.keys()
        for name, value in values.items():
            assert measure_error(value, others[name].double()) <= 2 * TOLERANCE[value.dtype], name


@ways
@pytest.mark.parametrize(("student", "teacher"), [(0.5, None), (2.0, None), (1.0, 1.5), (2.0, 0.7)])
def test_temperatures(student: float, teacher: float | None, arguments: dict[str, Any], backend: str) -> None:
    case = make_case(temperature=student, options=StatsOptions(teacher_temperature=teacher))
    assert_equals_formula(case, backend, **arguments)


@ways
@pytest.mark.parametrize(
    "options",
    [
        StatsOptions(forward_kl=True),
        StatsOptions(jsd_beta=0.3),
        StatsOptions(exact_kl=True),
        StatsOptions(forward_kl=True, jsd_beta=0.5, exact_kl=True, teacher_temperature=0.7),
    ],
    ids=["forward", "jsd", "exact", "all"],
)
@paths
def test_options(options: StatsOptions, through: str, arguments: dict[str, Any], backend: str) -> None:
    answer = assert_equals_formula(make_case(options=options), backend, through=through, **arguments)
    assert ("forward_kl_N" in answer.values, "jsd_N" in answer.values) == (
        options.forward_kl,
        options.jsd_beta is not None,
    )


@ways
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("scale", "softcap"), [(0.0625, None), (1.0, 3.0), (-1.5, 5.0)])
def test_scale_and_softcap(
    scale: float, softcap: float | None, bias: bool, arguments: dict[str, Any], backend: str
) -> None:
    assert_equals_formula(make_case(scale=scale, softcap=softcap, bias=bias), backend, **arguments)


@ways
def test_loss_that_mixes_rows_gets_its_gradient(arguments: dict[str, Any], backend: str) -> None:
    assert_equals_formula(make_case(), backend, whiten_kl, through="statistics", **arguments)


@ways
@paths
def test_upstream_gradient_scales_every_gradient(through: str, arguments: dict[str, Any], backend: str) -> None:
    assert_equals_formula(make_case(), backend, through=through, upstream=-0.37, **arguments)


@ways
def test_single_row_and_single_token_vocabulary(arguments: dict[str, Any], backend: str) -> None:
    assert_equals_formula(make_case(rows=1), backend, **arguments)
    answer = run(make_case(rows=3, vocabulary=1), backend, **arguments)
    for name in ("student_logprob_N", "teacher_logprob_N", "reverse_kl_N", "entropy_N"):
        assert not answer.values[name].any(), name
    # The one token's probability is 1 but for the rounding of its logit, which two passes may sum in another order.
    for name, gradient in answer.gradients.items():
        assert gradient.abs().max() <= 4 * TOLERANCE[torch.float32], name


@ways
def test_fp64_inputs_are_computed_in_fp64(arguments: dict[str, Any]) -> None:
    answer = assert_equals_formula(make_case(dtype=torch.float64), "reference", **arguments)
    assert answer.values["reverse_kl_N"].dtype == torch.float64


# Which gradients are made


@pytest.mark.parametrize(
    "trains", [("hidden",), ("weight",), ("bias",), ("weight", "bias"), ("hidden", "bias")], ids="+".join
)
@ways
@paths
def test_only_gradients_asked_for_are_made(
    trains: tuple[str, ...], through: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from imagine_opd.kernels import linear_autograd

    case = make_case()
    whole = run(case, through=through, **arguments)
    made, allocate = [], linear_autograd.allocate_gradients
    monkeypatch.setattr(linear_autograd, "allocate_gradients", lambda *a: made.append(allocate(*a)) or made[-1])
    answer = run(case, through=through, trains=trains, **arguments)
    assert answer.gradients.keys() == set(trains)
    for name, gradient in answer.gradients.items():
        torch.testing.assert_close(gradient, whole.gradients[name], rtol=1e-5, atol=1e-6)
    found = {"hidden": made[-1].hidden_ND, "weight": made[-1].weight_VD, "bias": made[-1].bias_V}
    assert {name for name, gradient in found.items() if gradient is not None} == set(trains)


@paths
@pytest.mark.parametrize("why", ["no_grad", "all_frozen"])
def test_without_need_no_gradient_is_made(why: str, through: str, backend: str) -> None:
    from imagine_opd.kernels.backends import load_backend

    case, trains = make_case(), () if why == "all_frozen" else ("hidden", "weight", "bias")
    expected = run(case, backend, through=through)

    def refuse(*_: object) -> None:
        raise AssertionError("a gradient was computed")

    hidden_ND = case.hidden_ND.clone().requires_grad_("hidden" in trains)
    weight_VD = case.head.weight_VD.clone().requires_grad_("weight" in trains)
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(why != "no_grad"):
        blind = load_backend(backend)._replace(compute_gradient=refuse)
        patch.setattr("imagine_opd.kernels.linear.load_backend", lambda _: blind)
        stats = linear_token_stats(
            hidden_ND, replace(case.head, weight_VD=weight_VD), case.teacher_hidden_NE, case.teacher_head,
            case.token_ids_N, weigh_all if through == "row_loss" else None,
            row_inputs=(case.weights_N,) if through == "row_loss" else (), backend=backend, chunk_rows=2,
        )  # fmt: skip
    torch.testing.assert_close(stats.reverse_kl_N, expected.values["reverse_kl_N"], rtol=1e-5, atol=1e-6)
    assert not stats.reverse_kl_N.requires_grad
    if through == "row_loss":
        torch.testing.assert_close(stats.loss_N, expected.values["loss_N"], rtol=1e-5, atol=1e-6)
        assert not stats.loss.requires_grad


@paths
def test_teacher_never_gets_a_gradient(through: str) -> None:
    case = make_case()
    case.teacher_hidden_NE.requires_grad_()
    case.teacher_head.weight_VD.requires_grad_()
    run(case, through=through)
    assert case.teacher_hidden_NE.grad is None
    assert case.teacher_head.weight_VD.grad is None


@paths
@ways
def test_head_of_both_sides_gets_the_students_gradient_only(through: str, arguments: dict[str, Any]) -> None:
    case = make_case()
    case = replace(case, teacher_hidden_NE=case.hidden_ND.flip(0), teacher_head=case.head)
    truth = run_formula(case)
    hidden_ND = case.hidden_ND.clone().requires_grad_()
    head = replace(case.head, weight_VD=case.head.weight_VD.clone().requires_grad_())
    has_row_loss = through == "row_loss"
    stats = linear_token_stats(
        hidden_ND, head, case.teacher_hidden_NE, head, case.token_ids_N, weigh_all if has_row_loss else None,
        row_inputs=(case.weights_N,) if has_row_loss else (), **arguments,
    )  # fmt: skip
    (stats.loss if has_row_loss else weigh_all(stats, case.weights_N).sum()).backward()
    assert measure_error(head.weight_VD.grad, truth.gradients["weight"]) <= 2 * TOLERANCE[torch.float32]
    assert measure_error(hidden_ND.grad, truth.gradients["hidden"]) <= 2 * TOLERANCE[torch.float32]


# Padded heads


@ways
@paths
def test_padding_gets_no_probability_and_no_gradient(through: str, arguments: dict[str, Any], backend: str) -> None:
    answer = assert_equals_formula(make_case(padding=53), backend, through=through, **arguments)
    assert answer.gradients["weight"].shape == (VOCABULARY + 53, HIDDEN)
    assert not answer.gradients["weight"][VOCABULARY:].any()
    assert not answer.gradients["bias"][VOCABULARY:].any()


@ways
@paths
def test_padding_may_hold_anything(through: str, arguments: dict[str, Any], backend: str) -> None:
    case = make_case(padding=53)
    expected = run(case, backend, through=through, **arguments)
    for head in (case.head, case.teacher_head):
        for row, garbage in enumerate((NAN, INF, -INF, 3e38), start=VOCABULARY):
            head.weight_VD[row], head.bias_V[row] = garbage, garbage
    assert_bitwise_equal(run(case, backend, through=through, **arguments), expected)


@ways
def test_heads_of_different_lengths_share_the_first_tokens(arguments: dict[str, Any], backend: str) -> None:
    case = make_case(padding=53)
    head = case.teacher_head
    shorter = OutputHead(head.weight_VD[: VOCABULARY + 2], head.bias_V[: VOCABULARY + 2])
    assert_equals_formula(replace(case, teacher_head=shorter), backend, **arguments)


# Rows left out


@pytest.mark.parametrize(
    ("through", "dtype"),
    [("row_loss", torch.bool), ("row_loss", torch.float32), ("statistics", torch.bool), ("statistics", torch.int64)],
)
@ways
def test_masked_rows_count_for_nothing_and_may_hold_anything(
    through: str, dtype: torch.dtype, arguments: dict[str, Any], backend: str
) -> None:
    case = make_case(mask_N=torch.tensor([1, 0, 1, 0, 1], device=DEVICE, dtype=dtype))
    case.hidden_ND[1], case.teacher_hidden_NE[3], case.weights_N[1] = NAN, INF, NAN
    case.token_ids_N[1], case.token_ids_N[3] = -100, 2**31
    answer = assert_equals_formula(case, backend, through=through, **arguments)
    assert not any(value[[1, 3]].any() for name, value in answer.values.items())
    assert not answer.gradients["hidden"][[1, 3]].any()


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # numpy's, in the interpreter
@ways
@paths
def test_rows_that_the_loss_leaves_out_may_hold_anything(through: str, arguments: dict[str, Any], backend: str) -> None:
    def loss(stats: TokenStats, weights_N: Tensor) -> Tensor:
        return torch.where(weights_N == 0, 0.0, weights_N * stats.reverse_kl_N)

    case = make_case()
    case.weights_N[[1, 3]] = 0.0
    expected = run(case, backend, loss, through=through, **arguments).gradients
    case.hidden_ND[1], case.teacher_hidden_NE[3], case.token_ids_N[1] = NAN, INF, -100
    found = run(case, backend, loss, through=through, **arguments).gradients
    assert_bitwise_equal(Answer({}, found), Answer({}, expected))


@ways
@paths
def test_masked_rows_change_no_bit_of_the_others(through: str, arguments: dict[str, Any], backend: str) -> None:
    case = make_case(mask_N=torch.tensor([0, 1, 1, 0, 1], device=DEVICE))
    kept = replace(select(case, [1, 2, 4]), mask_N=None)
    answer, alone = run(case, backend, through=through, **arguments), run(kept, backend, through=through, **arguments)
    picked = [{k: v[[1, 2, 4]] if v.ndim and len(v) == ROWS else v for k, v in part.items()} for part in answer]
    assert_bitwise_equal(answer._make(picked), alone)


@ways
@paths
@pytest.mark.parametrize("empty", ["all_masked", "no_rows"])
def test_nothing_to_learn_from_is_exactly_zero_and_attached(
    empty: str, through: str, arguments: dict[str, Any], backend: str
) -> None:
    case = make_case(mask_N=torch.zeros(ROWS, device=DEVICE))
    if empty == "no_rows":
        case = replace(select(case, slice(0, 0)), mask_N=None)
    answer = run(case, backend, through=through, **arguments)  # backward would fail on a loss without a graph
    assert not any(value.any() for value in answer.values.values())
    assert answer.gradients.keys() == {"hidden", "weight", "bias"}
    assert not any(gradient.any() for gradient in answer.gradients.values())
    assert answer.gradients["hidden"].shape == case.hidden_ND.shape


@ways
def test_ids_out_of_range_are_nan_in_their_rows(arguments: dict[str, Any], backend: str) -> None:
    bad_ids = [-100, -1, VOCABULARY, VOCABULARY + 1, 2**31, -(2**40)]
    case = make_case(rows=7, padding=5)  # the padding holds no token either
    bad = replace(case, token_ids_N=torch.tensor([*bad_ids, 3], device=DEVICE))
    answer, bad_answer = run(case, backend, weigh_kl, **arguments), run(bad, backend, weigh_kl, **arguments)
    for name in ("student_logprob_N", "teacher_logprob_N"):
        assert bad_answer.values[name].isnan().tolist() == [True] * 6 + [False]
        del answer.values[name], bad_answer.values[name]
    assert_bitwise_equal(bad_answer, answer)  # the KL does not use the id
    hidden_ND = run(bad, backend, weigh_student, **arguments).gradients["hidden"]
    assert hidden_ND.isnan().any(1).tolist() == [True] * 6 + [False]


# Tokens that the teacher excludes


def exclude_tokens(case: Case) -> Case:
    """A teacher whose bias excludes tokens on both sides of block borders, none of them at hand."""
    case.teacher_head.bias_V[[0, 3, 55, 56, 63, 64, 111, 112, VOCABULARY - 1]] = -INF
    return replace(case, token_ids_N=torch.arange(100, 100 + ROWS, device=DEVICE))


@ways
@pytest.mark.parametrize("exact_kl", [False, True], ids=["usual", "exact"])
@pytest.mark.parametrize("missing", ["clamp", "drop"])
def test_excluded_tokens_are_clamped_or_dropped(
    missing: str, exact_kl: bool, arguments: dict[str, Any], backend: str
) -> None:
    options = StatsOptions(missing=missing, exact_kl=exact_kl, forward_kl=True, jsd_beta=0.4)
    case = exclude_tokens(make_case(options=options))
    answer = assert_equals_formula(case, backend, **arguments)
    assert answer.values["missing_mass_N"].min() > 1e-3


@ways
def test_excluded_tokens_make_the_kl_infinite_on_request(arguments: dict[str, Any], backend: str) -> None:
    case = exclude_tokens(make_case(options=StatsOptions(missing="inf")))
    answer = run(case, backend, weigh_kl, **arguments)
    truth = run_formula(case, weigh_student)
    assert answer.values["reverse_kl_N"].isposinf().all()
    assert measure_error(answer.values["missing_mass_N"], truth.values["missing_mass_N"]) <= TOLERANCE[torch.float32]
    assert answer.gradients["hidden"].isnan().all()  # none exists
    spared = run(case, backend, weigh_student, **arguments).gradients  # a loss without the KL does not notice
    for name, gradient in spared.items():
        assert measure_error(gradient, truth.gradients[name]) <= 2 * TOLERANCE[torch.float32], name


# Sampled tokens


@ways
@paths
def test_without_a_teacher_there_are_logprob_and_entropy(through: str, arguments: dict[str, Any], backend: str) -> None:
    answer = assert_equals_formula(make_case(teacher=False), backend, weigh_student, through=through, **arguments)
    for name in ("teacher_logprob_N", "reverse_kl_N", "missing_mass_N"):
        assert answer.values[name].isnan().all()


@ways
def test_clipped_policy_loss_equals_the_formula(arguments: dict[str, Any], backend: str) -> None:
    config = ObjectiveConfig(distillation_mode="sampled_token")
    case = make_case(rows=8)
    truth = run_formula(case).values
    # What the sampler said, so that p/p_old lies inside of the clip, beyond either end, and beyond the dual clip.
    log_ratio_N = torch.tensor([0.1, 0.5, -0.1, 1.5, -0.1, -0.4, 0.5, 1.3], device=DEVICE)
    case = replace(case, weights_N=truth["student_logprob_N"].float() - log_ratio_N)
    is_gain_N = truth["teacher_logprob_N"] > case.weights_N
    assert is_gain_N.tolist() == [True, False, False, False, False, False, True, False]
    is_flat = [False, False, False, True, False, True, True, True]

    def loss(stats: TokenStats, sampling_logprobs_C: Tensor) -> Tensor:
        return clip_policy_loss(stats, sampling_logprobs_C, config)

    answer = assert_equals_formula(case, backend, loss, **arguments)
    assert (answer.gradients["hidden"] == 0).all(1).tolist() == is_flat


@ways
def test_kl_gradient_is_the_expected_policy_gradient(arguments: dict[str, Any], backend: str) -> None:
    # E_{y~p}[(log p(y) - log q(y)) d log p(y)] = d KL(p||q): one row for each token, weighted by its probability
    row = make_case(rows=1, vocabulary=11)

    def weigh_tokens(stats: TokenStats, _: Tensor) -> Tensor:
        logp_C = stats.student_logprob_N.detach()
        return logp_C.exp() * (logp_C - stats.teacher_logprob_N) * stats.student_logprob_N

    repeated = select(row, [0] * 11)
    every_token = replace(repeated, token_ids_N=torch.arange(11, device=DEVICE))
    expected = run(replace(row, weights_N=torch.ones(1, device=DEVICE)), backend, weigh_kl, **arguments).gradients
    found = run(every_token, backend, weigh_tokens, **arguments).gradients
    torch.testing.assert_close(found["hidden"].sum(0, keepdim=True), expected["hidden"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["weight"], expected["weight"], rtol=1e-5, atol=1e-6)
