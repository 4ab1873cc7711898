"""TRL's side of the step bench: its stable `DistillationTrainer`, on-policy, reverse KL, on the same rows.

It shows both sides the same views, so that ours is held against it at `views="same"`. With an adapter its teacher is a
second copy of the weights, for it takes a model as teacher and no other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benches.step_cases import StepCase, build_model, build_processor, make_case_of, make_rows
from benches.step_turns import MOST_STEPS, Clock, Link, Turns, find_device
from imagine_opd.config.privilege import IMAGINE_INSTRUCTION
from imagine_opd.types import Row

try:
    from trl import DistillationConfig, DistillationTrainer
except (ImportError, RuntimeError) as error:  # TRL tells of a package that it misses by a RuntimeError
    raise LookupError(f"trl cannot be imported: {str(error).splitlines()[-1]}") from error


class Prompts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows as TRL takes them: a conversation, and images opened when a row is asked for."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        text = IMAGINE_INSTRUCTION.format(question=row.question)
        image = Image.open(str(row.images[0])).convert("RGB")
        return {"prompt": [{"role": "user", "content": text}], "images": [image]}


def make_config(case: StepCase, folder: str) -> Any:
    """The case as TRL's settings; all else is its default."""
    return DistillationConfig(
        output_dir=folder,
        per_device_train_batch_size=case.micro_rows,
        gradient_accumulation_steps=case.accumulation,
        max_steps=MOST_STEPS,
        max_completion_length=case.new_tokens,
        cache_implementation=None if case.cache == "dynamic" else case.cache,
        beta=1.0,  # reverse KL
        learning_rate=case.learning_rate,
        weight_decay=0.01,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        bf16=case.dtype == "bfloat16",
        gradient_checkpointing=case.gradient_checkpointing,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )


def run(case: StepCase, link: Link, folder: Path) -> None:
    """Train until told to stop."""
    if case.views != "same":
        raise LookupError("trl shows teacher and student the same views: it goes with views='same'")
    device = find_device()
    processor = build_processor(case)
    model = build_model(case, processor, device)
    teacher = build_model(make_case_of(case, trains="full"), processor, device).requires_grad_(False)
    turns = Turns(link, device)
    with tempfile.TemporaryDirectory() as output:
        trainer = DistillationTrainer(
            model=model,
            teacher_model=teacher,
            args=make_config(case, output),
            train_dataset=Prompts(make_rows(case, folder, MOST_STEPS)),
            processing_class=processor,
            callbacks=[turns],
        )
        time_stages(trainer, turns.clock, teacher)
        give_completions(trainer, turns)
        trainer.train()


def time_stages(trainer: Any, clock: Clock, teacher: Any) -> None:
    """Put the bench's clock around the trainer's own methods; a stage inside another is taken out of it."""
    hidden = trainer._get_last_hidden_state

    def name_side(unwrapped_model: Any, *arguments: Any, **fields: Any) -> Any:
        with clock.stage("teacher" if unwrapped_model is teacher else "student"):
            return hidden(unwrapped_model, *arguments, **fields)

    trainer._get_last_hidden_state = name_side
    for method, stage in {
        "_generate_and_score_completions": "views",
        "_generate_single_turn": "rollout",
        "_compute_loss": "loss",
        "training_step": "backward",
    }.items():
        setattr(trainer, method, _time(getattr(trainer, method), clock, stage))


def _time(method: Any, clock: Clock, stage: str) -> Any:
    def timed(*arguments: Any, **fields: Any) -> Any:
        with clock.stage(stage):
            return method(*arguments, **fields)

    return timed


def give_completions(trainer: Any, turns: Turns) -> None:
    """Completions of another peer's record in the place of sampled ones; those of a step are kept either way."""
    sample = trainer._generate_single_turn

    def sample_or_take(*arguments: Any, **fields: Any) -> Any:
        given = turns.load_completions()
        found = sample(*arguments, **fields)  # also where they are given: the first timed step must not be the first
        found = found if given is None else given.tolist()
        turns.completion_ids_BT = torch.tensor(found)
        return found

    trainer._generate_single_turn = sample_or_take
