"""Each shipped recipe loads as it is and trains the tiny model for two steps, with nothing of its method changed."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from memory_models import build_published_config

from imagine_opd.cli.train import read_config, read_numbers
from imagine_opd.config import build_config
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.memory import MemoryPlan, estimate_view, plan_memory, read_memory_settings
from imagine_opd.memory.settings import GIB
from imagine_opd.trainer import ImagineOPDTrainer

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/*.yaml"))
CALL = {"model", "data", "output_dir"}
# What the tiny world and this machine decide; everything else is the recipe's.
TINY = {
    **TINY_RECIPE,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "save_strategy": "no",
    "teacher_checks": False,
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_loads_and_trains_two_steps(path, tiny, make_rows, tmp_path):
    fields = read_numbers(read_config(path))
    assert fields.keys() >= CALL
    recipe = {name: value for name, value in fields.items() if name not in CALL}
    args = build_config(tmp_path / "run", {**recipe, **TINY})
    kept = {name: value for name, value in recipe.items() if name not in TINY and hasattr(args, name)}
    assert {name: getattr(args, name) for name in kept} == kept
    trainer = ImagineOPDTrainer(copy.deepcopy(tiny.model), args, make_rows(8), processor=tiny.processor)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    assert any(loss != 0 for loss in losses)
    after = trainer.model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def plan_recipe(path: Path) -> tuple[MemoryPlan, str]:
    """The plan of one process for a 4B model, as many processes as the recipe's comment says, all images at their
    largest: two crops in the teacher's view. And the comment."""
    text = path.read_text()
    found = re.search(r"on (one card|(\d+) cards) of 80 GB", text)
    count = int(found[2] or 1)
    recipe = {name: value for name, value in read_numbers(read_config(path)).items() if name not in CALL}
    args = build_config("unused", {**recipe, "bf16": False, "use_cpu": True, "report_to": []})
    crop = args.crop_max_pixels or args.max_pixels
    whole = [] if args.teacher_view == "crops_only" else [args.max_pixels]
    model = build_published_config(2560, 36, 32, 9728, True)
    views = (estimate_view(model, images, 600) for images in ([args.max_pixels], [*whole, crop, crop]))
    own = {
        "compute_dtype": "bfloat16" if recipe["bf16"] else "float32",
        "lora_r": args.lora_r if args.use_peft else 0,
        "freeze_vision": args.use_peft if args.freeze_vision is None else args.freeze_vision,
        "parallelism": "fsdp2" if count > 1 else "none",
        "num_processes": count,
    }
    return plan_memory(model, read_memory_settings(args, *views, **own)), text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_fits_the_cards_that_its_comment_says(path):
    plan, text = plan_recipe(path)
    assert plan.device_bytes < 0.95 * 79 * GIB, plan.describe()
    if plan.settings.num_processes > 1:
        launch = f"accelerate/fsdp2.yaml --num_processes {plan.settings.num_processes} -m imagine_opd train"
        assert f"{launch} configs/{path.name}" in text
        alone = dataclasses.replace(plan.settings, parallelism="none", num_processes=1)
        assert plan_memory(plan.shape, alone).device_bytes > 79 * GIB  # one card would not do


def test_recipes_are_the_four_the_docs_speak_of():
    assert [path.stem for path in CONFIGS] == ["full", "imagine", "opsd-lora", "vision-opd"]
