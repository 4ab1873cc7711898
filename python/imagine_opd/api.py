"""The doors: `train`, `evaluate`, `ask`. Each takes model and data as users have them and checks all before it acts."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagine_opd.answers import extract_answer
from imagine_opd.checkpoints import find_checkpoint
from imagine_opd.config import ImagineOPDConfig, build_config, load_recipe
from imagine_opd.data import BadRow, LoadedRows, load_rows
from imagine_opd.data.load import describe_bad_rows, raise_bad_rows
from imagine_opd.data.rows import RowContext, parse_row
from imagine_opd.errors import ConfigError, ImageError, OutputError, RowError
from imagine_opd.evaluation import EvalResult, answer_prompts, evaluate_model
from imagine_opd.explain import check_and_explain
from imagine_opd.explanation import Explanation
from imagine_opd.models import load_model, load_processor, read_token_ids
from imagine_opd.outputs import guard_writing
from imagine_opd.privilege import ViewFunction
from imagine_opd.prompts import build_prompt, refuse_placeholder
from imagine_opd.report import format_text, write_page
from imagine_opd.rollout import HFEngine
from imagine_opd.settings import make_view_config
from imagine_opd.trainer import ImagineOPDTrainer
from imagine_opd.types import Row, ViewError
from imagine_opd.views import check_images, make_views

EXPLAIN_FILE = "explain.html"
_CHECK_BATCH = 8  # float32 views of large images are 24 bytes a pixel


@dataclass(frozen=True)
class TrainResult:
    """What a run gives back. metrics: the Trainer's final figures and the last `eval_` ones; of a dry run, which takes
    0 steps, the teacher checks'."""

    output_dir: Path
    model: Any
    processor: Any
    metrics: dict[str, float]
    global_step: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply. text: the whole completion; trace: what comes before the answer tag; answer: `None` if there is none."""

    text: str
    trace: str
    answer: str | None


def train(
    model: Any,
    data: Any,
    *,
    output_dir: str | Path = "run",
    processor: Any = None,
    eval_data: Any = None,
    teacher: Any = None,
    resume_from_checkpoint: str | Path | bool | None = None,
    dry_run: bool = False,
    peft_config: Any = None,
    student_view: ViewFunction | None = None,
    teacher_view: ViewFunction | str | None = None,
    reward_funcs: Any = None,
    **config: Any,
) -> TrainResult:
    """Train `model` by Imagine-OPD (arXiv 2606.08719) on rows of image + question + boxes; save it in `output_dir`.

    Args:
        model: hub name, folder or loaded model (then pass `processor`).
        data: JSONL/JSON/Parquet path, list of dicts, or `datasets.Dataset`. A row has `image` (path relative to the
            file, bytes or PIL) or `images`, `question` or `messages`, `boxes` (pixels after EXIF, `xyxy`), and
            optionally `box_format`, `answer`, `options`, `id`.
        teacher: another checkpoint; `None` is the frozen initial model.
        resume_from_checkpoint: a `checkpoint-N` folder, `True` for the last complete one in `output_dir`, or `"auto"`:
            that one, and a fresh start when there is none.
        dry_run: check and prepare everything, train nothing: the first row is explained on standard output and in
            `output_dir/explain.html`, and no checkpoint is written.
        peft_config: a `peft.LoraConfig`, in place of the fields `use_peft` and `lora_...`.
        student_view, teacher_view: functions of a `Row` to a `SideView`, what a side is shown and told, in place of the
            config's privilege; a name is the config's field `teacher_view`.
        reward_funcs: functions of (rows, completions) to rewards, or `"accuracy"`, beside the teacher.
        **config: fields of `ImagineOPDConfig`; a model folder saved by us brings its own prompts and pixel budgets.

    Everything is checked before the first file is written. Raises `ConfigError`, `RowError`, `TeacherError` or
    `OutputError`, each also the standard-library error it is; and `RunStoppedError`, a `SystemExit`, when SIGTERM or
    SIGINT stopped the run: a checkpoint of the step is then saved.
    """
    trainer, resume = prepare_run(
        model,
        data,
        output_dir=output_dir,
        processor=processor,
        eval_data=eval_data,
        teacher=teacher,
        resume_from_checkpoint=resume_from_checkpoint,
        peft_config=peft_config,
        student_view=student_view,
        teacher_view=teacher_view,
        reward_funcs=reward_funcs,
        **config,
    )
    if dry_run:
        if resume is not None:
            trainer.load_weights(resume)
        explanation = show_explanation(trainer, 0, Path(trainer.args.output_dir, EXPLAIN_FILE))
        return TrainResult(
            Path(trainer.args.output_dir), trainer.model, trainer.processor, dict(explanation.teacher_checks), 0
        )
    output = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.args.merge_adapter:
        trainer.save_merged_model()
    metrics = dict(output.metrics)
    if eval_data is not None:
        metrics.update(trainer.evaluate())
    with guard_writing(Path(trainer.args.output_dir), "the run's state"):
        trainer.save_state()
    return TrainResult(
        Path(trainer.args.output_dir), trainer.model, trainer.processor, metrics, trainer.state.global_step
    )


def explain_row(model: Any, data: Any, row: int = 0, *, html: str | Path | None = None, **options: Any) -> Explanation:
    """Prepare a run as `train` does, print what becomes of one row in it, and write it to `html` where given.

    `row` counts the usable rows from 0; `options` are those of `train`; with `resume_from_checkpoint` the row is shown
    as the checkpoint's weights see it. Nothing is trained. Raises what `train` raises; a failed teacher check is
    raised after the explanation is out.
    """
    trainer, resume = prepare_run(model, data, **options)
    if resume is not None:
        trainer.load_weights(resume)
    return show_explanation(trainer, row, None if html is None else Path(html))


def show_explanation(trainer: ImagineOPDTrainer, row: int, html: Path | None) -> Explanation:
    """Check the teacher, explain the row: the main process prints it and writes the page."""
    explanation, fault = check_and_explain(trainer, row, trainer.run_plan.describe() if trainer.run_plan else None)
    if trainer.is_world_process_zero():
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(format_text(explanation, colour=colour), flush=True)
        if html is not None:
            write_page(explanation, html)
            print(f"\nthe page is {html}", flush=True)
    if fault is not None:
        raise fault
    return explanation


def prepare_run(
    model: Any,
    data: Any,
    *,
    output_dir: str | Path = "run",
    processor: Any = None,
    eval_data: Any = None,
    teacher: Any = None,
    resume_from_checkpoint: str | Path | bool | None = None,
    peft_config: Any = None,
    student_view: ViewFunction | None = None,
    teacher_view: ViewFunction | str | None = None,
    reward_funcs: Any = None,
    **config: Any,
) -> tuple[ImagineOPDTrainer, str | None]:
    """Everything that `train` checks and makes before its first step: the trainer, and the checkpoint to go on from."""
    if isinstance(teacher_view, str):
        config["teacher_view"] = teacher_view
    args = build_config(output_dir, {**load_recipe(model), **config})
    refuse_unwritable(Path(args.output_dir))
    resume = find_checkpoint(resume_from_checkpoint, Path(args.output_dir))
    described = {"model": model, "data": data, "eval_data": eval_data, "teacher": teacher, "processor": processor}
    processor = load_processor(processor, model)
    rows = load_checked_rows(data, processor, args)
    report_missing(rows, args)
    eval_rows = None if eval_data is None else load_checked_rows(eval_data, processor, args)
    trainer = ImagineOPDTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processor=processor,
        teacher=teacher,
        peft_config=peft_config,
        student_view=student_view,
        teacher_view=None if isinstance(teacher_view, str) else teacher_view,
        reward_funcs=reward_funcs,
        run_description={**{name: describe(value) for name, value in described.items()}, "rows": len(rows)},
    )
    return trainer, resume


def evaluate(
    model: Any,
    data: Any,
    *,
    modes: Sequence[str] = ("direct", "imagine", "zoom", "teacher"),
    processor: Any = None,
    batch_size: int = 32,
    **options: Any,
) -> EvalResult:
    """Greedy accuracy of `model` on rows with an `answer`, per mode (see `evaluation.evaluate_model`).

    `options` are `ImagineOPDConfig` fields; a folder trained by us brings the prompts and pixel budgets it was
    trained with. Raises `ConfigError` and `RowError`.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size!r}: expected at least 1")
    modes = (modes,) if isinstance(modes, str) else modes
    loaded, processor, args = _open_model(model, processor, options)
    rows = load_checked_rows(data, processor, args)
    return evaluate_model(loaded, processor, rows, make_view_config(processor, args), args, modes, batch_size)


def ask(model: Any, image: Any, question: str, *, processor: Any = None, **options: Any) -> Answer:
    """The model's reply to one question about one image (path, encoded bytes or PIL), from the global image alone."""
    loaded, processor, args = _open_model(model, processor, options)
    row = parse_row({"image": image, "question": question}, RowContext(_name_image(image), Path(), None))
    views = make_views([row], make_view_config(processor, args))[0]
    if isinstance(views, ViewError):
        raise ImageError(views.message)
    template, kwargs = args.student_prompt_template, args.chat_template_kwargs
    prompt = build_prompt(row, views.student, processor, template, kwargs)
    engine = HFEngine(read_token_ids(loaded, processor))
    texts, _ = answer_prompts(loaded, processor, engine, [prompt], args.max_completion_length)
    text = texts[0].strip()
    return Answer(text, text.split("<answer>")[0].strip(), extract_answer(text, letters=None))


def load_checked_rows(data: Any, processor: Any, args: ImagineOPDConfig) -> tuple[Row, ...]:
    """Rows whose text is sound and whose images are there and fit their boxes: all headers read, the images of the
    first `check_rows` rows decoded.

    Bad rows are raised together, or with `bad_rows="skip"` left out and the count printed with its reasons.
    """
    loaded: LoadedRows = load_rows(data, image_root=args.image_root, box_format=args.box_format, bad_rows="skip")
    bad = list(loaded.bad)
    view_config = make_view_config(processor, args)
    faults: dict[int, ViewError] = {
        index: fault for index, fault in enumerate(check_images(loaded.rows, view_config)) if fault is not None
    }
    for index, row in enumerate(loaded.rows):
        try:
            refuse_placeholder(row, processor)
        except RowError as error:
            faults.setdefault(index, ViewError(index, "text", str(error)))
    sound = [index for index in range(min(args.check_rows, len(loaded.rows))) if index not in faults]
    for start in range(0, len(sound), _CHECK_BATCH):
        part = sound[start : start + _CHECK_BATCH]
        for index, views in zip(part, make_views([loaded.rows[i] for i in part], view_config), strict=True):
            if isinstance(views, ViewError):
                faults[index] = views
    bad += [BadRow(loaded.rows[index].source, fault.reason, fault.message) for index, fault in sorted(faults.items())]
    total = len(loaded.rows) + len(loaded.bad)
    rows = tuple(row for index, row in enumerate(loaded.rows) if index not in faults)
    if bad and (args.bad_rows == "raise" or not rows):
        raise_bad_rows(bad, total)
    if bad:
        print(describe_bad_rows(bad, total), flush=True)
    return rows


def report_missing(rows: Sequence[Row], args: ImagineOPDConfig) -> None:
    """Say of each privilege that was asked for how many rows have nothing for it."""
    needs_boxes = args.teacher_view.startswith("crops")
    wanted: dict[str, tuple[str, bool, Callable[[Row], object]]] = {
        "boxes": ("their teacher sees no more than the student", needs_boxes, lambda row: row.boxes),
        "answer": ("answer_hint has nothing to say there", args.answer_hint, lambda row: row.answer is not None),
        "hint": ("text_hint='row' has nothing to say there", args.text_hint == "row", lambda row: row.hint),
        "teacher_images": (
            "their teacher sees no more than the student",
            args.teacher_view == "images",
            lambda row: row.teacher_images,
        ),
    }
    if args.text_hint in ("relative_1000", "pixels") and not needs_boxes:
        wanted["boxes"] = ("text_hint has nothing to say there", True, lambda row: row.boxes)
    for name, (what, is_wanted, has) in wanted.items():
        without = sum(not has(row) for row in rows)
        if is_wanted and without:
            print(f"{without} of {len(rows)} rows have no '{name}': {what}")


def refuse_unwritable(folder: Path, name: str = "output_dir") -> None:
    """Raise `OutputError` unless files can be written in `folder`, the user's `name`; nothing is left behind."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(f"{name} {str(folder)!r}: {str(existing)!r} is a file; choose another folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OutputError(
            f"{name} {str(folder)!r} is not writable ({os.strerror(error.errno or 0)}); choose another folder"
        ) from error


def describe(value: Any) -> str | None:
    """A short name of a model, processor or data source for the run folder."""
    if value is None or isinstance(value, (str, Path)):
        return None if value is None else str(value)
    name = getattr(value, "name_or_path", "")
    return f"{type(value).__name__} ({name})" if name else type(value).__name__


def _open_model(model: Any, processor: Any, options: dict[str, Any]) -> tuple[Any, Any, ImagineOPDConfig]:
    """The loaded model on the run's device, its processor, and a config: the model's saved recipe, then `options`."""
    args = build_config(tempfile.gettempdir(), {**load_recipe(model), **options})
    processor = load_processor(processor, model)
    loaded = load_model(model, args.model_dtype)
    if loaded is not model:
        loaded.to(args.device)
    if loaded is not model:
        loaded.eval()
    return loaded, processor, args


def _name_image(image: Any) -> str:
    return str(image) if isinstance(image, (str, Path)) else "image"
