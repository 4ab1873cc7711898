"""A trainer and a row's index in, an `Explanation` of that row out, which `report` shows as text or as a page.

Everything is what training would use: the trainer's own views, prompts, engine, teacher and scoring. What is taken
from the trainer is taken in `gather_facts` and the small functions beside it, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from imagine_opd.adapters import find_adapter
from imagine_opd.errors import RowError, TeacherError
from imagine_opd.explanation import (
    Explanation,
    Original,
    Position,
    RunSize,
    Setting,
    ShownImage,
    SideFacts,
    TokenFacts,
)
from imagine_opd.kernels import TokenStats, linear_token_stats
from imagine_opd.models import get_head, run_inside
from imagine_opd.pictures import restore_pictures
from imagine_opd.positions import watch_positions
from imagine_opd.privilege import build_pairs, make_teacher_view
from imagine_opd.scoring import score_side
from imagine_opd.types import Box, Prompt, PromptPair, Rollouts, Row, RowViews, ViewConfig, ViewError
from imagine_opd.views import make_views

if TYPE_CHECKING:
    from imagine_opd.config import ImagineOPDConfig
    from imagine_opd.trainer import ImagineOPDTrainer

# B rows, T completion tokens, L sequence tokens, N response tokens

_SAMPLED_ROWS = 8
_ORIGINAL_AREA = 640 * 640
_DECODED_BEFORE = 8  # tokens before one that tell how it is spelt: word pieces join and bytes make a letter


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What one row became in the run: a rollout `[1, T]`, each token's weight in the loss, and its statistics, `None`
    when it has no token; *_position: of the response's first token, as `SideFacts` has it."""

    row: Row
    crops: tuple[Box, ...]
    pair: PromptPair
    rollouts: Rollouts
    weights_BT: torch.Tensor
    stats: TokenStats | None
    student_position: Position | None
    teacher_position: Position | None


def check_and_explain(
    trainer: ImagineOPDTrainer, row_index: int = 0, memory_plan: str | Sequence[str] | None = None
) -> tuple[Explanation, TeacherError | None]:
    """The start-up checks, then the explanation. A failed check is given back beside it: the page shows the cause."""
    fault: TeacherError | None = None
    if trainer.args.teacher_checks:
        try:
            trainer.run_teacher_checks()
        except TeacherError as error:
            fault = error
    try:
        found = explain_run(trainer, row_index, memory_plan, str(fault or ""))
    except (RuntimeError, ValueError) as error:
        if fault is not None:  # a broken teacher may break what comes after, too
            raise fault from error
        raise
    return found, fault


def explain_run(
    trainer: ImagineOPDTrainer,
    row_index: int = 0,
    memory_plan: str | Sequence[str] | None = None,
    teacher_fault: str = "",
) -> Explanation:
    """Explain one row of the trainer's training rows; nothing is trained and no random state is changed.

    Raises:
        RowError: there is no such row, or it cannot be made into prompts.
    """
    facts = gather_facts(trainer, row_index)
    row, report = facts.row, trainer.teacher_report
    lines = memory_plan.splitlines() if isinstance(memory_plan, str) else memory_plan or ()
    return Explanation(
        row_index=row_index,
        source=row.source,
        id=row.id,
        question=row.question,
        options=row.options,
        boxes=row.boxes,
        answer=row.answer,
        originals=_load_originals(row, facts.crops, trainer.view_config),
        student=_describe_side(facts.pair.student, facts.student_position, trainer),
        teacher=_describe_side(facts.pair.teacher, facts.teacher_position, trainer),
        neutral=None if facts.pair.neutral is None else _describe_side(facts.pair.neutral, None, trainer),
        teacher_kind=_name_teacher(trainer),
        privilege=_describe_privilege(facts, trainer),
        tokens=_list_tokens(facts, trainer.processor.tokenizer),
        dropped=", ".join(facts.rollouts.dropped),
        teacher_checks=tuple(report.as_metrics().items()) if report is not None else (),
        teacher_fault=teacher_fault,
        memory=tuple(lines),
        settings=list_settings(trainer.args),
        size=_measure_run(trainer),
    )


# what is taken from the trainer


def gather_facts(trainer: ImagineOPDTrainer, row_index: int) -> RunFacts:
    """One row through the run's own path: views, prompts, one rollout with its weights, both sides scored."""
    count = len(trainer.train_dataset)
    if not 0 <= row_index < count:
        raise RowError(f"there is no row {row_index}: the data has {count}, numbered from 0")
    row: Row = trainer.train_dataset[row_index]
    builder = trainer.builder
    views = (builder.student_view, builder.teacher_view)
    checked = build_pairs([row], trainer.processor, trainer.view_config, builder.privilege_config, *views)[0]
    if isinstance(checked, ViewError):
        raise RowError(f"row {row_index} cannot be used: {checked.message}")
    batch = builder.build(trainer.model, [[row]], 0)[0][0]
    first = slice(0, 1)
    pair, rollouts = batch.prompts[0], batch.rollouts.select(first)
    rollouts = dataclasses.replace(rollouts, dropped=dict(batch.rollouts.dropped))
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        with torch.no_grad(), trainer.accelerator.autocast():
            stats, student_position, teacher_position = _score(trainer, pair, rollouts)
    finally:
        trainer.model.train(was_training)
    weights_BT = batch.weights_BT[first]
    return RunFacts(
        row, _find_crops(trainer, row), pair, rollouts, weights_BT, stats, student_position, teacher_position
    )


def _find_crops(trainer: ImagineOPDTrainer, row: Row) -> tuple[Box, ...]:
    """The regions of the row's own images that are cut for the teacher."""
    builder = trainer.builder
    side = (builder.teacher_view or make_teacher_view(builder.privilege_config))(row)
    if side.images != row.images or not side.boxes:
        return ()
    views = make_views([dataclasses.replace(row, boxes=side.boxes)], trainer.view_config)[0]
    return views.crop_boxes if isinstance(views, RowViews) else ()


def _score(
    trainer: ImagineOPDTrainer, pair: PromptPair, rollouts: Rollouts
) -> tuple[TokenStats | None, Position | None, Position | None]:
    """Statistics of the rollout's tokens, and where each side's forward placed the first of them."""
    mask_BT, pad = rollouts.completion_mask_BT, trainer.token_ids.pad
    if not mask_BT.any():
        return None, None, None

    def look(teacher: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with watch_positions(teacher) as found:
            return score_side(teacher, [pair.teacher], rollouts, mask_BT, pad), found

    teacher_hidden_ND, teacher_found = trainer.teacher.run(trainer.model, look)

    def compute(student: Any) -> tuple[TokenStats, list[torch.Tensor]]:
        with watch_positions(student) as found:
            student_hidden_ND = score_side(student, [pair.student], rollouts, mask_BT, pad)
        stats = linear_token_stats(
            student_hidden_ND,
            get_head(student),
            teacher_hidden_ND,
            teacher_head,
            rollouts.completion_ids_BT[mask_BT],
            temperature=trainer.objective_config.temperature,
            backend=trainer.objective_config.kernel_backend,
        )
        return stats, found

    with trainer.teacher.open_head(trainer.model) as teacher_head:
        stats, student_found = run_inside(trainer.model, compute)
    return stats, _read_position(student_found, pair.student), _read_position(teacher_found, pair.teacher)


def _name_teacher(trainer: ImagineOPDTrainer) -> str:
    teacher = trainer.teacher
    if teacher.kind != "base":
        return {"ema": "a moving average of the student", "live": "the student itself, at each step"}[teacher.kind]
    if teacher.placement == "adapter_off":
        return "the base weights, with the adapter off"
    held = " in host memory" if teacher.placement == "cpu" else ""
    return f"a frozen copy of the initial weights{held}" if teacher.equals_student else f"other weights, frozen{held}"


def _read_position(found: Sequence[torch.Tensor], prompt: Prompt) -> Position | None:
    """The (t, h, w) of the first token behind the prompt; `None` for models with plain positions."""
    if not found:
        return None
    time, height, width = found[0][:, 0, len(prompt.input_ids)].tolist()
    return int(time), int(height), int(width)


def _measure_run(trainer: ImagineOPDTrainer) -> RunSize:
    """Steps by the Trainer's own rule, tokens from a few rows spread over the data."""
    args, rows = trainer.args, len(trainer.train_dataset)
    count = min(_SAMPLED_ROWS, rows)
    pairs = []
    for index in range(count):  # one by one: the views of a row may take a hundred MiB
        pairs += trainer.builder.build_pairs([trainer.train_dataset[index * rows // count]])
    student, teacher = (
        [len(getattr(pair, side).input_ids) for pair in pairs if pair is not None] for side in ("student", "teacher")
    )
    means = [sum(lengths) / max(len(lengths), 1) for lengths in (student, teacher)]
    steps, rows_seen = count_steps(args, rows)
    return RunSize(
        rows=rows,
        rows_per_step=args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        steps=steps,
        sampled_rows=len(student),
        student_tokens=means[0],
        teacher_tokens=means[1],
        completion_tokens=args.max_completion_length,
        total_tokens=rows_seen * args.num_generations * (sum(means) + 2 * args.max_completion_length),
    )


# what is made of it


def count_steps(args: ImagineOPDConfig, rows: int) -> tuple[int, int]:
    """Optimizer steps of a run over `rows` rows, and about how many rows they take."""
    batch = args.train_batch_size * args.world_size
    batches = rows // batch if args.dataloader_drop_last else math.ceil(rows / batch)
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    epoch_rows = min(batches * batch, rows)
    if args.max_steps > 0:
        steps, epochs = args.max_steps, args.max_steps / per_epoch
    else:
        steps, epochs = math.ceil(args.num_train_epochs * per_epoch), args.num_train_epochs
    return steps, round(epochs * epoch_rows)


def list_settings(config: ImagineOPDConfig) -> tuple[Setting, ...]:
    """Fields of the config that differ from their defaults, in the order of the config; `output_dir` left out."""
    found = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        default: Any = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        if item.name == "output_dir" or value == default:
            continue
        if default in (None, "", "none") and value in (False, [], {}, None):
            continue  # the library's way to write the default once it is read
        if dataclasses.is_dataclass(value) and not isinstance(value, type) and value == type(value)():
            continue
        found.append(Setting(item.name, str(getattr(value, "value", value)), str(getattr(default, "value", default))))
    return tuple(found)


def _describe_side(prompt: Prompt, position: Position | None, trainer: ImagineOPDTrainer) -> SideFacts:
    view, counts = prompt.view, prompt.image_tokens
    images = tuple(
        ShownImage(index + 1, *view.source_sizes[index], count, restore_pictures(view, index, trainer.view_config))
        for index, count in enumerate(counts)
    )
    image_tokens = sum(prompt.mm_token_type_ids)
    return SideFacts(
        text=_mark_images(prompt.text, find_adapter(trainer.processor).placeholder(trainer.processor), images),
        images=images,
        text_tokens=len(prompt.input_ids) - image_tokens,
        image_tokens=image_tokens,
        response_start=len(prompt.input_ids),
        response_position=position,
    )


def _mark_images(text: str, placeholder: str, images: Sequence[ShownImage]) -> str:
    """The prompt's text with `[image k: WxH px, n tokens]` in place of each placeholder."""
    first, *rest = text.split(placeholder)
    marks = (f"[image {image.number}: {image.describe_size()}, {image.tokens} tokens]" for image in images)
    return first + "".join(mark + piece for mark, piece in zip(marks, rest, strict=True))


def _describe_privilege(facts: RunFacts, trainer: ImagineOPDTrainer) -> tuple[str, ...]:
    """What the teacher has and the student has not, found by comparing the two prompts."""
    student, teacher, row = facts.pair.student, facts.pair.teacher, facts.row
    counts = [len(side.view.frame_counts) for side in (student, teacher)]
    more = counts[1] - counts[0]
    found = []
    if more:
        found.append(f"{abs(more)} {'more' if more > 0 else 'fewer'} image{'s' if abs(more) > 1 else ''}")
    pixels = [np.split(side.view.pixel_values, np.cumsum(side.view.frame_counts)[:-1]) for side in (student, teacher)]
    found += [
        f"other pixels in image {number}"
        for number, (left, right) in enumerate(zip(*pixels, strict=False), 1)
        if not np.array_equal(left, right)
    ]
    config, placeholder = trainer.builder.privilege_config, find_adapter(trainer.processor).placeholder
    texts = [side.text.rpartition(placeholder(trainer.processor))[2] for side in (student, teacher)]
    hint = config.answer_hint_template.format(answer=row.answer)
    if config.answer_hint and row.answer is not None and hint in texts[1]:
        found.append("the answer")
        texts[1] = texts[1].replace(hint, "", 1)
    if texts[0] != texts[1]:  # behind the images
        found.append("other words" if config.text_hint == "none" else "a hint in words")
    return tuple(found)


def _list_tokens(facts: RunFacts, tokenizer: Any) -> tuple[TokenFacts, ...]:
    if facts.stats is None:
        return ()
    mask_BT = facts.rollouts.completion_mask_BT
    ids = facts.rollouts.completion_ids_BT[mask_BT].tolist()
    stats = facts.stats
    columns_N = (
        stats.reverse_kl_N,
        stats.student_logprob_N,
        stats.teacher_logprob_N,
        stats.entropy_N,
        facts.weights_BT[mask_BT],
    )
    figures = zip(*(column_N.double().tolist() for column_N in columns_N if column_N is not None), strict=True)
    return tuple(
        TokenFacts(text, token, *numbers)
        for text, token, numbers in zip(spell_tokens(ids, tokenizer), ids, figures, strict=True)
    )


def spell_tokens(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text that each token adds to those before it: spaces between words included, special tokens as they are."""
    spelt = []
    for place, token in enumerate(ids):
        before = tokenizer.decode(ids[max(0, place - _DECODED_BEFORE) : place], skip_special_tokens=False)
        after = tokenizer.decode(ids[max(0, place - _DECODED_BEFORE) : place + 1], skip_special_tokens=False)
        added = after[len(before) :] if place and after.startswith(before) else ""
        spelt.append(added or tokenizer.decode([token], skip_special_tokens=False))
    return spelt


def _load_originals(row: Row, cut: tuple[Box, ...], config: ViewConfig) -> tuple[Original, ...]:
    """The originals by the engine that also makes the views: the same limits, upright, in bounded memory."""
    plain = ViewConfig(
        patch_size=1,
        merge_size=1,
        temporal_patch_size=1,
        min_pixels=1,
        max_pixels=_ORIGINAL_AREA,
        output="uint8",
        max_image_pixels=config.max_image_pixels,
        max_image_bytes=config.max_image_bytes,
    )
    found = make_views([dataclasses.replace(row, boxes=())], plain)[0]
    if isinstance(found, ViewError):  # thinner than the layout takes; the two sides still show it
        return ()
    return tuple(
        Original(
            restore_pictures(found.student, index, plain)[0].pixels_HWC,
            *size,
            boxes=tuple(box for box in row.boxes if box.image == index),
            crops=tuple(crop for crop in cut if crop.image == index),
        )
        for index, size in enumerate(found.image_sizes)
    )
