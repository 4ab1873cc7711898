"""The teacher: the student's initial weights, frozen, and the fingerprint a checkpoint knows it by."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from imagine_opd.errors import TeacherError
from imagine_opd.models import get_head, load_model, load_processor

TEACHER_FILE = "teacher.json"


def build_teacher(student: Any, processor: Any, teacher: Any = None, dtype: str = "float32") -> Any:
    """A frozen teacher in eval mode: a copy of `student`, or the checkpoint or model given.

    Raises `TeacherError` when its vocabulary is not the student's.
    """
    if teacher is None:
        built = copy.deepcopy(student)
    else:
        built = load_model(teacher, dtype)
        if built is student:
            raise TeacherError("teacher is the student itself: its weights would move; leave it out for a frozen copy")
        refuse_other_vocabulary(student, built, processor, teacher)
    built.requires_grad_(False)
    return built.eval()


def refuse_other_vocabulary(student: Any, teacher: Any, processor: Any, source: Any) -> None:
    """Raise `TeacherError` unless both heads are of one size and the tokenizers, where both are known, are equal."""
    student_size, teacher_size = (len(get_head(model).weight_VD) for model in (student, teacher))
    if student_size != teacher_size:
        raise TeacherError(
            f"the teacher's vocabulary has {teacher_size} entries, the student's {student_size}: "
            "token ids would mean different words; use a teacher of the same family and size of vocabulary"
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


def compute_fingerprint(teacher: Any) -> str:
    """A hash of the teacher's weights: up to 1024 values of every tensor, exact on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.state_dict().items()):
        values = tensor.detach().flatten()
        values = values[:: max(1, values.numel() // 1024)][:1024].float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def save_teacher_fingerprint(teacher: Any, folder: Path) -> None:
    """Write `teacher.json`, by which a resumed run knows that it has the same teacher."""
    text = json.dumps({"fingerprint": compute_fingerprint(teacher)})
    (folder / TEACHER_FILE).write_text(text + "\n", encoding="utf-8")


def refuse_other_teacher(teacher: Any, checkpoint: Path) -> None:
    """Raise `TeacherError` when a checkpoint was made with another teacher: its run would go on towards elsewhere."""
    path = checkpoint / TEACHER_FILE
    if not path.is_file():
        return
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise TeacherError(f"{path}: not readable ({error})") from error
    if compute_fingerprint(teacher) != expected:
        raise TeacherError(
            f"{checkpoint} was trained with another teacher: resume with the model (or teacher=) the run began with, "
            "not with a checkpoint of it"
        )
