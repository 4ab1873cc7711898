"""Row + views to the two prompts: the chat template rendered, each image placeholder expanded to its token count.

Student and teacher get the same question; the teacher also gets the evidence crops (images after the global ones)
and its own instruction. Nothing is ever truncated: a cut prompt would lose image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from imagine_opd.errors import ConfigError, RowError
from imagine_opd.types import Prompt, PromptPair, Row, RowViews, View

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class PromptConfig:
    """Templates of both sides; `answer_hint_template` is appended to the teacher's when the row has an answer."""

    student_template: str
    teacher_template: str
    answer_hint_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def build_prompts(row: Row, views: RowViews, processor: Any, config: PromptConfig) -> PromptPair:
    """Both prompts of a row. Raises `RowError` when the question holds an image placeholder, `ConfigError` when the
    chat template does not place one per image."""
    # Without a crop the teacher's instruction would speak of images that are not there.
    has_crops = len(views.teacher.image_grid_thw) > len(views.student.image_grid_thw)
    teacher_template = config.teacher_template if has_crops else config.student_template
    hint = ""
    if config.answer_hint_template is not None and row.answer is not None:
        hint = config.answer_hint_template.format(answer=row.answer)
    return PromptPair(
        student=build_prompt(row, views.student, processor, config.student_template, config.chat_template_kwargs),
        teacher=build_prompt(row, views.teacher, processor, teacher_template, config.chat_template_kwargs, hint),
    )


def build_prompt(
    row: Row,
    view: View,
    processor: Any,
    template: str,
    chat_template_kwargs: dict[str, Any] | None = None,
    suffix: str = "",
) -> Prompt:
    """One side's prompt: rendered text, ids with expanded placeholders, modality ids, and the pixels they stand for."""
    image_token = str(processor.image_token)
    question = format_question(row)
    refuse_placeholder(row, processor)
    image_count = len(view.image_grid_thw)
    text_part = {"type": "text", "text": template.format(question=question) + suffix}
    messages = [{"role": "user", "content": [{"type": "image"}] * image_count + [text_part]}]
    text = processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **(chat_template_kwargs or {})
    )
    pieces = text.split(image_token)
    if len(pieces) != image_count + 1:
        raise ConfigError(
            f"the processor's chat template placed {len(pieces) - 1} image placeholders ({image_token!r}) "
            f"for {image_count} images; use a template with one per image"
        )
    counts = count_image_tokens(view, processor)
    expanded = pieces[0]
    for count, piece in zip(counts, pieces[1:], strict=True):
        expanded += image_token * count + piece
    ids = np.asarray(processor.tokenizer(expanded, add_special_tokens=False)["input_ids"], dtype=np.int64)
    is_image = ids == processor.tokenizer.convert_tokens_to_ids(image_token)
    if int(is_image.sum()) != sum(counts):
        raise ConfigError(
            f"the tokenizer turned {sum(counts)} image placeholders into {int(is_image.sum())} tokens; "
            f"{image_token!r} must be one token of it"
        )
    types = tuple(is_image.astype(np.int64).tolist())
    return Prompt(text, tuple(ids.tolist()), types, view, int(processor.image_processor.merge_size))


def refuse_placeholder(row: Row, processor: Any) -> None:
    """Raise `RowError` when a text of the row holds the image placeholder: it would ask for pixels of no image."""
    image_token = str(processor.image_token)
    for text in (row.question, row.answer or "", *row.options):
        if image_token in text:
            raise RowError(
                f"{row.source or row.id}: the text contains the image placeholder {image_token!r}; remove it"
            )


def format_question(row: Row) -> str:
    """The question, with its options as lettered lines where it has some."""
    if not row.options:
        return row.question
    if len(row.options) > len(_LETTERS):
        raise RowError(f"{row.source or row.id}: {len(row.options)} options; expected at most {len(_LETTERS)}")
    lines = [f"{letter}. {option}" for letter, option in zip(_LETTERS, row.options, strict=False)]
    return "\n".join([row.question, *lines])


def count_image_tokens(view: View, processor: Any) -> list[int]:
    """Language-model tokens of each image: patches / merge_size²."""
    merge = int(processor.image_processor.merge_size)
    return [int(grid.prod()) // merge**2 for grid in view.image_grid_thw]
