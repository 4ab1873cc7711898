"""The doors: `train`, `evaluate`, `ask`. Each takes model and data as users have them and checks all before it acts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from imagine_opd.answers import extract_answer
from imagine_opd.config import ImagineOPDConfig, build_config, load_recipe
from imagine_opd.data import BadRow, LoadedRows, load_rows
from imagine_opd.data.load import describe_bad_rows, raise_bad_rows
from imagine_opd.data.rows import RowContext, parse_row
from imagine_opd.errors import ConfigError, ImageError, OutputError, RowError
from imagine_opd.evaluation import EvalResult, answer_prompts, evaluate_model
from imagine_opd.models import load_model, load_processor, read_token_ids
from imagine_opd.prompts import build_prompt, refuse_placeholder
from imagine_opd.rollout import HFEngine
from imagine_opd.settings import make_view_config
from imagine_opd.trainer import ImagineOPDTrainer
from imagine_opd.types import Row, ViewError
from imagine_opd.views import check_images, make_views

_CHECK_BATCH = 8  # float32 views of large images are 24 bytes a pixel


@dataclass(frozen=True)
class TrainResult:
    """What a run gives back. metrics: the Trainer's final figures and the last `eval_` ones."""

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
    **config: Any,
) -> TrainResult:
    """Train `model` by Imagine-OPD (arXiv 2606.08719) on rows of image + question + boxes; save it in `output_dir`.

    Args:
        model: hub name, folder or loaded model (then pass `processor`).
        data: JSONL/JSON/Parquet path, list of dicts, or `datasets.Dataset`. A row has `image` (path relative to the
            file, bytes or PIL) or `images`, `question` or `messages`, `boxes` (pixels after EXIF, `xyxy`), and
            optionally `box_format`, `answer`, `options`, `id`.
        teacher: another checkpoint; `None` is the frozen initial model.
        resume_from_checkpoint: a `checkpoint-N` folder, or `True` for the last one in `output_dir`.
        **config: fields of `ImagineOPDConfig`; a model folder saved by us brings its own prompts and pixel budgets.

    Everything is checked before the first file is written. Raises `ConfigError`, `RowError`, `TeacherError` or
    `OutputError`, each also the standard-library error it is.
    """
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
        run_description={**{name: describe(value) for name, value in described.items()}, "rows": len(rows)},
    )
    output = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    metrics = dict(output.metrics)
    if eval_rows is not None:
        metrics.update(trainer.evaluate())
    trainer.save_state()
    return TrainResult(Path(args.output_dir), trainer.model, trainer.processor, metrics, trainer.state.global_step)


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
    """Say how many rows have no evidence to show the teacher, and how many no answer for a hint that was asked for."""
    without_box = sum(not row.boxes for row in rows)
    if without_box:
        print(f"{without_box} of {len(rows)} rows have no 'boxes': their teacher sees no more than the student")
    without_answer = sum(row.answer is None for row in rows)
    if args.answer_hint and without_answer:
        print(f"{without_answer} of {len(rows)} rows have no 'answer': answer_hint has nothing to say there")


def find_checkpoint(resume: str | Path | bool | None, folder: Path) -> str | None:
    """The checkpoint folder to resume from, complete; `None` for a fresh start. Raises `ConfigError`."""
    if resume is None or resume is False:
        return None
    found: str | Path | bool | None = resume
    if resume is True:
        found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if found is None:
            raise ConfigError(f"resume_from_checkpoint=True: {str(folder)!r} holds no checkpoint to resume from")
    path = Path(str(found))
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):
        if not (path / name).is_file():
            raise ConfigError(
                f"resume_from_checkpoint={str(path)!r}: has no {name}, so the run could not go on exactly; "
                "give a complete checkpoint-N folder (save_only_model=False)"
            )
    return str(path)


def refuse_unwritable(folder: Path) -> None:
    """Raise `OutputError` unless files can be written in `folder`; nothing is left behind."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(f"output_dir {str(folder)!r}: {str(existing)!r} is a file; choose another folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OutputError(
            f"output_dir {str(folder)!r} is not writable ({os.strerror(error.errno or 0)}); choose another folder"
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
