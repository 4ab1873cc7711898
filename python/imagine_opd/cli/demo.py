"""`imagine-opd demo`: Imagine-OPD on the tiny world, before and after; a table, a contact sheet and `result.json`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagine_opd.demo.plans import PLANS, PRIVILEGES, Views, describe_run, make_rows, make_run_fields
from imagine_opd.errors import OutputError

if TYPE_CHECKING:
    from imagine_opd.config import ImagineOPDConfig
    from imagine_opd.demo.scenes import Scene
    from imagine_opd.evaluation import EvalResult, ModeResult
    from imagine_opd.types import PromptPair, Row, ViewConfig

EVAL_SCENES = 1000
"""Held-out scenes per accuracy: the 95 % interval is then at most 3.1 points to either side."""
_EVAL_SEED = 987_654
_EVAL_BATCH = 250
_SHEET_ROWS = 8


def run_demo(
    output: str, mode: str, views: Views, seed: int, long: bool, privilege: str = "crops", lora: bool = False
) -> dict[str, Any]:
    """Evaluate, train, evaluate; print a table; write `result.json` and `contact_sheet.png`. Returns the result.

    Started in several processes, they share the scenes of each step and of the evaluation; the first one reports.
    """
    folder = Path(output)
    refuse_unusable(folder)
    started = time.perf_counter()
    processes, is_first = read_launch()
    say = print_now if is_first else (lambda text: None)
    say(describe_run(mode, privilege, views, lora, long))

    import torch
    from transformers.utils.logging import disable_progress_bar

    from imagine_opd.api import train
    from imagine_opd.config import build_config
    from imagine_opd.demo import base_model_path, make_scenes
    from imagine_opd.models import load_model, load_processor

    disable_progress_bar()  # of the libraries below; the training's own stays
    torch.set_num_threads(1)  # the model is too small for more to pay, and the run then repeats on any machine
    glyphs = PRIVILEGES[privilege].glyphs
    held_out = make_scenes(EVAL_SCENES, _EVAL_SEED, glyphs)
    eval_rows = make_rows(held_out, privilege, "right")
    train_rows = make_rows(make_scenes(PLANS[mode, long].scenes, seed, glyphs), privilege, views)
    processor = load_processor(None, base_model_path())
    fields = make_run_fields(mode, privilege, lora, long, seed, processes)
    fields["use_cpu"] = not torch.cuda.is_available()  # else several processes would each train alone
    config = build_config(folder / "model", fields)
    model = load_model(base_model_path()).to(config.device)
    seconds = {"setup": time.perf_counter() - started}

    before = evaluate_sides(model, processor, eval_rows, config, ("imagine", "teacher"))
    say(f"before: student {show(before['imagine'])}, teacher {show(before['teacher'])}")
    seconds["evaluate"] = before["imagine"].seconds + before["teacher"].seconds

    clock = time.perf_counter()
    trained = train(model, train_rows, output_dir=folder / "model", processor=processor, **fields)
    seconds["train"] = time.perf_counter() - clock

    after = evaluate_sides(trained.model, processor, eval_rows, config, ("imagine",))
    seconds["evaluate"] += after["imagine"].seconds
    result = summarise(before["imagine"], after["imagine"], before["teacher"], mode, seed, seconds)
    result |= {"privilege": privilege, "lora": lora, "processes": processes}
    if is_first:
        write_result(folder, result)
        pairs, view_config = build_shown(processor, eval_rows[:_SHEET_ROWS], config)
        draw_sheet(folder, held_out, pairs, view_config, before["imagine"], after["imagine"], result)
    say(format_table(result, folder))
    return result


def read_launch() -> tuple[int, bool]:
    """How many processes a launcher started, and whether this is the first."""
    return int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"


def print_now(text: str) -> None:
    """A line, out at once."""
    print(text, flush=True)


def evaluate_sides(
    model: Any, processor: Any, rows: list[Row], config: ImagineOPDConfig, modes: tuple[str, ...]
) -> EvalResult:
    """Accuracy of both sides on what they see in training: where the student's image is degraded, here too."""
    from imagine_opd.evaluation import evaluate_model
    from imagine_opd.parallel import gather_parameters
    from imagine_opd.settings import make_view_config

    view_config = make_view_config(processor, config, training=True)
    with gather_parameters(model) as whole:
        return evaluate_model(whole, processor, rows, view_config, config, modes, _EVAL_BATCH, shared=True)


def build_shown(processor: Any, rows: list[Row], config: ImagineOPDConfig) -> tuple[list[PromptPair], ViewConfig]:
    """Both sides of the sheet's rows, and the view settings they were made with."""
    from imagine_opd.privilege import build_pairs
    from imagine_opd.settings import make_privilege_config, make_view_config
    from imagine_opd.types import ViewError

    view_config = make_view_config(processor, config, training=True)
    pairs = build_pairs(rows, processor, view_config, make_privilege_config(config))
    return [pair for pair in pairs if not isinstance(pair, ViewError)], view_config


def refuse_unusable(folder: Path) -> None:
    """Raise `OutputError` when the folder cannot be made."""
    from imagine_opd.api import refuse_unwritable

    refuse_unwritable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--output {str(folder)!r}: {error.strerror}") from error


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
    gives = PRIVILEGES[result["privilege"]].gives
    return (
        f"student {figures[0]} before, {figures[1]} after; teacher, {gives}, {figures[2]}; "
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
        ("teacher, " + PRIVILEGES[result["privilege"]].gives, result["teacher"]),
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
    folder: Path,
    scenes: list[Scene],
    pairs: list[PromptPair],
    view_config: ViewConfig,
    before: ModeResult,
    after: ModeResult,
    result: dict[str, Any],
) -> None:
    """Draw `contact_sheet.png`: the first held-out scenes as both sides saw them, before and after."""
    from imagine_opd.demo.sheet import SheetRow, draw_contact_sheet
    from imagine_opd.pictures import restore_pictures

    kind = PRIVILEGES[result["privilege"]]
    rows = []
    for index, (scene, pair) in enumerate(zip(scenes, pairs, strict=False)):
        student, teacher = pair.student.view, pair.teacher.view
        # The crop comes behind the whole image; without a crop there is that image alone.
        picture = restore_pictures(teacher, len(teacher.frame_counts) - 1, view_config)[0]
        rows.append(
            SheetRow(
                image=scene.image,
                box=scene.box,
                student_view=restore_pictures(student, 0, view_config)[0].pixels_HWC,
                evidence=scene.hint if kind.evidence == "words" else picture.pixels_HWC,
                question=scene.question,
                gold=scene.answer,
                before_text=before.completions[index],
                after_text=after.completions[index],
                before_ok=before.correct[index],
                after_ok=after.correct[index],
                evidence_label=kind.evidence_label,
            )
        )
    draw_contact_sheet(rows, folder / "contact_sheet.png", subtitle=describe_result(result))
