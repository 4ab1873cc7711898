"""A teacher watched through the run: what it said of its own completions before step 0, and whether it still does.

`record_teacher` keeps the teacher's greedy completions of a few rows and their log-probs. Sampled and scored log-probs
must agree under the teacher's own view (else it scores other positions, or with another side's), and a frozen teacher
must give the same ones at every later check. Later checks sample nothing: they work on sharded weights too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from imagine_opd.errors import TeacherError
from imagine_opd.kernels import TokenStats, linear_token_stats
from imagine_opd.models import get_head
from imagine_opd.positions import own_positions
from imagine_opd.rollout import HFEngine, SamplingConfig
from imagine_opd.scoring import score_side
from imagine_opd.teacher.checks import refuse_blind_prompts
from imagine_opd.types import Prompt, PromptPair, Rollouts

# N response tokens

Runner = Callable[[Callable[[Any], TokenStats]], TokenStats]
"""Runs a function on a model's module, however its weights are held: `lambda function: function(model)`."""

DRIFT_LIMIT = 0.1  # nats a token; bf16 activations differ by 0.01 to 0.05 between a cached and a whole forward
_CHANGE_LIMIT = 0.02  # nats, of the same forward of the same weights
_UNIFORM_MARGIN = 0.02


@dataclass(frozen=True, slots=True)
class TeacherRecord:
    """Prompts of both sides, the teacher's greedy completions, the log-probs it gave their tokens, and the mean
    difference of these from those it sampled with."""

    pairs: tuple[PromptPair, ...]
    rollouts: Rollouts
    logprobs_N: torch.Tensor
    drift: float


def record_teacher(
    teacher: Any, pairs: Sequence[PromptPair], engine: HFEngine, max_completion_length: int
) -> TeacherRecord:
    """What the teacher says under its own view. Raises `TeacherError` when it is scored otherwise than it wrote."""
    prompts = [pair.teacher for pair in pairs]
    rollouts = engine.generate(teacher, prompts, SamplingConfig(max_completion_length, temperature=0.0))
    mask_BT = rollouts.completion_mask_BT
    if not mask_BT.any():
        raise TeacherError(f"the teacher wrote nothing for {len(prompts)} probe rows: its first token is an end token")
    logprobs_N = _score_completions(teacher, prompts, rollouts, engine.token_ids.pad, "teacher").student_logprob_N
    drift = float((logprobs_N - rollouts.sampling_logprobs_BT[mask_BT]).abs().mean())
    if not drift <= DRIFT_LIMIT:
        raise TeacherError(
            f"the teacher's own completions are scored {drift:.3g} nats per token away from how it wrote them (limit "
            f"{DRIFT_LIMIT}): it is misaligned, its scores belong to other positions or another prompt"
        )
    return TeacherRecord(tuple(pairs), rollouts, logprobs_N.cpu(), drift)


def check_teacher_again(
    record: TeacherRecord,
    run_student: Runner,
    run_teacher: Runner,
    pad_id: int,
    vocabulary_size: int,
    step: int,
    *,
    is_frozen: bool,
) -> dict[str, float]:
    """The periodic check: `teacher/change`, `teacher/teacher_entropy` and the `teacher/privilege_gap` still left.

    Raises `TeacherError` for a teacher that has died, or that has changed though `is_frozen`.
    """

    def score(side: str) -> Callable[[Any], TokenStats]:
        prompts = [getattr(pair, side) for pair in record.pairs]
        return lambda module: _score_completions(module, prompts, record.rollouts, pad_id, side)

    teacher, student = run_teacher(score("teacher")), run_student(score("student"))
    entropy = float(teacher.entropy_N.mean())
    change = float((teacher.student_logprob_N.cpu() - record.logprobs_N).abs().max())
    if not math.isfinite(entropy):
        raise TeacherError(
            f"at step {step} the teacher's entropy is {entropy}: its weights hold NaN or infinity; resume from an "
            "earlier checkpoint"
        )
    if entropy > (1.0 - _UNIFORM_MARGIN) * math.log(vocabulary_size):
        raise TeacherError(
            f"at step {step} the teacher is uniform: entropy {entropy:.3f} of at most {math.log(vocabulary_size):.3f} "
            "nats; its weights are lost"
        )
    if is_frozen and not change <= _CHANGE_LIMIT:
        raise TeacherError(
            f"at step {step} the frozen teacher's log-probs differ from those before step 0 by {change:.3g} nats "
            f"(limit {_CHANGE_LIMIT}): its weights or its view have changed; resume from an earlier checkpoint"
        )
    gap = float((teacher.student_logprob_N - student.student_logprob_N).mean())
    return {"teacher/change": change, "teacher/teacher_entropy": entropy, "teacher/privilege_gap": gap}


def refuse_blind_batch(pairs: Sequence[PromptPair]) -> None:
    """Raise `TeacherError` when a prompt of a step carries pixels that are absent, zero or not its image tokens'."""
    refuse_blind_prompts([pair.student for pair in pairs], "student")
    refuse_blind_prompts([pair.teacher for pair in pairs], "teacher")


def refuse_drift(drift: float, step: int) -> None:
    """Raise `TeacherError` when a step's completions are scored otherwise than they were sampled."""
    if not drift <= DRIFT_LIMIT and not math.isnan(drift):  # NaN is the business of the non-finite guard
        raise TeacherError(
            f"at step {step} the student's completions are scored {drift:.3g} nats per token away from how they were "
            f"sampled (limit {DRIFT_LIMIT}): sampling and scoring do not see the same prompt or weights, or the model "
            "drops out while it trains (set its dropout to 0; teacher_checks=False leaves this check out)"
        )


class TeacherWatchCallback(TrainerCallback):
    """Calls each `(every_steps, check)` as `check(step)` at the end of every so many steps (0: never), and looks at the
    `rollout_drift` of each log."""

    def __init__(self, *checks: tuple[int, Callable[[int], None]]) -> None:
        self.checks = checks

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for every_steps, check in self.checks:
            if every_steps and state.global_step % every_steps == 0:
                check(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "rollout_drift" in logs and getattr(args, "teacher_checks", True):
            refuse_drift(float(logs["rollout_drift"]), state.global_step)


def _score_completions(model: Any, prompts: Sequence[Prompt], rollouts: Rollouts, pad_id: int, side: str) -> TokenStats:
    mask_BT = rollouts.completion_mask_BT
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            with own_positions(model, prompts, rollouts, pad_id, side):
                hidden_ND = score_side(model, prompts, rollouts, mask_BT, pad_id)
            ids_N = rollouts.completion_ids_BT[mask_BT]
            return linear_token_stats(hidden_ND, get_head(model), None, None, ids_N)
    finally:
        model.train(was_training)
