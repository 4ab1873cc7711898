"""What the tests of `linear_token_stats` share: random cases, ways to run them, and the formula by autograd in fp64."""

# N kept tokens, V vocabulary, D hidden, E hidden of the teacher

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import pytest
import torch
from kernel_cases import DEVICE, TOLERANCE, measure_error
from torch import Tensor

from imagine_opd.kernels import OutputHead, StatsOptions, TokenStats, linear_token_stats, token_stats, tuning

ROWS, VOCABULARY, HIDDEN, TEACHER_HIDDEN = 5, 131, 16, 24


@dataclass(frozen=True)
class Case:
    """Hidden states and heads of both sides, the tokens at hand, and the weight of each row in the loss."""

    hidden_ND: Tensor
    head: OutputHead
    teacher_hidden_NE: Tensor | None
    teacher_head: OutputHead | None
    token_ids_N: Tensor
    weights_N: Tensor
    mask_N: Tensor | None = None
    temperature: float = 1.0
    options: StatsOptions = StatsOptions()  # noqa: RUF009
    vocab_size: int | None = None


class Answer(NamedTuple):
    """Statistics, losses of rows, and gradients, by name: what two ways to run a case must agree on."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]


RowLoss = Callable[[TokenStats, Tensor], Tensor]


def make_case(
    rows: int = ROWS,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    teacher: bool = True,
    padding: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
    **fields: Any,
) -> Case:
    """Random tensors whose logits have a deviation of about 2; `padding`: further rows of both heads."""
    generator = torch.Generator().manual_seed(rows * vocabulary)

    def draw(*shape: int, deviation: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * deviation).to(DEVICE, dtype)

    def draw_head(hidden: int) -> OutputHead:
        weight_VD = draw(vocabulary + padding, hidden, deviation=2 / hidden**0.5)
        return OutputHead(weight_VD, draw(vocabulary + padding) if bias else None, scale, softcap)

    hidden_ND, head = draw(rows, HIDDEN), draw_head(HIDDEN)
    teacher_hidden_NE, teacher_head = draw(rows, TEACHER_HIDDEN), draw_head(TEACHER_HIDDEN)
    token_ids_N = torch.randint(0, vocabulary, (rows,), generator=generator).to(DEVICE)
    weights_N = torch.randn(rows, generator=generator).to(DEVICE)
    return Case(
        hidden_ND,
        head,
        teacher_hidden_NE if teacher else None,
        teacher_head if teacher else None,
        token_ids_N,
        weights_N,
        vocab_size=vocabulary if padding else None,
        **fields,
    )


# Losses of rows: the same function serves the door, the logits and the oracle


def weigh_kl(stats: TokenStats, weights_N: Tensor) -> Tensor:
    return weights_N * stats.reverse_kl_N


def weigh_student(stats: TokenStats, weights_N: Tensor) -> Tensor:
    """Not linear, and without the teacher."""
    return weights_N * (stats.entropy_N.square() * 0.1 - stats.student_logprob_N.exp())


def weigh_all(stats: TokenStats, weights_N: Tensor) -> Tensor:
    """Every statistic there is, and products of them."""
    loss_N = stats.reverse_kl_N * (2.0 + 0.1 * stats.student_logprob_N) + weigh_student(stats, weights_N)
    for value_N in (stats.forward_kl_N, stats.jsd_N):
        if value_N is not None:
            loss_N = loss_N + 0.5 * value_N + 0.1 * value_N.square()
    return weights_N * loss_N


def whiten_kl(stats: TokenStats, weights_N: Tensor) -> Tensor:
    """Mixes rows, so that no loss of single rows can stand for it."""
    kl_N = stats.reverse_kl_N
    return weights_N * (kl_N - kl_N.mean()) / (kl_N.std() + 0.1)


# Ways to run a case


def run(
    case: Case,
    backend: str = "reference",
    loss: RowLoss = weigh_all,
    *,
    through: str = "row_loss",
    upstream: float = 1.0,
    trains: tuple[str, ...] = ("hidden", "weight", "bias"),
    **arguments: Any,
) -> Answer:
    """By the door; `through`: "row_loss", gradients made in forward, or "statistics", gradients recomputed."""
    leaves, hidden_ND, head = _make_leaves(case, trains)
    has_row_loss = through == "row_loss"
    stats = linear_token_stats(
        hidden_ND,
        head,
        case.teacher_hidden_NE,
        case.teacher_head,
        case.token_ids_N,
        loss if has_row_loss else None,
        row_inputs=(case.weights_N,) if has_row_loss else (),
        temperature=case.temperature,
        backend=backend,
        mask_N=case.mask_N,
        options=case.options,
        vocab_size=case.vocab_size,
        **arguments,
    )
    return _collect(stats, None if has_row_loss else loss, case, leaves, upstream)


def run_on_logits(case: Case, backend: str = "reference", loss: RowLoss = weigh_all) -> Answer:
    """By `token_stats` on logits of whole rows, which autograd takes back to hidden states and head."""
    leaves, hidden_ND, head = _make_leaves(case, ("hidden", "weight", "bias"))
    student_NV = _make_logits(hidden_ND, head, case.vocab_size)
    teacher_NV = None
    if case.teacher_hidden_NE is not None:
        teacher_NV = _make_logits(case.teacher_hidden_NE, case.teacher_head, case.vocab_size)
    stats = token_stats(
        student_NV, teacher_NV, case.token_ids_N, case.temperature, backend, mask_N=case.mask_N, options=case.options
    )
    return _collect(stats, loss, case, leaves, 1.0)


def run_formula(
    case: Case, loss: RowLoss = weigh_all, dtype: torch.dtype = torch.float64, upstream: float = 1.0
) -> Answer:
    """By the formula under autograd in `dtype`, on the rows that the mask keeps: the oracle in fp64."""
    case = cast(case, dtype)
    leaves, hidden_ND, head = _make_leaves(case, ("hidden", "weight", "bias"))
    kept_N = torch.ones_like(case.token_ids_N, dtype=torch.bool) if case.mask_N is None else case.mask_N != 0
    teacher_NV = None
    if case.teacher_hidden_NE is not None:
        teacher_NV = _make_logits(case.teacher_hidden_NE[kept_N], case.teacher_head, case.vocab_size)
    stats = compute_formula(
        _make_logits(hidden_ND[kept_N], head, case.vocab_size),
        teacher_NV,
        case.token_ids_N[kept_N],
        case.temperature,
        case.options,
    )
    loss_N = loss(stats, case.weights_N[kept_N])
    found = [*list_stats(stats), ("loss_N", loss_N)]
    whole = {name: torch.zeros_like(case.weights_N).masked_scatter(kept_N, value) for name, value in found}
    stats = TokenStats(**whole, loss=loss_N.sum())
    return _collect(stats, None, case, leaves, upstream)


def compute_formula(
    student_NV: Tensor, teacher_NV: Tensor | None, ids_N: Tensor, temperature: float, options: StatsOptions
) -> TokenStats:
    """The statistics as their definitions say, where only the teacher excludes tokens."""

    def pick(logprob_NV: Tensor) -> Tensor:
        return logprob_NV.gather(1, ids_N[:, None]).squeeze(1)

    logp_NV = torch.log_softmax(student_NV / temperature, 1)
    p_NV = logp_NV.exp()
    nan_N = torch.full_like(logp_NV[:, 0], torch.nan).detach()
    entropy_N = -(p_NV * logp_NV).sum(1)
    if teacher_NV is None:
        return TokenStats(pick(logp_NV), nan_N, nan_N, entropy_N, missing_mass_N=nan_N)
    logq_NV = torch.log_softmax(teacher_NV.detach() / (options.teacher_temperature or temperature), 1)
    q_NV, is_missing_NV = logq_NV.exp(), logq_NV.isneginf()
    finite_logq_NV = logq_NV.masked_fill(is_missing_NV, 0.0)
    missing_mass_N = torch.where(is_missing_NV, p_NV, 0.0).sum(1)
    if options.missing == "drop":
        log_rest_N1 = torch.log1p(-missing_mass_N)[:, None]
        kept_NV = (p_NV / log_rest_N1.exp()) * (logp_NV - log_rest_N1 - finite_logq_NV)
        missing_ratio = 0.0
    else:
        kept_NV = p_NV * (logp_NV - finite_logq_NV)
        missing_ratio = 30.0 if options.missing == "clamp" else torch.inf
    reverse_kl_N = torch.where(is_missing_NV, 0.0, kept_NV).sum(1)
    reverse_kl_N = reverse_kl_N + torch.where(missing_mass_N > 0, missing_mass_N * missing_ratio, 0.0)
    forward_kl_N = jsd_N = None
    if options.forward_kl:
        forward_kl_N = (q_NV * (finite_logq_NV - logp_NV)).sum(1)
    if options.jsd_beta is not None:
        beta = options.jsd_beta
        log_mixture_NV = (beta * q_NV + (1 - beta) * p_NV).log()
        to_teacher_N = (q_NV * (finite_logq_NV - log_mixture_NV)).sum(1)
        jsd_N = beta * to_teacher_N + (1 - beta) * (p_NV * (logp_NV - log_mixture_NV)).sum(1)
    return TokenStats(
        pick(logp_NV), pick(logq_NV), reverse_kl_N, entropy_N, forward_kl_N, jsd_N, missing_mass_N.detach()
    )


def list_stats(stats: TokenStats) -> list[tuple[str, Tensor]]:
    """(name, values) of each statistic [N] there is."""
    found = [(item.name, getattr(stats, item.name)) for item in fields(stats) if not item.name.startswith("loss")]
    return [(name, value) for name, value in found if value is not None]


def cast(case: Case, dtype: torch.dtype) -> Case:
    """The same numbers in another dtype."""

    def cast_head(head: OutputHead | None) -> OutputHead | None:
        if head is None:
            return None
        bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
        return replace(head, weight_VD=head.weight_VD.to(dtype), bias_V=bias_V)

    teacher_hidden_NE = None if case.teacher_hidden_NE is None else case.teacher_hidden_NE.to(dtype)
    return replace(
        case,
        hidden_ND=case.hidden_ND.to(dtype),
        head=cast_head(case.head),
        teacher_hidden_NE=teacher_hidden_NE,
        teacher_head=cast_head(case.teacher_head),
        weights_N=case.weights_N.to(dtype),
    )


def select(case: Case, rows: Tensor | slice) -> Case:
    """Some of the rows, or all in another order."""
    names = ("hidden_ND", "teacher_hidden_NE", "token_ids_N", "weights_N", "mask_N")
    found = {name: getattr(case, name) for name in names}
    return replace(case, **{name: value[rows] for name, value in found.items() if value is not None})


# Agreement


def assert_equals_formula(case: Case, backend: str, loss: RowLoss = weigh_all, **arguments: Any) -> Answer:
    """Each value and gradient: error at most that of the formula in fp32 plus the table's tolerance, which grows as a
    temperature below 1 magnifies the rounding of logits."""
    upstream = arguments.get("upstream", 1.0)
    answer, truth = run(case, backend, loss, **arguments), run_formula(case, loss, upstream=upstream)
    naive = run_formula(case, loss, torch.promote_types(case.hidden_ND.dtype, torch.float32), upstream)
    assert answer.values.keys() == truth.values.keys()
    assert answer.gradients.keys() == truth.gradients.keys()
    for kind, values in enumerate(answer):
        for name, value in values.items():
            expected = truth[kind][name]
            if expected.isnan().all():
                assert value.isnan().all(), name
                continue
            error = measure_error(value, expected)
            allowed = measure_error(naive[kind][name], expected) + TOLERANCE[value.dtype] / min(1.0, case.temperature)
            assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
    return answer


def assert_bitwise_equal(first: Answer, second: Answer) -> None:
    """Every value and gradient, NaN equal to NaN."""
    for values, others in zip(first, second, strict=True):
        assert values.keys() == others.keys()
        for name, value in values.items():
            torch.testing.assert_close(value, others[name], rtol=0, atol=0, equal_nan=True, msg=name)


# Both ways over the vocabulary, both ways to a gradient, small blocks

CHUNKED, SLABBED = {"chunk_rows": 2}, {"min_memory": True}
ways = pytest.mark.parametrize("arguments", [CHUNKED, SLABBED], ids=["chunks", "slabs"])
paths = pytest.mark.parametrize("through", ["row_loss", "statistics"])


@pytest.fixture
def small_blocks() -> Iterator[None]:
    """Slabs, tiles and parts so small that every case crosses their borders."""
    from imagine_opd.kernels import slabs

    tile = tuning.TileConfig(64, 1, 1)
    with pytest.MonkeyPatch.context() as patch, tuning.override(tuning.Tuning(tile, tile, tile)):
        patch.setattr(slabs, "SLAB_COLUMNS", 56)
        patch.setattr(slabs, "BLOCK_ROWS", 3)
        yield


def _make_leaves(case: Case, trains: tuple[str, ...]) -> tuple[dict[str, Tensor], Tensor, OutputHead]:
    """Leaves by name where a gradient is wanted, hidden states and head."""
    found = {"hidden": case.hidden_ND, "weight": case.head.weight_VD, "bias": case.head.bias_V}
    parts = {name: None if value is None else value.detach().clone() for name, value in found.items()}
    leaves = {name: parts[name].requires_grad_() for name in trains if parts[name] is not None}
    return leaves, parts["hidden"], replace(case.head, weight_VD=parts["weight"], bias_V=parts["bias"])


def _make_logits(hidden_ND: Tensor, head: OutputHead, vocab_size: int | None) -> Tensor:
    logits_NV = hidden_ND @ head.weight_VD[:vocab_size].T
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V[:vocab_size]
    logits_NV = logits_NV * head.logit_scale
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)


def _collect(stats: TokenStats, loss: RowLoss | None, case: Case, leaves: dict[str, Tensor], upstream: float) -> Answer:
    loss_N = stats.loss_N if loss is None else _mask(loss(stats, case.weights_N), case.mask_N)
    total = stats.loss if loss is None else loss_N.sum()
    torch.testing.assert_close(total, loss_N.sum(), rtol=1e-5, atol=1e-5, equal_nan=True)
    if leaves:
        (total * upstream).backward()
    values = {name: value.detach() for name, value in [*list_stats(stats), ("loss_N", loss_N)]}
    return Answer(values, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})


def _mask(loss_N: Tensor, mask_N: Tensor | None) -> Tensor:
    return loss_N if mask_N is None else torch.where(mask_N != 0, loss_N, 0.0)
