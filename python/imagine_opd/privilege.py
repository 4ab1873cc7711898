"""What each side of a row is shown and told: the student's and the teacher's `SideView`, and the prompts made of them.

`student_view(row)` and `teacher_view(row)` are all that tells the two sides apart. The config builds them from its
fields; a caller may pass functions of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from imagine_opd.errors import ConfigError, RowError
from imagine_opd.prompts import build_prompt
from imagine_opd.types import Box, Prompt, PromptPair, Row, RowViews, SideView, ViewConfig, ViewError
from imagine_opd.views import make_views, measure_views

ViewFunction = Callable[[Row], SideView]


@dataclass(frozen=True, slots=True)
class PrivilegeConfig:
    """Templates of both sides and the teacher's privilege, under the names of `ImagineOPDConfig`."""

    student_prompt_template: str
    teacher_prompt_template: str
    teacher_view: str = "crops"
    teacher_images_mode: str = "append"
    answer_hint: bool = False
    answer_hint_template: str = "{answer}"
    text_hint: str = "none"
    text_hint_template: str = "{hint}"
    chat_template_kwargs: dict[str, Any] | None = None


def show_student(row: Row) -> SideView:
    """The row's images whole, and nothing else."""
    return SideView(row.images)


def make_teacher_view(config: PrivilegeConfig) -> ViewFunction:
    """The teacher's `teacher_view(row)` of a config."""

    def show_teacher(row: Row) -> SideView:
        hint = ""
        if config.text_hint == "row" and row.hint:
            hint += config.text_hint_template.format(hint=row.hint)
        if config.answer_hint and row.answer is not None:
            hint += config.answer_hint_template.format(answer=row.answer)
        if config.teacher_view == "images":
            return _show_ready_made(row, config, hint)
        if config.teacher_view == "whole":
            return SideView(row.images, hint=hint)
        if config.teacher_view == "full_resolution":
            return SideView(row.images, enlarge=True, hint=hint)
        return SideView(row.images, row.boxes, show_whole=config.teacher_view != "crops_only", hint=hint)

    return show_teacher


def _show_ready_made(row: Row, config: PrivilegeConfig, hint: str) -> SideView:
    if not row.teacher_images:  # counted before the run
        return SideView(row.images, hint=hint)
    if config.teacher_images_mode == "append":
        return SideView((*row.images, *row.teacher_images), hint=hint)
    if config.teacher_images_mode == "full" and len(row.teacher_images) < len(row.images):
        raise RowError(
            f"{row.source or row.id}: teacher_images has {len(row.teacher_images)} images, the row {len(row.images)}; "
            "teacher_images_mode='full' expects the row's own among them, 'append' and 'replace' do not"
        )
    return SideView(row.teacher_images, hint=hint)


def build_pairs(
    rows: Sequence[Row],
    processor: Any,
    view_config: ViewConfig,
    config: PrivilegeConfig,
    student_view: ViewFunction | None = None,
    teacher_view: ViewFunction | None = None,
) -> list[PromptPair | ViewError]:
    """Both prompts of each row, in order, and the teacher's once more with neutral evidence where
    `view_config.neutral` asks for it; a row that cannot be shown or asked is a `ViewError`.

    Raises `ConfigError` when the chat template does not place one placeholder per image.
    """
    show_student_of = student_view or show_student
    show_teacher_of = teacher_view or make_teacher_view(config)
    sides: list[tuple[SideView, SideView] | ViewError] = []
    for index, row in enumerate(rows):
        try:
            sides.append((show_student_of(row), show_teacher_of(row)))
        except RowError as error:
            sides.append(ViewError(index, "privilege", str(error)))
    views = _make_views(rows, sides, view_config)
    pairs: list[PromptPair | ViewError] = []
    for index, (row, side, found) in enumerate(zip(rows, sides, views, strict=True)):
        if isinstance(found, ViewError) or isinstance(side, ViewError):
            pairs.append(found if isinstance(found, ViewError) else ViewError(index, "privilege", ""))
            continue
        try:
            pairs.append(build_prompts(row, found, processor, config, side))
        except RowError as error:
            pairs.append(ViewError(index, "text", str(error)))
    return pairs


def build_prompts(
    row: Row,
    views: RowViews,
    processor: Any,
    config: PrivilegeConfig,
    sides: tuple[SideView, SideView] | None = None,
) -> PromptPair:
    """Both prompts of a row whose views are made; `sides`: what they were made of, default the config's.

    Raises `RowError` when a text holds an image placeholder, `ConfigError` when the chat template does not place one
    per image."""
    student, teacher = sides or (show_student(row), make_teacher_view(config)(row))
    # Without images of its own the teacher's instruction would speak of some that are not there.
    has_more = len(views.teacher.frame_counts) > len(views.student.frame_counts)
    template = config.teacher_prompt_template if has_more else config.student_prompt_template
    template = teacher.template or template
    kwargs = config.chat_template_kwargs
    hint = teacher.hint
    if config.text_hint in ("relative_1000", "pixels") and row.boxes:
        regions = format_regions(row.boxes, views.image_sizes, config.text_hint)
        hint = config.text_hint_template.format(hint=regions) + hint
    neutral = None
    student_prompt = build_prompt(
        row, views.student, processor, student.template or config.student_prompt_template, kwargs, student.hint
    )
    teacher_prompt = build_prompt(row, views.teacher, processor, template, kwargs, hint)
    if views.neutral is not None:
        neutral = build_prompt(row, views.neutral, processor, template, kwargs, hint)
        refuse_other_layout(teacher_prompt, neutral)
    return PromptPair(student_prompt, teacher_prompt, neutral)


def refuse_other_layout(teacher: Prompt, neutral: Prompt) -> None:
    """Assert that both passes of the teacher lie on the same tokens, so that one position speaks of one token."""
    same = teacher.input_ids == neutral.input_ids and teacher.view.frame_counts == neutral.view.frame_counts
    assert same, "the neutral pass has another layout than the teacher's"
    assert teacher.view.tile_grids == neutral.view.tile_grids, "the neutral pass has another grid than the teacher's"


def format_regions(boxes: Sequence[Box], sizes: Sequence[tuple[int, int]], form: str) -> str:
    """Boxes as a hint says them: `(x0, y0, x1, y1)`, in pixels of the original or 0 to 1000 of each side."""
    words = []
    for box in boxes:
        width, height = sizes[box.image]
        across, down = (1000 / width, 1000 / height) if form == "relative_1000" else (1.0, 1.0)
        numbers = (box.x0 * across, box.y0 * down, box.x1 * across, box.y1 * down)
        words.append("(" + ", ".join(str(round(number)) for number in numbers) + ")")
    return ", ".join(words)


def _make_views(
    rows: Sequence[Row], sides: Sequence[tuple[SideView, SideView] | ViewError], config: ViewConfig
) -> list[RowViews | ViewError]:
    """The views of each row: of one decode where both sides see the same images, of two otherwise."""
    found: list[RowViews | ViewError | None] = [side if isinstance(side, ViewError) else None for side in sides]
    groups: dict[tuple[bool, bool], list[int]] = {}
    for index, side in enumerate(sides):
        if isinstance(side, ViewError):
            continue
        student, teacher = side
        if student.boxes or student.enlarge or not student.show_whole:
            raise ConfigError("student_view(row) gives crops; the student sees whole images only")
        whole = teacher.show_whole and not teacher.enlarge
        whole = whole or not (teacher.boxes or teacher.enlarge)  # something must be left to see
        groups.setdefault((student.images == teacher.images, whole), []).append(index)
    for (shared, whole), members in groups.items():
        teachers = [_place_row(rows[index], sides[index][1]) for index in members]  # type: ignore[index]
        _enlarge([sides[index][1] for index in members], teachers, config)  # type: ignore[index]
        teacher_config = dataclasses.replace(config, teacher_global=whole)
        made = make_views(teachers, teacher_config, sides=("student", "teacher") if shared else ("teacher",))
        others: list[RowViews | ViewError] = list(made)
        if not shared:
            students = [_place_row(rows[index], sides[index][0]) for index in members]  # type: ignore[index]
            others = list(make_views(students, dataclasses.replace(config, neutral="none")))
        for index, of_teacher, of_student in zip(members, made, others, strict=True):
            if isinstance(of_teacher, ViewError) or isinstance(of_student, ViewError):
                fault = of_teacher if isinstance(of_teacher, ViewError) else of_student
                found[index] = dataclasses.replace(fault, row=index)
            else:
                sizes = of_student.image_sizes
                found[index] = dataclasses.replace(of_teacher, row=index, student=of_student.student, image_sizes=sizes)
    assert all(views is not None for views in found)
    return [views for views in found if views is not None]


def _place_row(row: Row, side: SideView) -> Row:
    return dataclasses.replace(row, images=side.images, boxes=side.boxes)


def _enlarge(sides: Sequence[SideView], rows: list[Row], config: ViewConfig) -> None:
    """Whole images at the crops' budget, as one box around each: the teacher's full resolution beside a student's
    reduced one, out of the same decode."""
    members = [index for index, side in enumerate(sides) if side.enlarge]
    if not members:
        return
    for index, sizes in zip(members, measure_views([rows[index] for index in members], config), strict=True):
        if not isinstance(sizes, ViewError):
            boxes = tuple(Box(0, 0, *size, image=image) for image, size in enumerate(sizes.image_sizes))
            rows[index] = dataclasses.replace(rows[index], boxes=boxes)
