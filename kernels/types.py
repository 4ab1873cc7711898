"""The values that cross the kernels' borders: options and statistics for users, logits and row tables between files."""

# N kept tokens, V vocabulary, D hidden

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from imagine_opd.errors import ConfigError

BackendName = Literal["auto", "triton", "reference"]
MissingPolicy = Literal["clamp", "drop", "inf"]

LOWEST = -1e30
"""Below it a logit counts as -inf: masks are often written as the lowest finite float. It also stands for -inf inside
sums, where exp gives 0 all the same and 0 * -1e30 is 0, not the NaN of 0 * -inf."""

MISSING_LOG_RATIO = 30.0
"""log p/q in nats of a token that the teacher excludes, under `missing="clamp"`: q = p e^-30."""


@dataclass(frozen=True)
class TokenStats:
    """Per-token statistics of student p and teacher q, natural logarithms, each [N] in fp32 or fp64.

    Rows left out by a mask hold 0. Without a teacher, what needs one is NaN.
    """

    student_logprob_N: Tensor
    """log p(y) of the token at hand."""
    teacher_logprob_N: Tensor
    """log q(y) of the token at hand; a constant for autograd."""
    reverse_kl_N: Tensor
    """KL(p || q) over the whole vocabulary, at least 0."""
    entropy_N: Tensor
    """H(p), from 0 to ln V."""
    forward_kl_N: Tensor | None = None
    """KL(q || p), when `StatsOptions.forward_kl` asks for it."""
    jsd_N: Tensor | None = None
    """b KL(q || M) + (1 - b) KL(p || M) with M = b q + (1 - b) p, when `StatsOptions.jsd_beta` gives b."""
    missing_mass_N: Tensor | None = None
    """The student's probability of tokens that the teacher excludes (logit -inf); a constant for autograd."""
    loss_N: Tensor | None = None
    """The loss of each row, a constant for autograd; with `weights` or `row_loss` only."""
    loss: Tensor | None = None
    """The sum of `loss_N`, the one differentiable field when `weights` or `row_loss` is given."""


@dataclass(frozen=True)
class StatsOptions:
    """What is computed beside the four standard statistics, and how. Raises `ConfigError` for a bad value.

    teacher_temperature: the teacher's, where it differs from the student's.
    forward_kl: also KL(q || p).
    jsd_beta: also the generalised Jensen-Shannon divergence with this b, 0 < b < 1; costs one more read.
    exact_kl: the KL as sum of q - p + p log(p/q) >= 0, right to 1e-9 where both sides nearly agree (the usual form
        to 1e-6); costs one more read.
    missing: tokens that one side of a KL excludes (-inf) and the other does not. `clamp`: their log-ratio counts as
        30 nats; `drop`: the distribution is renormalised without them; `inf`: the KL is infinite, its gradient NaN.
    """

    teacher_temperature: float | None = None
    forward_kl: bool = False
    jsd_beta: float | None = None
    exact_kl: bool = False
    missing: MissingPolicy = "clamp"

    def __post_init__(self) -> None:
        if self.teacher_temperature is not None:
            refuse_bad_temperature("teacher_temperature", self.teacher_temperature)
        if self.jsd_beta is not None and not 0.0 < self.jsd_beta < 1.0:
            raise ConfigError(
                f"jsd_beta is {self.jsd_beta}; expected a number between 0 and 1, both excluded: the JSD is 0 at both "
                "ends. The KLs of the limits are reverse_kl_N and forward_kl_N"
            )
        if self.missing not in get_args(MissingPolicy):
            raise ConfigError(f"missing is {self.missing!r}; expected one of {', '.join(get_args(MissingPolicy))}")


@dataclass(frozen=True)
class RowWeights:
    """Weights [N] of the statistics in a loss that is linear in them: sum_i w_i stat_i. `None`: not in the loss."""

    student_logprob_N: Tensor | None = None
    reverse_kl_N: Tensor | None = None
    entropy_N: Tensor | None = None
    forward_kl_N: Tensor | None = None
    jsd_N: Tensor | None = None


@dataclass(frozen=True)
class OutputHead:
    """A language model's head: logits = softcap(logit_scale * (hidden @ weight.T + bias)), softcap(z) = c tanh(z / c).

    weight_VD: [V, D]. bias_V: [V]. logit_scale: a factor, as Cohere's `logit_scale` or the inverse of Granite's
    `logits_scaling`. softcap: c > 0, as Gemma's `final_logit_softcapping`.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.logit_scale) and self.logit_scale != 0.0):
            raise ConfigError(f"logit_scale is {self.logit_scale}; expected a finite number other than 0")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ConfigError(f"softcap is {self.softcap}; expected a finite number above 0, or None")


class Logits(NamedTuple):
    """Raw values [N, V] of one side, and what makes logits of them: softcap(scale * (value + bias))."""

    values_NV: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0  # 0: none


@dataclass(frozen=True)
class StatsSpec:
    """Everything but tensors that the two passes must know, small enough to travel as text through a torch operator."""

    temperature: float = 1.0
    teacher_temperature: float = 1.0
    forward_kl: bool = False
    jsd_beta: float = 0.0  # 0: none
    exact_kl: bool = False
    missing: str = "clamp"

    def encode(self) -> str:
        """As text, in a way that torch.compile can trace; `decode` gives it back."""
        return (
            f"{self.temperature} {self.teacher_temperature} {int(self.forward_kl)} {self.jsd_beta} "
            f"{int(self.exact_kl)} {self.missing}"
        )

    @staticmethod
    def decode(text: str) -> StatsSpec:
        """What `encode` wrote."""
        temperature, teacher_temperature, forward_kl, jsd_beta, exact_kl, missing = text.split()
        return StatsSpec(
            float(temperature), float(teacher_temperature), forward_kl == "1", float(jsd_beta), exact_kl == "1", missing
        )


class Row:
    """Rows of the statistics table [ROWS, N] that the first pass writes; the first five are differentiable."""

    STUDENT_LOGPROB, REVERSE_KL, ENTROPY, FORWARD_KL, JSD = range(5)
    TEACHER_LOGPROB, MISSING_MASS, FORWARD_MISSING_MASS, STUDENT_MIXTURE_KL = range(5, 9)
    STUDENT_MAX, STUDENT_LOG_SUM, TEACHER_MAX, TEACHER_LOG_SUM = range(9, 13)


TABLE_ROWS = 13
WEIGHT_ROWS = 5


class Partial:
    """Rows of a partial state [STATE_ROWS, N]: what is known of a row after some of its columns."""

    STUDENT_MAX, STUDENT_SUM, ENERGY, STUDENT_LOGIT = range(4)
    TEACHER_MAX, TEACHER_SUM, TEACHER_LOGIT = range(4, 7)
    RATIO, MISSING, FORWARD_RATIO, FORWARD_MISSING = range(7, 11)


STATE_ROWS = 11


def make_spec(temperature: float, options: StatsOptions) -> StatsSpec:
    """The spec of a call. Raises `ConfigError` on a bad temperature."""
    refuse_bad_temperature("temperature", temperature)
    teacher = temperature if options.teacher_temperature is None else options.teacher_temperature
    return StatsSpec(
        temperature=float(temperature),
        teacher_temperature=float(teacher),
        forward_kl=options.forward_kl,
        jsd_beta=options.jsd_beta or 0.0,
        exact_kl=options.exact_kl,
        missing=options.missing,
    )


def refuse_bad_temperature(name: str, value: float) -> None:
    """Raise `ConfigError` unless the value is a finite number above 0."""
    if not 0 < value < math.inf:  # in a form that torch.compile can trace
        raise ConfigError(f"{name} is {value}; expected a finite number above 0")


def read_table(table: Tensor, spec: StatsSpec, has_teacher: bool = True) -> TokenStats:
    """The public statistics of a table; gradients flow into its first five rows."""
    constants = table.detach()
    return TokenStats(
        student_logprob_N=table[Row.STUDENT_LOGPROB],
        teacher_logprob_N=constants[Row.TEACHER_LOGPROB],
        reverse_kl_N=table[Row.REVERSE_KL] if has_teacher else constants[Row.REVERSE_KL],
        entropy_N=table[Row.ENTROPY],
        forward_kl_N=table[Row.FORWARD_KL] if spec.forward_kl else None,
        jsd_N=table[Row.JSD] if spec.jsd_beta else None,
        missing_mass_N=constants[Row.MISSING_MASS],
    )


def stack_weights(
    weights: RowWeights, rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, tuple[bool, ...]]:
    """The weights as a table [5, N], and which of its rows are in use."""
    parts = _list_weights(weights)
    table = torch.zeros(WEIGHT_ROWS, rows, dtype=dtype, device=device)
    for row, part in enumerate(parts):
        if part is not None:
            table[row] = part
    return table, tuple(part is not None for part in parts)


def sum_weighted_stats(stats: TokenStats, weights: RowWeights, mask_N: Tensor | None) -> TokenStats:
    """The statistics with `loss_N`, the weighted sum of each row, and `loss`, the sum over rows; masked rows give 0."""
    loss_N = torch.zeros_like(stats.student_logprob_N)
    for value_N, weight_N in zip(_list_stats(stats), _list_weights(weights), strict=True):
        if weight_N is not None:
            assert value_N is not None
            # where: a weight of 0 leaves a row out, and 0 times its NaN would not.
            loss_N = loss_N + torch.where(weight_N == 0, 0.0, value_N * weight_N)
    if mask_N is not None:
        loss_N = torch.where(mask_N, loss_N, 0.0)
    return replace(detach_stats(stats), loss_N=loss_N.detach(), loss=loss_N.sum())


def detach_stats(stats: TokenStats) -> TokenStats:
    """The same values, all constants for autograd."""
    values: list[Any] = [getattr(stats, item.name) for item in fields(stats)]
    constants: list[Any] = [None if value is None else value.detach() for value in values]
    return TokenStats(*constants)


def _list_stats(stats: TokenStats) -> tuple[Tensor | None, ...]:
    return (stats.student_logprob_N, stats.reverse_kl_N, stats.entropy_N, stats.forward_kl_N, stats.jsd_N)


def _list_weights(weights: RowWeights) -> tuple[Tensor | None, ...]:
    return (
        weights.student_logprob_N,
        weights.reverse_kl_N,
        weights.entropy_N,
        weights.forward_kl_N,
        weights.jsd_N,
    )


def choose_dtype(student_NV: Tensor, teacher_NV: Tensor | None) -> torch.dtype:
    """The dtype of sums and statistics: fp32, or fp64 when either side is."""
    dtype = torch.promote_types(student_NV.dtype, torch.float32)
    return dtype if teacher_NV is None else torch.promote_types(dtype, teacher_NV.dtype)
