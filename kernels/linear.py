"""Statistics and gradients from hidden states and output heads, a chunk of rows at a time: [N, V] is never held.

For each chunk: logits of both sides by matrix products into buffers that are used again, the first pass over them, the
weights of its rows (from a loss on the statistics, or from upstream), the second pass, and the products that take the
gradient back to hidden states and head. README.md beside this file says what each mode costs.
"""

# N kept tokens, C rows of a chunk, V vocabulary, D hidden

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from imagine_opd.kernels import tuning
from imagine_opd.kernels.backends import load_backend
from imagine_opd.kernels.matmul import add_product, multiply, project
from imagine_opd.kernels.types import TABLE_ROWS, Logits, StatsSpec

Weigh = Callable[[slice, Tensor], tuple[Tensor, tuple[bool, ...]]]
"""Rows of a chunk and their statistics table to the weights [5, C] of the statistics, and which are in use."""


class Side(NamedTuple):
    """Student or teacher, ready to be projected: hidden states [N, D], head [V, D] and bias [V]."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float


@dataclass(frozen=True)
class LinearPlan:
    """Everything but tensors that a call needs; small enough to travel as text through a torch operator."""

    spec: StatsSpec
    backend: str
    vocabulary: int
    columns: int
    """Rows of the heads that are projected: the vocabulary, and padding that keeps rows aligned."""
    chunk_rows: int
    """0: chosen for the rows that are kept."""
    logits_dtype: str
    student_dtype: str
    """Of the student's operands in matrix products."""
    teacher_dtype: str
    student_scale: float = 1.0
    student_softcap: float = 0.0
    teacher_scale: float = 1.0
    teacher_softcap: float = 0.0
    min_memory: bool = False

    def encode(self) -> str:
        """As text, in a way that torch.compile can trace; `decode` gives it back."""
        return (
            f"{self.spec.encode()};{self.backend};{self.vocabulary};{self.columns};{self.chunk_rows};"
            f"{self.logits_dtype};{self.student_dtype};{self.teacher_dtype};{self.student_scale};{self.student_softcap};"
            f"{self.teacher_scale};{self.teacher_softcap};{int(self.min_memory)}"
        )

    @staticmethod
    def decode(text: str) -> LinearPlan:
        """What `encode` wrote."""
        words = text.split(";")
        student_scale, student_softcap, teacher_scale, teacher_softcap = map(float, words[8:12])
        return LinearPlan(
            spec=StatsSpec.decode(words[0]),
            backend=words[1],
            vocabulary=int(words[2]),
            columns=int(words[3]),
            chunk_rows=int(words[4]),
            logits_dtype=words[5],
            student_dtype=words[6],
            teacher_dtype=words[7],
            student_scale=student_scale,
            student_softcap=student_softcap,
            teacher_scale=teacher_scale,
            teacher_softcap=teacher_softcap,
            min_memory=words[12] == "1",
        )


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """In the student's hidden states [N, D], head [V, D] and bias [V], sums in fp32 or wider; `None`: not asked for."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


def make_side(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, dtype: str, scale: float, softcap: float
) -> Side:
    """The operands in the dtype of the matrix products."""
    operand_dtype = getattr(torch, dtype)
    bias_V = None if bias_V is None else bias_V.detach().contiguous()
    return Side(hidden_ND.detach().to(operand_dtype), weight_VD.detach().to(operand_dtype), bias_V, scale, softcap)


def split_chunks(rows: int, height: int) -> Iterator[slice]:
    """Chunks of equal height but the last."""
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


def run_chunks(
    student: Side,
    teacher: Side | None,
    ids_N: Tensor,
    plan: LinearPlan,
    table: Tensor | None = None,
    weigh: Weigh | None = None,
    gradients: Gradients | None = None,
) -> Tensor:
    """The statistics table [13, N]; with `weigh`, gradients are added to `gradients` on the way.

    `table`: the statistics where they are known already, so that only gradients are made.
    """
    backend = load_backend(plan.backend)
    rows = len(ids_N)
    height, group_rows = choose_heights(student, teacher, plan, rows, gradients)
    project_chunk = ChunkProjector(student, teacher, plan, min(height, rows), group_rows)
    group = None if gradients is None else GradientGroup(project_chunk, gradients, plan.vocabulary)
    if table is None:
        out = torch.zeros(TABLE_ROWS, rows, dtype=project_chunk.stats_dtype, device=ids_N.device)
    else:
        out = table
    for chunk in split_chunks(rows, height):
        student_logits, teacher_logits = project_chunk(chunk)
        if table is None:
            out[:, chunk] = backend.compute_stats(
                student_logits, teacher_logits, ids_N[chunk], plan.spec, plan.vocabulary
            )
        if weigh is None or group is None:
            continue
        weights_5C, uses = weigh(chunk, out[:, chunk])
        if not any(uses):
            group.close()
            continue
        weights_5C, factor = scale_weights(weights_5C, student.hidden_ND.dtype)
        used_C = (weights_5C != 0).any(0)
        backend.compute_gradient(
            student_logits,
            teacher_logits,
            ids_N[chunk],
            out[:, chunk],
            weights_5C,
            uses,
            plan.spec,
            plan.vocabulary,
            group.get_buffer(chunk),
        )
        group.add(used_C, factor)
    if group is not None:
        group.close()
    return out


def choose_heights(
    student: Side, teacher: Side | None, plan: LinearPlan, rows: int, gradients: Gradients | None
) -> tuple[int, int]:
    """Rows of a chunk, and of the chunks that share the products with head and hidden states.

    By memory, and by how well the products fill the device.
    """
    if plan.chunk_rows:
        return (height := min(plan.chunk_rows, max(rows, 1))), height
    device, (_, hidden) = student.hidden_ND.device, student.hidden_ND.shape
    operand_dtype = student.hidden_ND.dtype
    logits_bytes = (1 if teacher is None else 2) * getattr(torch, plan.logits_dtype).itemsize * plan.columns
    # Else the gradient takes the logits' place.
    gradient_bytes = 0 if plan.logits_dtype == plan.student_dtype else operand_dtype.itemsize * plan.columns
    trains_head = gradients is not None and gradients.weight_VD is not None
    is_measured = teacher is not None and gradient_bytes > 0
    groups = is_measured and trains_head and device.type == "cuda" and operand_dtype != torch.float16
    if groups and tuning.find_measured_rows(hidden, trains_head, device) is None:
        head_bytes = student.weight_VD.numel() * (4 - operand_dtype.itemsize)
        found = tuning.choose_group(rows, logits_bytes, gradient_bytes, head_bytes)
        if found is not None:
            return found
    height = tuning.choose_chunk_rows(
        rows, hidden, logits_bytes + gradient_bytes, trains_head, device, is_measured=is_measured
    )
    return height, height


class GradientGroup:
    """Gradients of chunks that follow one another, until they go back to hidden states and head in one product."""

    def __init__(self, project_chunk: ChunkProjector, gradients: Gradients, vocabulary: int) -> None:
        self.project_chunk, self.gradients = project_chunk, gradients
        # Without the padding: its gradient is 0, but what the head holds there need not be finite.
        self.tokens = slice(0, vocabulary)
        self.rows = slice(0, 0)
        self.is_first = True
        self.used: list[Tensor] = []
        self.factor: Tensor | None = None

    def get_buffer(self, chunk: slice) -> Tensor:
        """Where the chunk's gradient goes."""
        self.rows = slice(self.rows.start if self.used else chunk.start, chunk.stop)
        return self._get_buffer()[chunk.start - self.rows.start :]

    def add(self, used_C: Tensor, factor: Tensor | None) -> None:
        """Note that the last chunk's gradient stands in the buffer; with a factor it must be alone there."""
        self.used.append(used_C)
        self.factor = factor
        if self.rows.stop - self.rows.start + self.project_chunk.height > self.project_chunk.group_rows:
            self.close()

    def close(self) -> None:
        """Take what there is back."""
        if self.used:
            used_G = self.used[0] if len(self.used) == 1 else torch.cat(self.used)
            grad_GV = self._get_buffer()[:, self.tokens]
            student = self.project_chunk.student
            add_gradients(
                self.gradients, self.rows, student, grad_GV, self.factor, self.tokens, used_G, first_rows=self.is_first
            )
            self.is_first = False
        self.used = []

    def _get_buffer(self) -> Tensor:
        return self.project_chunk.get_gradient_buffer(self.rows.stop - self.rows.start)


class ChunkProjector:
    """Logits of both sides for a chunk of rows, in buffers that the next chunk uses again."""

    def __init__(
        self, student: Side, teacher: Side | None, plan: LinearPlan, height: int, group_rows: int | None = None
    ) -> None:
        self.student, self.teacher, self.columns = student, teacher, plan.columns
        self.logits_dtype: torch.dtype = getattr(torch, plan.logits_dtype)
        self.stats_dtype = torch.promote_types(self.logits_dtype, torch.float32)
        self.shares_head = shares_head(student, teacher)
        device = student.hidden_ND.device
        sides = 1 if teacher is None else 2
        self.logits = torch.empty(sides * height, plan.columns, dtype=self.logits_dtype, device=device)
        self.height = height
        self.group_rows = group_rows or height
        takes_place = student.hidden_ND.dtype == self.logits_dtype and self.group_rows == height
        self.gradient = self.logits if takes_place else None

    def __call__(self, chunk: slice) -> tuple[Logits, Logits | None]:
        height = chunk.stop - chunk.start
        student_CV = self.logits[:height]
        student, teacher = self.student, self.teacher
        weight_VD = student.weight_VD[: self.columns]
        if teacher is None:
            project(student.hidden_ND[chunk], weight_VD, student_CV)
            return self._wrap(student, student_CV), None
        teacher_CV = self.logits[height : 2 * height]
        if self.shares_head:
            # One product of twice the rows fills a GPU better.
            both_ND = torch.cat([student.hidden_ND[chunk], teacher.hidden_ND[chunk]])
            project(both_ND, weight_VD, self.logits[: 2 * height])
        else:
            project(student.hidden_ND[chunk], weight_VD, student_CV)
            project(teacher.hidden_ND[chunk], teacher.weight_VD[: self.columns], teacher_CV)
        return self._wrap(student, student_CV), self._wrap(teacher, teacher_CV)

    def get_gradient_buffer(self, rows: int) -> Tensor:
        """Where the gradient of so many rows goes: each depends on its own logit alone, and takes its place if it
        fits."""
        if self.gradient is None:
            height = min(self.group_rows, len(self.student.hidden_ND))
            self.gradient = torch.empty(
                height, self.columns, dtype=self.student.hidden_ND.dtype, device=self.logits.device
            )
        return self.gradient[:rows]

    def _wrap(self, side: Side, values_CV: Tensor) -> Logits:
        return Logits(values_CV, side.bias_V, side.scale, side.softcap)


def shares_head(student: Side, teacher: Side | None) -> bool:
    """Whether one product can serve both sides: the same weights in memory, on a GPU.

    Not on CPU: there is no gain, and rows of one product need not be summed in the same order, which would turn
    identical views into a KL of 1e-12 instead of 0.
    """
    return (
        teacher is not None
        and student.weight_VD.is_cuda
        and is_same_memory(student.weight_VD, teacher.weight_VD)
        and student.hidden_ND.dtype == teacher.hidden_ND.dtype
    )


def is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, detached or not, are the same numbers in memory."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )


def allocate_gradients(student: Side, needs: Needs, hidden_dtype: torch.dtype, min_memory: bool) -> Gradients:
    """Buffers of the gradients asked for, zeroed: hidden states in their own dtype, head and bias fp32 or wider."""
    operand_dtype = student.hidden_ND.dtype
    sum_dtype = torch.promote_types(operand_dtype, torch.float32)
    # Wide where parts are added up, and for fp16, until the upstream gradient is in: a loss that is scaled in backward
    # is not scaled yet.
    is_wide = min_memory or operand_dtype == torch.float16
    hidden_dtype = sum_dtype if is_wide else torch.promote_types(hidden_dtype, operand_dtype)
    device = student.hidden_ND.device
    return Gradients(
        torch.zeros(student.hidden_ND.shape, dtype=hidden_dtype, device=device) if needs.hidden else None,
        torch.zeros(student.weight_VD.shape, dtype=sum_dtype, device=device) if needs.weight else None,
        torch.zeros(len(student.weight_VD), dtype=sum_dtype, device=device) if needs.bias else None,
    )


def scale_weights(weights_5C: Tensor, operand_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """For fp16 gradients: weights whose largest is 1, and the factor taken out, or small gradients would underflow."""
    if operand_dtype != torch.float16:
        return weights_5C, None
    peak = weights_5C.abs().amax()
    peak = torch.where((peak > 0) & peak.isfinite(), peak, torch.ones_like(peak))
    return weights_5C / peak, peak


def add_gradients(
    gradients: Gradients,
    rows: slice,
    student: Side,
    grad_CV: Tensor,
    factor: Tensor | None,
    columns: slice,
    used_C: Tensor,
    *,
    first_part: bool = True,
    first_rows: bool = False,
) -> None:
    """Take a block of the logits' gradient back to hidden states, head and bias.

    `columns`: the block's rows of the head. `used_C`: rows with a gradient; the hidden states of the others may hold
    NaN. `first_part`: nothing stands in the hidden states' gradient yet; `first_rows`: nothing in the head's.
    """
    if gradients.hidden_ND is not None:
        weight_VD = student.weight_VD[columns]
        if first_part and factor is None:
            multiply(grad_CV, weight_VD, gradients.hidden_ND[rows])
        else:
            add_product(gradients.hidden_ND[rows], grad_CV, weight_VD, factor)
    if gradients.weight_VD is not None:
        hidden_CD = torch.where(used_C[:, None], student.hidden_ND[rows], 0.0)  # 0 * NaN would be NaN
        if first_rows and factor is None:
            multiply(grad_CV.t(), hidden_CD, gradients.weight_VD[columns])
        else:
            add_product(gradients.weight_VD[columns], grad_CV.t(), hidden_CD, factor)
    if gradients.bias_V is not None:
        total_V = grad_CV.sum(0, dtype=gradients.bias_V.dtype)
        gradients.bias_V[columns] += total_V if factor is None else total_V * factor
