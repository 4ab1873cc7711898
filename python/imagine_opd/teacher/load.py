"""The teacher of a run: which weights teach, where they are, and who cannot."""

from __future__ import annotations

from typing import Any

import torch

from imagine_opd.errors import ConfigError, TeacherError
from imagine_opd.models import get_head, has_adapter, load_model, load_processor
from imagine_opd.parallel import gather_parameters, is_zero3
from imagine_opd.teacher.ema import EmaAdapterTeacher, EmaTeacher
from imagine_opd.teacher.kinds import (
    TEACHER_FILE,
    AdapterOffTeacher,
    HeldTeacher,
    LiveTeacher,
    Teacher,
    copy_model,
    refuse_zero3,
)

__all__ = ["MOVING_TEACHER", "TEACHER_FILE", "Teacher", "build_teacher", "refuse_other_vocabulary"]

MOVING_TEACHER = (
    "the teacher moves with the student (teacher_model_kind={kind!r}): what the student drops, such a teacher soon no "
    "longer asks for, and runs have collapsed with a loss that looked perfect; watch eval accuracy, length and tag rate"
)


def build_teacher(
    student: Any,
    processor: Any,
    teacher: Any = None,
    dtype: str = "float32",
    *,
    kind: str = "base",
    placement: str = "auto",
    teacher_dtype: str | None = None,
    update_rate: float = 0.05,
    sync_steps: int = 1,
) -> Teacher:
    """The teacher of `student`, which must be as it will train (adapter on, frozen what is frozen) and not wrapped.

    teacher: a checkpoint or model of its own, loaded in `teacher_dtype` or `dtype`; `None`: the student's weights as
        they are now. With an adapter these are the base weights, and are not copied.
    placement: `device`, `cpu` (weights in host memory, brought in block by block), or what the memory planner says;
        `auto` is `device`.

    Raises `TeacherError` for a vocabulary that is not the student's, `ConfigError` for what does not go together.
    """
    if kind not in ("base", "ema", "live"):
        raise ConfigError(f"teacher_model_kind={kind!r}: expected base, ema or live")
    on_cpu = placement == "cpu"
    if teacher is not None:
        if kind != "base":
            raise ConfigError(
                f"teacher= names weights of its own, teacher_model_kind={kind!r} makes them of the student: "
                "leave out teacher=, or set teacher_model_kind='base'"
            )
        if teacher is student:
            raise TeacherError("teacher is the student itself: its weights would move; leave it out for a frozen copy")
        module = load_model(teacher, teacher_dtype or dtype)
        if is_zero3(module):  # split while it was loaded
            with gather_parameters(module):
                module = copy_model(module)
        refuse_other_vocabulary(student, module, processor, teacher)
        return HeldTeacher(module, "cpu" if on_cpu else "copy", equals_student=False)
    if kind == "live":
        return LiveTeacher()
    if kind == "ema":
        refuse_zero3(student)
    if has_adapter(student):
        if on_cpu or teacher_dtype is not None:
            named = "teacher_placement='cpu'" if on_cpu else f"teacher_dtype={teacher_dtype!r}"
            raise ConfigError(f"{named}: with an adapter the teacher is the student's base weights; leave it out")
        return AdapterOffTeacher(student) if kind == "base" else EmaAdapterTeacher(student, update_rate, sync_steps)
    wanted = None if teacher_dtype is None else getattr(torch, teacher_dtype)
    module = copy_model(student, wanted, "cpu" if on_cpu else None)
    equal = all(a.dtype == b.dtype for a, b in zip(student.parameters(), module.parameters(), strict=True))
    if kind == "base":
        return HeldTeacher(module, "cpu" if on_cpu else "copy", equal)
    return EmaTeacher(student, module, "cpu" if on_cpu else "copy", equal, update_rate, sync_steps)


def refuse_other_vocabulary(student: Any, teacher: Any, processor: Any, source: Any) -> None:
    """Raise `TeacherError` unless both heads are of one size and the tokenizers, where both are known, are equal."""
    student_size, teacher_size = (len(get_head(model).weight_VD) for model in (student, teacher))
    if student_size != teacher_size:
        raise TeacherError(
            f"the teacher's vocabulary has {teacher_size} entries, the student's {student_size}: "
            f"{_advise_size(student_size, teacher_size, max(processor.tokenizer.get_vocab().values()) + 1)}"
        )
    if not isinstance(source, torch.nn.Module):
        other = load_processor(None, source).tokenizer.get_vocab()
        mine = processor.tokenizer.get_vocab()
        if other != mine:
            differing = sorted(token for token in mine.keys() | other.keys() if mine.get(token) != other.get(token))
            raise TeacherError(
                f"the teacher's tokenizer differs from the student's in {len(differing)} tokens "
                f"(first: {differing[0]!r}): use a teacher with the same tokenizer"
            )


def _advise_size(student_size: int, teacher_size: int, words: int) -> str:
    """How two heads become of one size. Rows behind the tokenizer's last word are padding: cutting them loses nothing,
    while rows added to the shorter head would be new words that no one trained."""
    smaller, larger = sorted((student_size, teacher_size))
    if words > smaller:
        return f"the tokenizer has {words} words; use a teacher of the same family, whose tokenizer is the student's"
    longer = "teacher" if teacher_size > student_size else "student"
    return (
        f"the student's tokenizer has {words} words. Where the teacher's is the same, entries {smaller} to "
        f"{larger - 1} are padding: cut them with {longer}.resize_token_embeddings({smaller}), so that vocab_size is "
        f"the same in both, and pass the loaded {longer}. Else use a teacher of the same family"
    )
