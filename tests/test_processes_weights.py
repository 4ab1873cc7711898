"""Adapters and moving teachers in two processes: weights, averages and their checkpoints equal those of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_in_processes
from test_processes import RUN, largest_difference, make_rows

from imagine_opd.config import build_config
from imagine_opd.demo import base_model_path
from imagine_opd.parallel.sharding import gather_parameters, is_fsdp2
from imagine_opd.trainer import ImagineOPDTrainer

LORA = {"use_peft": True, "lora_r": 4, "lora_modules_to_save": ["lm_head"]}
EMA = {"teacher_model_kind": "ema", "teacher_update_rate": 0.3}
KINDS: dict[str, dict[str, Any]] = {
    "ema": {**EMA},
    "lora": {**LORA},
    "lora ema": {**LORA, **EMA},
    "live": {"teacher_model_kind": "live"},
}


def train(folder: Path, fields: dict[str, Any], resume: str | None = None) -> dict[str, Any]:
    args = build_config(folder, {**RUN, "teacher_checks": False, **fields})
    torch.manual_seed(0)
    trainer = ImagineOPDTrainer(str(base_model_path()), args, make_rows())
    trainer.train(resume_from_checkpoint=resume)
    with gather_parameters(trainer.model_wrapped) as model:
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {
        "weights": weights,
        "averages": trainer.teacher.state_dict(),
        "sharded": is_fsdp2(trainer.model_wrapped),
    }


def train_all(folder: Path) -> dict[str, Any]:
    # FSDP last: what it sets in the environment stays for the process.
    found = {f"ddp {name}": train(folder / f"ddp {name}", fields) for name, fields in KINDS.items()}
    for name, fields in KINDS.items():
        own, fields = folder / f"fsdp2 {name}", {**fields, "fsdp": True, "save_strategy": "steps", "save_steps": 2}
        found[f"fsdp2 {name}"] = train(own, fields)
        found[f"resumed {name}"] = train(own, fields, str(own / "checkpoint-2"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return run_in_processes(train_all, folder, timeout_s=400)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_at_the_weights_and_averages_of_one(kind, folder, two):
    one = train(folder / f"one {kind}", {**KINDS[kind], "per_device_train_batch_size": 4})
    assert bool(one["averages"]) == ("ema" in kind)
    for how in ("ddp", "fsdp2", "resumed"):
        for rank in range(2):
            found = two[rank][f"{how} {kind}"]
            assert found["sharded"] == (how != "ddp")
            assert largest_difference(found["weights"], one["weights"]) < 1e-5, how
            if one["averages"]:
                assert largest_difference(found["averages"], one["averages"]) < 1e-5, how
