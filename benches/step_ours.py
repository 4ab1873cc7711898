"""Our side of the step bench: `ImagineOPDTrainer` trains, and waits for a command between two of its steps."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benches.step_cases import StepCase, build_model, build_processor, make_rows
from benches.step_turns import MOST_STEPS, Link, Turns, find_device
from imagine_opd import ImagineOPDConfig, ImagineOPDTrainer
from imagine_opd.config import build_config

_NAMES = {"step": "backward"}
"""Forward and backward together in the trainer; without the stages inside of it, the backward pass is left."""


def make_config(case: StepCase, folder: str, **changes: Any) -> ImagineOPDConfig:
    """The case as a run's settings; what a run does only at its start or end is off."""
    fields: dict[str, Any] = {
        "per_device_train_batch_size": case.micro_rows,
        "gradient_accumulation_steps": case.accumulation,
        "generation_batch_size": case.micro_rows,
        "max_steps": MOST_STEPS,
        "max_completion_length": case.new_tokens,
        "teacher_view": "crops" if case.views == "crops" else "whole",
        "generation_kwargs": None if case.cache == "dynamic" else {"cache_implementation": case.cache},
        "box_margin": 0.0,
        "min_crop_px": 1,
        "learning_rate": case.learning_rate,
        "freeze_vision": True,
        "bf16": case.dtype == "bfloat16",
        **({"activation_checkpointing": True} if case.gradient_checkpointing else {}),
        "train_sampling_strategy": "sequential",
        "teacher_checks": False,
        "probe_rows": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "view_threads": 0 if torch.cuda.is_available() else 1,
        "teacher_placement": "device",
        **changes,
    }
    return build_config(folder, fields)


def run(case: StepCase, link: Link, folder: Path) -> None:
    """Train until told to stop."""
    device = find_device()
    processor = build_processor(case)
    model = build_model(case, processor, device)
    rows = make_rows(case, folder, MOST_STEPS)
    with tempfile.TemporaryDirectory() as output:
        turns = Turns(link, device)
        trainer = ImagineOPDTrainer(
            model, make_config(case, output), train_dataset=rows, processor=processor, callbacks=[turns]
        )
        build = trainer.builder.build

        def keep_completions(*arguments: Any) -> Any:
            found = build(*arguments)
            turns.completion_ids_BT = found[1].completion_ids_BT[found[1].completion_mask_BT].cpu()
            turns.completion_ids_BT = turns.completion_ids_BT.view(len(found[1].completion_mask_BT), -1)
            return found

        trainer.builder.build = keep_completions
        # The trainer's own stages, on the bench's clock: it tells CPU time from wall time, and nested stages apart.
        trainer.step_metrics.stage = lambda name: turns.clock.stage(_NAMES.get(name, name))
        trainer.train()
