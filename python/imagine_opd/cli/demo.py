"""`imagine-opd demo`: Imagine-OPD on the tiny world, before and after; a table, a contact sheet and `result.json`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from imagine_opd.errors import OutputError

if TYPE_CHECKING:
    from imagine_opd.demo.scenes import Scene
    from imagine_opd.evaluation import ModeResult
    from imagine_opd.types import RowViews, View

EVAL_SCENES = 1000
"""Held-out scenes per accuracy: the 95 % interval is then at most 3.1 points to either side."""
_EVAL_SEED = 987_654
_SHEET_ROWS = 8


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """How a demo trains. scenes are rendered once; steps of `batch` scenes each."""

    steps: int
    batch: int
    scenes: int
    learning_rate: float


PLANS = {
    ("full", False): DemoPlan(steps=400, batch=32, scenes=6000, learning_rate=5e-4),
    ("sampled_token", False): DemoPlan(steps=400, batch=32, scenes=6000, learning_rate=5e-4),
    ("full", True): DemoPlan(steps=1400, batch=32, scenes=12_000, learning_rate=5e-4),
    ("sampled_token", True): DemoPlan(steps=1400, batch=32, scenes=12_000, learning_rate=5e-4),
}


def run_demo(output: str, mode: str, views: Literal["right", "wrong"], seed: int, long: bool) -> dict[str, Any]:
    """Evaluate, train, evaluate; print a table; write `result.json` and `contact_sheet.png`. Returns the result."""
    folder = Path(output)
    refuse_unusable(folder)
    plan = PLANS[mode, long]
    started = time.perf_counter()
    print(describe_demo(mode, views, plan), flush=True)

    import torch
    from transformers.utils.logging import disable_progress_bar

    from imagine_opd.api import evaluate, train
    from imagine_opd.config import build_config
    from imagine_opd.demo import base_model_path, make_scenes, scenes_to_rows
    from imagine_opd.demo.recipe import TINY_RECIPE
    from imagine_opd.models import load_model, load_processor
    from imagine_opd.settings import make_view_config
    from imagine_opd.types import RowViews
    from imagine_opd.views import make_views

    disable_progress_bar()  # of the libraries below; the training's own stays
    torch.set_num_threads(1)  # the model is too small for more to pay, and the run then repeats on any machine
    held_out = make_scenes(EVAL_SCENES, _EVAL_SEED, "small")
    eval_rows = scenes_to_rows(held_out, "right")
    train_rows = scenes_to_rows(make_scenes(plan.scenes, seed, "small"), views)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(base_model_path()).to(device)
    processor = load_processor(None, base_model_path())
    seconds = {"setup": time.perf_counter() - started}

    before = evaluate(
        model, eval_rows, modes=("imagine", "teacher"), processor=processor, batch_size=250, **TINY_RECIPE
    )
    print(f"before: student {show(before['imagine'])}, teacher with the crop {show(before['teacher'])}", flush=True)
    seconds["evaluate"] = before["imagine"].seconds + before["teacher"].seconds

    clock = time.perf_counter()
    trained = train(
        model,
        train_rows,
        output_dir=folder / "model",
        processor=processor,
        **TINY_RECIPE,
        **make_run_fields(plan, mode, seed),
    )
    seconds["train"] = time.perf_counter() - clock

    after = evaluate(trained.model, eval_rows, modes=("imagine",), processor=processor, batch_size=250, **TINY_RECIPE)
    seconds["evaluate"] += after["imagine"].seconds
    result = summarise(before["imagine"], after["imagine"], before["teacher"], mode, seed, seconds)
    write_result(folder, result)
    view_config = make_view_config(processor, build_config(folder, TINY_RECIPE))
    shown = [views for views in make_views(eval_rows[:_SHEET_ROWS], view_config) if isinstance(views, RowViews)]
    draw_sheet(folder, held_out, shown, before["imagine"], after["imagine"], describe_result(result))
    print(format_table(result, folder))
    return result


def refuse_unusable(folder: Path) -> None:
    """Raise `OutputError` when the folder cannot be made."""
    from imagine_opd.api import refuse_unwritable

    refuse_unwritable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--output {str(folder)!r}: {error.strerror}") from error


def describe_demo(mode: str, views: str, plan: DemoPlan) -> str:
    """What is about to happen, in two sentences."""
    crop = "the crop around the digit asked for" if views == "right" else "a crop around another digit (control)"
    return (
        "Each scene shows five shapes with a small digit each; the student sees it at a third of its size.\n"
        f"The teacher is the same model, frozen, and also sees {crop}. "
        f"Training: {plan.steps} steps of {plan.batch} scenes, mode {mode}.\n"
    )


def make_run_fields(plan: DemoPlan, mode: str, seed: int) -> dict[str, Any]:
    """Config fields of a demo run."""
    fields: dict[str, Any] = {
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.05},
        "warmup_steps": 10,
        "weight_decay": 0.0,
        "distillation_mode": mode,
        "logging_steps": 20,
        "save_strategy": "no",
        "seed": seed,
        "teacher_check_rows": 32,
        "check_rows": 64,
    }
    if mode == "sampled_token":
        fields["advantage_baseline"] = "expected"
    return fields


def summarise(
    before: ModeResult, after: ModeResult, teacher: ModeResult, mode: str, seed: int, seconds: dict[str, float]
) -> dict[str, Any]:
    """The content of `result.json`."""
    gap = teacher.accuracy - before.accuracy
    return {
        "student_before": as_interval(before),
        "student_after": as_interval(after),
        "teacher": as_interval(teacher),
        "gap_closed": round((after.accuracy - before.accuracy) / gap, 4) if gap > 0 else 0.0,
        "scenes": before.rows,
        "mode": mode,
        "seed": seed,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def as_interval(result: ModeResult) -> dict[str, float]:
    """Accuracy with its 95 % interval."""
    return {"accuracy": result.accuracy, "low": round(result.low, 4), "high": round(result.high, 4)}


def describe_result(result: dict[str, Any]) -> str:
    """The figures in one line, for the sheet."""
    figures = [f"{100 * result[name]['accuracy']:.1f} %" for name in ("student_before", "student_after", "teacher")]
    return (
        f"student {figures[0]} before, {figures[1]} after; teacher with the crop {figures[2]}; "
        f"{result['scenes']} held-out scenes, {100 * result['gap_closed']:.0f} % of the gap closed"
    )


def show(result: ModeResult) -> str:
    """`28.3 %`."""
    return f"{100 * result.accuracy:.1f} %"


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write `result.json`."""
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def format_table(result: dict[str, Any], folder: Path) -> str:
    """The closing table."""
    rows = (
        ("student, before", result["student_before"]),
        ("student, after", result["student_after"]),
        ("teacher, sees the crop", result["teacher"]),
    )
    lines = ["", f"{'accuracy on ' + str(result['scenes']) + ' held-out scenes':<34}{'':>8}   95 % interval"]
    for name, item in rows:
        low, high = 100 * item["low"], 100 * item["high"]
        lines.append(f"  {name:<32}{100 * item['accuracy']:>6.1f} %   {low:.1f} to {high:.1f} %")
    lines.append(f"  {'gap closed':<32}{100 * result['gap_closed']:>6.1f} %")
    stages = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    lines += ["", f"time: {stages}", f"look at {folder / 'contact_sheet.png'}; the model is in {folder / 'model'}"]
    return "\n".join(lines)


def draw_sheet(
    folder: Path, scenes: list[Scene], views: list[RowViews], before: ModeResult, after: ModeResult, subtitle: str
) -> None:
    """Draw `contact_sheet.png`: the first held-out scenes as both sides saw them, before and after."""
    from imagine_opd.demo.sheet import SheetRow, draw_contact_sheet

    rows = [
        SheetRow(
            image=scene.image,
            box=view.crop_boxes[0],
            student_view=restore_picture(view.student, 0),
            crop=restore_picture(view.teacher, 1),
            question=scene.question,
            gold=scene.answer,
            before_text=before.completions[index],
            after_text=after.completions[index],
            before_ok=before.correct[index],
            after_ok=after.correct[index],
        )
        for index, (scene, view) in enumerate(zip(scenes, views, strict=False))
    ]
    draw_contact_sheet(rows, folder / "contact_sheet.png", subtitle=subtitle)


def restore_picture(view: View, index: int) -> Any:
    """Image `index` of a view as `[H, W, 3]` uint8: the very patches the model is given, laid out again."""
    import numpy as np

    from imagine_opd.demo.tiny import MERGE, PATCH_PX

    start = int(view.image_grid_thw[:index].prod(axis=1).sum())
    _, high, wide = (int(size) for size in view.image_grid_thw[index])
    patches = view.pixel_values[start : start + high * wide]
    blocks = patches.reshape(high // MERGE, wide // MERGE, MERGE, MERGE, 3, PATCH_PX, PATCH_PX)
    picture = blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(high * PATCH_PX, wide * PATCH_PX, 3)
    return np.round((picture * 0.5 + 0.5) * 255).astype(np.uint8)
