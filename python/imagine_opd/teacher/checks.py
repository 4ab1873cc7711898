"""The checks that a teacher can teach, before step 0 and later.

A teacher that is dead, blind or looks at the wrong view gives a loss that looks fine; each check turns one such
silence into a `TeacherError` or a logged number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from imagine_opd.adapters import count_features
from imagine_opd.compact import mirror_pixels
from imagine_opd.errors import TeacherError
from imagine_opd.kernels import TokenStats, linear_token_stats
from imagine_opd.models import get_head
from imagine_opd.parallel import gather_parameters
from imagine_opd.positions import own_positions
from imagine_opd.rollout import HFEngine, SamplingConfig
from imagine_opd.scoring import score_side
from imagine_opd.teacher.kinds import HeldTeacher, Teacher
from imagine_opd.types import Prompt, PromptPair, Rollouts

_DRIFT_LIMIT = 0.05
_ROLLOUT_DRIFT_LIMIT = 0.1  # bf16 activations differ by 0.01 to 0.05 between a cached and a whole forward
_UNIFORM_MARGIN = 0.02
_IMAGE_LIMIT = 1e-6  # of the largest hidden state; a forward repeated on the same inputs gives 0


@dataclass(frozen=True, slots=True)
class TeacherReport:
    """What the start-up checks measured, in nats per token on the probe rows.

    rollout_drift: mean |log-prob when sampled - log-prob when scored| of the student's own completions: the two
        paths through the model must agree (0 up to rounding).
    teacher_drift: the same of the teacher's own greedy completions under its view.
    image_effect_student, image_effect_teacher: largest change of a side's hidden states when its pixels are negated,
        of the largest hidden state: 0 when no image reaches the language model.
    identical_view_drift: largest |log p_S - log p_T| with both sides under the student's view (0 for a copy).
    teacher_entropy: mean entropy of the teacher under its own view; ln V would be a dead teacher.
    privilege_gap: mean log-prob of the teacher's own greedy trace under its view, minus under the student's: what
        the evidence is worth. Near 0 there is nothing to learn.
    image_tokens_student, image_tokens_teacher: mean image tokens of a prompt.
    """

    rows: int
    rollout_drift: float
    teacher_drift: float
    image_effect_student: float
    image_effect_teacher: float
    identical_view_drift: float
    teacher_entropy: float
    privilege_gap: float
    image_tokens_student: float
    image_tokens_teacher: float

    def as_metrics(self) -> dict[str, float]:
        """The fields as `teacher/...` metrics."""
        return {f"teacher/{name}": float(value) for name, value in asdict(self).items()}


def check_teacher(
    student: Any,
    teacher: Teacher | nn.Module,
    pairs: Sequence[PromptPair],
    engine: HFEngine,
    sampling: SamplingConfig,
    seed: int,
    expect_identical: bool,
) -> TeacherReport:
    """Run the start-up checks on a few rows. Raises `TeacherError`; trains nothing and leaves the random state alone.

    student: as it is, or wrapped and split over the processes: all of them call this then, and weights are whole on
        each while it runs, one side's at a time.
    expect_identical: teacher and student hold the same weights now, so under one view they must agree.
    """
    teacher = HeldTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
    pad_id = engine.token_ids.pad
    was_training = student.training
    student.eval()
    greedy = SamplingConfig(sampling.max_completion_length, temperature=0.0)
    try:
        with gather_parameters(student) as whole:
            refuse_blind_prompts([pair.student for pair in pairs], "student", whole)
            rollout_drift = measure_rollout_drift(whole, [pair.student for pair in pairs], engine, sampling, seed)
        with teacher.gathered(student) as module:
            size = len(get_head(module).weight_VD)
            refuse_blind_prompts([pair.teacher for pair in pairs], "teacher", module)
            own = engine.generate(module, [pair.teacher for pair in pairs], greedy)
            if not own.completion_mask_BT.any():
                raise TeacherError(f"the teacher wrote nothing for {len(pairs)} probe rows: its first token is an end")
            entropy, teacher_drift = _score_own(module, [pair.teacher for pair in pairs], own, pad_id)
            image_effect_teacher = measure_image_effect(module, [pair.teacher for pair in pairs], own, pad_id)
        with gather_parameters(student) as whole:
            image_effect_student = measure_image_effect(whole, [pair.student for pair in pairs], own, pad_id)
        seen = _score_views(student, teacher, pairs, own, pad_id, "teacher")
        same = _score_views(student, teacher, pairs, own, pad_id, "student")
    finally:
        student.train(was_training)
    report = TeacherReport(
        rows=len(pairs),
        rollout_drift=rollout_drift,
        teacher_drift=teacher_drift,
        image_effect_student=image_effect_student,
        image_effect_teacher=image_effect_teacher,
        identical_view_drift=float((same.student_logprob_N - same.teacher_logprob_N).abs().max()),
        teacher_entropy=entropy,
        privilege_gap=float((seen.teacher_logprob_N - seen.student_logprob_N).mean()),
        image_tokens_student=_mean_image_tokens([pair.student for pair in pairs]),
        image_tokens_teacher=_mean_image_tokens([pair.teacher for pair in pairs]),
    )
    refuse_bad_report(report, size, expect_identical)
    return report


def measure_rollout_drift(
    student: Any, prompts: Sequence[Prompt], engine: HFEngine, sampling: SamplingConfig, seed: int
) -> float:
    """Mean |log p when sampled - log p when scored| of the student's completions, at the sampling temperature."""
    rollouts = engine.generate(student, prompts, sampling, seed)
    mask_BT = rollouts.completion_mask_BT
    if not mask_BT.any():
        return 0.0
    pad_id = engine.token_ids.pad
    with torch.no_grad():
        with own_positions(student, prompts, rollouts, pad_id, "student"):
            hidden_ND = score_side(student, prompts, rollouts, mask_BT, pad_id)
        ids_N = rollouts.completion_ids_BT[mask_BT]
        stats = linear_token_stats(hidden_ND, get_head(student), None, None, ids_N, temperature=sampling.temperature)
    return float((stats.student_logprob_N - rollouts.sampling_logprobs_BT[mask_BT]).abs().mean())


def measure_image_effect(model: Any, prompts: Sequence[Prompt], rollouts: Rollouts, pad_id: int) -> float:
    """Largest change of the hidden states at the completions' tokens when every pixel is negated, of the largest."""
    negated = [replace(prompt, view=mirror_pixels(prompt.view)) for prompt in prompts]
    mask_BT = rollouts.completion_mask_BT
    with torch.no_grad():
        seen_ND, other_ND = (score_side(model, shown, rollouts, mask_BT, pad_id) for shown in (prompts, negated))
        return float((seen_ND - other_ND).abs().max() / seen_ND.abs().max().clamp_min(1e-30))


def refuse_blind_prompts(prompts: Sequence[Prompt], side: str, model: Any = None) -> None:
    """`refuse_blind_prompt` of each; and where pixels are bytes, of which zeros may be a black image, of all together:
    raise `TeacherError` when none of them holds anything else."""
    for prompt in prompts:
        refuse_blind_prompt(prompt, side, model)
    if prompts and not any(prompt.view.pixel_values.any() for prompt in prompts):
        raise TeacherError(
            f"the {side}'s pixels of all {len(prompts)} prompts are all zero: it would learn blind; check the images "
            "and views"
        )


def refuse_blind_prompt(prompt: Prompt, side: str, model: Any = None) -> None:
    """Raise `TeacherError` when a prompt's pixels are absent, all zero, or do not match its image tokens, nor, where a
    model is given, the features that it makes of each image."""
    view = prompt.view
    counts = view.frame_counts
    if sum(counts) != len(view.pixel_values):
        unit = "patches" if len(view.image_grid_thw) else "frames"
        raise TeacherError(f"the {side}'s grid says {sum(counts)} {unit}, its pixels hold {len(view.pixel_values)}")
    start = 0
    for index, count in enumerate(counts):
        if view.pixel_values.dtype != np.uint8 and not view.pixel_values[start : start + count].any():
            raise TeacherError(
                f"the {side}'s pixels of image {index} are all zero: it would learn blind; check the images and views"
            )
        start += count
    tokens = sum(prompt.mm_token_type_ids)
    if tokens == 0 or tokens != sum(prompt.image_tokens):
        placed = sum(prompt.image_tokens)
        raise TeacherError(f"the {side}'s prompt holds {tokens} image tokens where its pixels give {placed}")
    if model is None:
        return
    features = count_features(prompt.family, view, model)
    for index, (placed, made) in enumerate(zip(prompt.image_tokens, features, strict=True)):
        if placed != made:
            raise TeacherError(
                f"image {index} has {placed} tokens in the {side}'s prompt, the model makes {made} features of it: "
                "processor and model are not of one checkpoint"
            )


def refuse_bad_report(report: TeacherReport, vocabulary_size: int, expect_identical: bool) -> None:
    """Raise `TeacherError` for a dead, misaligned or blind teacher, a blind student, or copies that disagree under one
    view."""
    if not math.isfinite(report.teacher_entropy):
        raise TeacherError(f"the teacher's entropy is {report.teacher_entropy}: its weights hold NaN or infinity")
    uniform = math.log(vocabulary_size)
    if report.teacher_entropy > (1.0 - _UNIFORM_MARGIN) * uniform:
        raise TeacherError(
            f"the teacher is uniform: entropy {report.teacher_entropy:.3f} of at most {uniform:.3f} nats; "
            "its weights look lost or untrained"
        )
    if not report.rollout_drift <= _ROLLOUT_DRIFT_LIMIT:
        raise TeacherError(
            f"the student's completions are scored {report.rollout_drift:.3g} nats per token away from how they were "
            f"sampled (limit {_ROLLOUT_DRIFT_LIMIT}): the model does not see the same prompt in both"
        )
    if not report.teacher_drift <= _ROLLOUT_DRIFT_LIMIT:
        raise TeacherError(
            f"the teacher's own completions are scored {report.teacher_drift:.3g} nats per token away from how it "
            f"wrote them (limit {_ROLLOUT_DRIFT_LIMIT}): it is misaligned, its scores belong to other positions or "
            "another prompt"
        )
    for side, effect in (("student", report.image_effect_student), ("teacher", report.image_effect_teacher)):
        if not effect > _IMAGE_LIMIT:
            raise TeacherError(
                f"the {side} is blind: its hidden states stay as they are when the pixels of its images are negated "
                f"(change {effect:.3g}); its vision weights are lost, or its images do not reach the language model"
            )
    if expect_identical and not report.identical_view_drift <= _DRIFT_LIMIT:
        raise TeacherError(
            f"teacher and student hold the same weights and saw the same view, yet their log-probs differ by "
            f"{report.identical_view_drift:.3g} nats (limit {_DRIFT_LIMIT}): one of them lost its weights or its view"
        )


def _score_views(
    student: Any, teacher: Teacher, pairs: Sequence[PromptPair], rollouts: Rollouts, pad_id: int, teacher_view: str
) -> TokenStats:
    """Both sides at the completions' tokens: the student under its own view, the teacher under the one named."""
    mask_BT = rollouts.completion_mask_BT
    prompts = [getattr(pair, teacher_view) for pair in pairs]
    with torch.no_grad():
        with teacher.gathered(student) as module, own_positions(module, prompts, rollouts, pad_id, "teacher"):
            teacher_hidden_ND = score_side(module, prompts, rollouts, mask_BT, pad_id)
        with gather_parameters(student) as whole, teacher.open_head(student) as head:
            student_hidden_ND = score_side(whole, [pair.student for pair in pairs], rollouts, mask_BT, pad_id)
            ids_N = rollouts.completion_ids_BT[mask_BT]
            return linear_token_stats(student_hidden_ND, get_head(whole), teacher_hidden_ND, head, ids_N)


def _score_own(teacher: Any, prompts: Sequence[Prompt], rollouts: Rollouts, pad_id: int) -> tuple[float, float]:
    """Mean entropy of the teacher on its own completions, and mean |log-prob when written - when scored|."""
    mask_BT = rollouts.completion_mask_BT
    with torch.no_grad():
        with own_positions(teacher, prompts, rollouts, pad_id, "teacher"):
            hidden_ND = score_side(teacher, prompts, rollouts, mask_BT, pad_id)
        ids_N = rollouts.completion_ids_BT[mask_BT]
        stats = linear_token_stats(hidden_ND, get_head(teacher), None, None, ids_N)
    drift_N = (stats.student_logprob_N - rollouts.sampling_logprobs_BT[mask_BT]).abs()
    return float(stats.entropy_N.mean()), float(drift_N.mean())


def _mean_image_tokens(prompts: Sequence[Prompt]) -> float:
    return sum(sum(prompt.mm_token_type_ids) for prompt in prompts) / len(prompts)
