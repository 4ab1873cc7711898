"""`ImagineOPDConfig`: every setting of a run, its default and unit stated once, bad combinations refused when built.

Each file of this folder holds the fields of one noun, with their choices, ranges and refusals; this one joins them.

Departures from the paper's recipe, and why:
1. `distillation_mode="full"` is the default: the exact KL is the zero-variance version of the sampled-token gradient.
2. `answer_hint=False`: answer-privileged teaching can lower accuracy; the crops alone carry the evidence.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from imagine_opd.config import forwards, guards, objective, privilege, rollout, run, views, vllm, weights
from imagine_opd.config.checks import refuse_bad_kind
from imagine_opd.config.recipe import RECIPE_FIELDS, RECIPE_FILE, load_recipe, save_recipe
from imagine_opd.errors import ConfigError

__all__ = ["RECIPE_FIELDS", "RECIPE_FILE", "ImagineOPDConfig", "build_config", "load_recipe", "save_recipe"]

_PARTS = (weights, objective, rollout, vllm, forwards, views, privilege, guards, run)
_CHECKPOINTING = {  # transformers renamed these; a recipe works with either release
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
_RANGES: dict[str, tuple[float, float | None]] = {
    "per_device_train_batch_size": (1, None),
    "gradient_accumulation_steps": (1, None),
    "learning_rate": (0.0, None),
}


@dataclass
class ImagineOPDConfig(
    weights.WeightFields,
    objective.ObjectiveFields,
    rollout.RolloutFields,
    vllm.VLLMFields,
    forwards.ForwardFields,
    views.ViewFields,
    privilege.PrivilegeFields,
    guards.GuardFields,
    run.RunFields,
    TrainingArguments,
):
    """Settings of an Imagine-OPD run: all of `transformers.TrainingArguments`, and the fields of the classes above.

    Method: arXiv 2606.08719. Raises `ConfigError` (a `ValueError`) naming the field, its value and the fix.
    """

    # TrainingArguments fields whose default is the recipe's, not the library's.
    metric_for_best_model: str | None = field(default=None, metadata={"help": "Default: accuracy."})
    learning_rate: float = field(default=1e-6, metadata={"help": "AdamW learning rate (paper: 1e-6)."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW weight decay (paper: 0.01)."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule (paper: constant)."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clip (paper: 1.0)."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs (paper: 1)."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Rows per micro-batch."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Micro-batches per step (4 x 8 = 32)."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two log lines."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "A loader yields rows, not tensors."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "It waits for the device; guards see to it."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows are passed whole; must stay False."})

    def __post_init__(self) -> None:
        objective.read_aliases(self)
        vllm.settle_is_clip(self)
        refuse_bad_values(self)
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model, self.greater_is_better = "accuracy", True
        try:
            super().__post_init__()
        except (ValueError, TypeError) as error:
            raise ConfigError(f"config: {error}") from error


# The library's own fields keep the library's own checks.
_OWN_FIELDS = {item.name for item in dataclasses.fields(ImagineOPDConfig)} - set(TrainingArguments.__dataclass_fields__)
_OWN_FIELDS |= {"learning_rate", "weight_decay"}


def refuse_bad_values(config: ImagineOPDConfig) -> None:
    """Raise `ConfigError` for a value of a wrong kind or out of range, or two fields that do not go together."""
    for item in dataclasses.fields(config):
        if item.name in _OWN_FIELDS:
            refuse_bad_kind(item.name, getattr(config, item.name), str(item.type))
    for part in _PARTS:
        for name, choices in part.CHOICES.items():
            if (value := getattr(config, name)) not in choices:
                raise ConfigError(f"{name}={value!r}: expected one of {', '.join(choices)}")
    for ranges in (_RANGES, *(part.RANGES for part in _PARTS)):
        for name, (low, high) in ranges.items():
            value = getattr(config, name)
            if value is None:
                continue
            if value < low or (high is not None and value > high):
                upper = f" and at most {high}" if high is not None else ""
                raise ConfigError(f"{name}={value!r}: expected at least {low}{upper}")
    weights.refuse_bad_weights(config)
    objective.refuse_bad_objective(config)
    rollout.refuse_bad_rollout(config)
    vllm.refuse_bad_vllm(config)
    views.refuse_bad_views(config)
    privilege.refuse_bad_privilege(config)
    guards.refuse_bad_guards(config)
    if config.train_sampling_strategy not in ("random", "sequential"):
        raise ConfigError(
            f"train_sampling_strategy={config.train_sampling_strategy!r}: expected 'random' or 'sequential'; "
            "rows have no length before they are rolled out"
        )
    if config.include_num_input_tokens_seen not in (False, "no"):
        raise ConfigError("include_num_input_tokens_seen: the two views differ in length; leave it off")
    if config.remove_unused_columns:
        raise ConfigError("remove_unused_columns=True would strip the rows; leave it False")


def build_config(output_dir: str | Path, fields: dict[str, Any]) -> ImagineOPDConfig:
    """The config for `output_dir` with `fields` set; an unknown field is a `ConfigError` that names the nearest one."""
    known = {item.name for item in dataclasses.fields(ImagineOPDConfig) if item.init}
    fields = {_CHECKPOINTING.get(name, name) if name not in known else name: value for name, value in fields.items()}
    for name in fields:
        if name not in known:
            if name in objective.FOREIGN:
                raise ConfigError(f"{name}: {objective.FOREIGN[name]}")
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown config field {name!r}{hint}")
    return ImagineOPDConfig(output_dir=str(output_dir), **fields)
