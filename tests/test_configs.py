"""Each shipped recipe loads as it is and trains the tiny model for two steps, with nothing of its method changed."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from imagine_opd.cli.train import read_config, read_numbers
from imagine_opd.config import build_config
from imagine_opd.demo.recipe import TINY_RECIPE
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


def test_recipes_are_the_four_the_docs_speak_of():
    assert [path.stem for path in CONFIGS] == ["full", "imagine", "opsd-lora", "vision-opd"]
