"""`ImagineOPDConfig`: every setting of a run, its default and unit stated once, bad combinations refused when built.

Departures from the paper's recipe, and why:
1. `distillation_mode="full"` is the default: the exact KL is the zero-variance version of the sampled-token gradient.
2. `answer_hint=False`: answer-privileged teaching can lower accuracy; the crops alone carry the evidence.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, TrainingArguments

from imagine_opd.errors import ConfigError

RECIPE_FILE = "imagine_opd.json"
"""Written beside the weights: what the model was trained to see and to be asked (`RECIPE_FIELDS`)."""

IMAGINE_INSTRUCTION = (
    "{question}\n"
    "First say which region of the image matters. Then imagine zooming in on it and say what becomes clearer. "
    "End with the answer in <answer></answer> tags."
)
TEACHER_INSTRUCTION = (
    "{question}\n"
    "First say which region of the image matters. Then imagine zooming in on it and say what becomes clearer. "
    "End with the answer in <answer></answer> tags. "
    "The last images show that region magnified. Use them silently: write as if they were not there and never mention "
    "another image, crop or view."
)
DIRECT_INSTRUCTION = "{question}\nAnswer at once in <answer></answer> tags."
ANSWER_HINT = "\nThe reference answer is: {answer}. Use it silently."


@dataclass
class ImagineOPDConfig(TrainingArguments):
    """Settings of an Imagine-OPD run: all of `transformers.TrainingArguments`, and the fields below.

    Method: arXiv 2606.08719. Raises `ConfigError` (a `ValueError`) naming the field, its value and the fix.

    Teacher and objective
        teacher_model_kind: `base`, the frozen initial weights. A separate checkpoint: `train(..., teacher=...)`.
        distillation_mode: `full`, the exact reverse KL over the vocabulary; `sampled_token`, the paper's
            PPO-clipped policy gradient on the sampled tokens.
        distillation_alpha: 1.0, reverse KL (0 would be forward KL, 0.5 JSD; neither is built yet).
        epsilon, epsilon_high: clip range of the ratio, 1 - epsilon to 1 + epsilon_high (`sampled_token`).
        dual_clip: bound of the loss for negative advantages, as a ratio; must exceed 1 (`sampled_token`).
        advantage_baseline: `none` (paper), or `expected`: subtract the advantage's exact expectation, -KL, which
            leaves the expected gradient as it is (`sampled_token`).
        num_loss_tokens_to_skip: leave out the first k response tokens.
        mask_truncated_completions: leave out completions cut by `max_completion_length`.
        answer_hint: add the row's answer to the teacher's prompt.
        teacher_checks, teacher_check_rows: check the teacher before step 0, on that many rows.

    Rollout (names of TRL)
        num_generations, max_completion_length (tokens), temperature (sampling and loss alike), top_p, top_k, min_p,
        repetition_penalty, generation_kwargs, chat_template_kwargs; generation_batch_size: completions sampled in one
        call (`None`: all of a step).

    Views (pixels; `None`: the processor's own setting)
        min_pixels, max_pixels: budget of the global image, as an area.
        crop_min_pixels, crop_max_pixels: budget of an evidence crop; a minimum above its size zooms in.
        box_margin: share of a box's side added on each edge; min_crop_px: minimum side of a crop.
        merge_overlap: crops that share more than this part of the smaller one become one; reading_order: crops line by
        line instead of as given; highlight: `none`, or the crops' borders on the global image of `teacher` or `both`.
        student_scale, student_blur_px: in training the student's image is shrunk to this share and blown up again, and
        blurred with this deviation, as in S²VOPD.
        scaled_decode: JPEGs decoded at 1/2 to 1/8 where views shrink by as much; faster, not exact.
        max_image_pixels: refuse larger originals before decoding; view_threads: 0 for all cores.

    Prompts
        student_prompt_template, teacher_prompt_template, direct_prompt_template: contain `{question}`.

    Data and run
        image_root: images of a data file may not lie outside this folder (default: the file's own).
        box_format: default `xyxy`; `xywh`, or `xyxy_1000` (0 to 1000 of each side).
        bad_rows: `raise`, or `skip` (counted and reported).
        check_rows: decode the images of this many rows before the run starts; headers of all are read.
        log_completions, num_completions_to_log: sample completions written to `completions.jsonl`.
        model_dtype: dtype of loaded weights. kernel_backend: `auto`, `triton` or `reference`.
    """

    teacher_model_kind: str = field(default="base", metadata={"help": "Teacher weights: base (frozen initial)."})
    distillation_mode: str = field(default="full", metadata={"help": "full or sampled_token."})
    distillation_alpha: float = field(default=1.0, metadata={"help": "1: reverse KL."})
    epsilon: float = field(default=0.2, metadata={"help": "Lower clip of the ratio (paper: 0.2)."})
    epsilon_high: float = field(default=0.3, metadata={"help": "Upper clip of the ratio (paper: 0.3)."})
    dual_clip: float = field(default=3.0, metadata={"help": "Dual clip for negative advantages (paper: 3.0)."})
    advantage_baseline: str = field(default="none", metadata={"help": "none or expected."})
    num_loss_tokens_to_skip: int = field(default=0, metadata={"help": "Leave out the first k response tokens."})
    mask_truncated_completions: bool = field(default=False, metadata={"help": "Leave out completions cut short."})
    answer_hint: bool = field(default=False, metadata={"help": "Show the answer to the teacher."})
    teacher_checks: bool = field(default=True, metadata={"help": "Check the teacher before step 0."})
    teacher_check_rows: int = field(default=8, metadata={"help": "Rows used by the teacher checks."})

    num_generations: int = field(default=1, metadata={"help": "Completions per row (paper: 1)."})
    generation_batch_size: int | None = field(default=None, metadata={"help": "Completions sampled in one call."})
    max_completion_length: int = field(default=256, metadata={"help": "Most new tokens per completion (paper: 256)."})
    metric_for_best_model: str | None = field(default=None, metadata={"help": "Default: accuracy."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling and of both sides of the loss."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling."})
    top_k: int = field(default=0, metadata={"help": "Top-k sampling; 0: off."})
    min_p: float | None = field(default=None, metadata={"help": "Minimum probability relative to the top token."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "1: off."})
    generation_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "More GenerationConfig fields."})
    chat_template_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "For the chat template."})

    min_pixels: int | None = field(default=None, metadata={"help": "Least area of the global image."})
    max_pixels: int | None = field(default=None, metadata={"help": "Largest area of the global image."})
    crop_min_pixels: int | None = field(default=None, metadata={"help": "Least area of a crop."})
    crop_max_pixels: int | None = field(default=None, metadata={"help": "Largest area of a crop."})
    box_margin: float = field(default=0.1, metadata={"help": "Share of a box's side added on each edge."})
    min_crop_px: int = field(default=28, metadata={"help": "Minimum side of a crop, original pixels."})
    merge_overlap: float | None = field(default=None, metadata={"help": "Join crops that share more than this part."})
    reading_order: bool = field(default=False, metadata={"help": "Crops line by line instead of as given."})
    highlight: str = field(default="none", metadata={"help": "Borders of crops on the image: none, teacher or both."})
    student_scale: float = field(default=1.0, metadata={"help": "In training, the student's image at this scale."})
    student_blur_px: float = field(default=0.0, metadata={"help": "In training, a blur of the student's image."})
    scaled_decode: bool = field(default=False, metadata={"help": "Faster JPEG decoding, not exact."})
    max_image_pixels: int = field(default=178_956_970, metadata={"help": "Refuse larger originals."})
    view_threads: int = field(default=0, metadata={"help": "Threads for views; 0: all cores."})

    student_prompt_template: str = field(default=IMAGINE_INSTRUCTION, metadata={"help": "Contains {question}."})
    teacher_prompt_template: str = field(default=TEACHER_INSTRUCTION, metadata={"help": "Contains {question}."})
    direct_prompt_template: str = field(default=DIRECT_INSTRUCTION, metadata={"help": "Contains {question}."})
    answer_hint_template: str = field(default=ANSWER_HINT, metadata={"help": "Contains {answer}."})

    image_root: str | None = field(default=None, metadata={"help": "Images may not lie outside this folder."})
    box_format: str = field(default="xyxy", metadata={"help": "xyxy, xywh or xyxy_1000, unless the row says."})
    bad_rows: str = field(default="raise", metadata={"help": "raise or skip."})
    check_rows: int = field(default=1000, metadata={"help": "Rows whose images are decoded before the run."})
    log_completions: bool = field(default=True, metadata={"help": "Write sample completions."})
    num_completions_to_log: int = field(default=4, metadata={"help": "Completions written at each logging step."})
    model_dtype: str = field(default="float32", metadata={"help": "float32, bfloat16, float16 or auto."})
    kernel_backend: str = field(default="auto", metadata={"help": "auto, triton or reference."})

    # TrainingArguments fields whose default is the recipe's, not the library's.
    learning_rate: float = field(default=1e-6, metadata={"help": "AdamW learning rate (paper: 1e-6)."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW weight decay (paper: 0.01)."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule (paper: constant)."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clip (paper: 1.0)."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs (paper: 1)."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Rows per micro-batch."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Micro-batches per step (4 x 8 = 32)."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two log lines."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "A loader yields rows, not tensors."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows are passed whole; must stay False."})

    def __post_init__(self) -> None:
        refuse_bad_values(self)
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model, self.greater_is_better = "accuracy", True
        try:
            super().__post_init__()
        except (ValueError, TypeError) as error:
            raise ConfigError(f"config: {error}") from error


_OWN_FIELDS = frozenset(
    name
    for name in ImagineOPDConfig.__annotations__
    # The library's own fields keep the library's own checks.
    if name not in TrainingArguments.__dataclass_fields__ or name in ("learning_rate", "weight_decay")
)
_CHECKPOINTING = {  # transformers renamed these; a recipe works with either release
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
_OUR_GENERATION = frozenset(
    {
        *("max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        *("eos_token_id", "pad_token_id", "use_cache", "num_beams", "num_return_sequences", "return_dict_in_generate"),
        *("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    }
)
_OUR_TEMPLATE_KEYS = frozenset(("tokenize", "add_generation_prompt", "return_dict", "return_tensors", "padding"))

RECIPE_FIELDS = (
    "student_prompt_template",
    "teacher_prompt_template",
    "direct_prompt_template",
    "min_pixels",
    "max_pixels",
    "crop_min_pixels",
    "crop_max_pixels",
    "box_margin",
    "min_crop_px",
    "max_completion_length",
    "chat_template_kwargs",
)
"""What must be the same when the trained model is asked as when it was trained."""

_CHOICES = {
    "distillation_mode": ("full", "sampled_token"),
    "advantage_baseline": ("none", "expected"),
    "kernel_backend": ("auto", "triton", "reference"),
    "model_dtype": ("float32", "bfloat16", "float16", "auto"),
    "box_format": ("xyxy", "xywh", "xyxy_1000"),
    "highlight": ("none", "teacher", "both"),
    "bad_rows": ("raise", "skip"),
}
_RANGES = {
    "num_generations": (1, None),
    "generation_batch_size": (1, None),
    "max_completion_length": (1, None),
    "temperature": (1e-6, None),
    "top_p": (1e-6, 1.0),
    "top_k": (0, None),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, None),
    "epsilon": (0.0, 1.0),
    "epsilon_high": (0.0, None),
    "num_loss_tokens_to_skip": (0, None),
    "teacher_check_rows": (1, None),
    "check_rows": (0, None),
    "num_completions_to_log": (0, None),
    "min_pixels": (1, None),
    "max_pixels": (1, None),
    "crop_min_pixels": (1, None),
    "crop_max_pixels": (1, None),
    "box_margin": (0.0, None),
    "min_crop_px": (1, None),
    "merge_overlap": (0.0, 1.0),
    "student_scale": (1e-4, 1.0),
    "student_blur_px": (0.0, 1000.0),
    "max_image_pixels": (1, None),
    "view_threads": (0, None),
    "per_device_train_batch_size": (1, None),
    "gradient_accumulation_steps": (1, None),
    "learning_rate": (0.0, None),
}


def refuse_bad_values(config: ImagineOPDConfig) -> None:
    """Raise `ConfigError` for a value of a wrong kind or out of range, or two fields that do not go together."""
    for item in dataclasses.fields(config):
        if item.name in _OWN_FIELDS:
            refuse_bad_kind(item.name, getattr(config, item.name), str(item.type))
    for name, choices in _CHOICES.items():
        if (value := getattr(config, name)) not in choices:
            raise ConfigError(f"{name}={value!r}: expected one of {', '.join(choices)}")
    for name, (low, high) in _RANGES.items():
        value = getattr(config, name)
        if value is None:
            continue
        if value < low or (high is not None and value > high):
            upper = f" and at most {high}" if high is not None else ""
            raise ConfigError(f"{name}={value!r}: expected at least {low}{upper}")
    if config.teacher_model_kind != "base":
        raise ConfigError(
            f"teacher_model_kind={config.teacher_model_kind!r}: expected 'base' (the frozen initial weights); "
            "give another checkpoint as train(..., teacher=...)"
        )
    if config.distillation_alpha != 1.0:
        raise ConfigError(f"distillation_alpha={config.distillation_alpha!r}: expected 1.0 (reverse KL)")
    if config.dual_clip <= 1.0:
        raise ConfigError(f"dual_clip={config.dual_clip!r}: expected more than 1")
    if config.advantage_baseline != "none" and config.distillation_mode != "sampled_token":
        raise ConfigError(
            f"advantage_baseline={config.advantage_baseline!r} goes with distillation_mode='sampled_token', "
            f"not {config.distillation_mode!r}: the full KL has no sampling variance to reduce"
        )
    if config.distillation_mode == "full" and (config.top_p < 1.0 or config.top_k > 0 or config.min_p):
        raise ConfigError(
            "top_p, top_k and min_p change where the student is trained: distillation_mode='full' needs "
            "top_p=1.0, top_k=0 and min_p=None"
        )
    if config.distillation_mode == "full" and config.repetition_penalty != 1.0:
        raise ConfigError("repetition_penalty changes where the student is trained: distillation_mode='full' needs 1.0")
    if config.train_sampling_strategy not in ("random", "sequential"):
        raise ConfigError(
            f"train_sampling_strategy={config.train_sampling_strategy!r}: expected 'random' or 'sequential'; "
            "rows have no length before they are rolled out"
        )
    if config.include_num_input_tokens_seen not in (False, "no"):
        raise ConfigError("include_num_input_tokens_seen: the two views differ in length; leave it off")
    refuse_bad_keys("generation_kwargs", config.generation_kwargs, set(GenerationConfig().to_dict()) - _OUR_GENERATION)
    if taken := set(config.chat_template_kwargs or {}) & _OUR_TEMPLATE_KEYS:
        raise ConfigError(f"chat_template_kwargs: {sorted(taken)[0]!r} is set by the package; leave it out")
    if config.num_loss_tokens_to_skip >= config.max_completion_length:
        raise ConfigError(
            f"num_loss_tokens_to_skip={config.num_loss_tokens_to_skip} leaves nothing of "
            f"max_completion_length={config.max_completion_length}"
        )
    for low_name, high_name in (("min_pixels", "max_pixels"), ("crop_min_pixels", "crop_max_pixels")):
        low_value, high_value = getattr(config, low_name), getattr(config, high_name)
        if low_value is not None and high_value is not None and low_value > high_value:
            raise ConfigError(f"{low_name}={low_value} is above {high_name}={high_value}")
    if config.remove_unused_columns:
        raise ConfigError("remove_unused_columns=True would strip the rows; leave it False")
    for name in ("student_prompt_template", "teacher_prompt_template", "direct_prompt_template"):
        refuse_bad_template(name, getattr(config, name), ("question",))
    refuse_bad_template("answer_hint_template", config.answer_hint_template, ("answer",))


def refuse_bad_kind(name: str, value: Any, kind: str) -> None:
    """Raise `ConfigError` unless the value is of the field's annotated kind; numbers must be finite."""
    if value is None and "None" in kind:
        return
    kind = kind.split(" |")[0].split("[")[0]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        "bool": isinstance(value, bool),
        "int": is_number and not isinstance(value, float),
        "float": is_number and math.isfinite(value),
        "str": isinstance(value, str),
        "dict": isinstance(value, dict),
    }
    expected = {"bool": "true or false", "int": "a whole number", "float": "a finite number", "str": "text"}
    if not fits.get(kind, True):
        raise ConfigError(f"{name}={value!r}: expected {expected.get(kind, 'a mapping')}")


def refuse_bad_keys(name: str, value: dict[str, Any] | None, known: set[str]) -> None:
    """Raise `ConfigError` for a key that is not known."""
    if unknown := set(value or {}) - known:
        raise ConfigError(f"{name}: {sorted(unknown)[0]!r} is unknown, or has a field of its own")


def refuse_bad_template(name: str, template: str, fields: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless the template holds exactly the placeholders in `fields`."""
    try:
        found = {key for _, key, _, _ in string.Formatter().parse(template) if key is not None}
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name}={template!r}: {error}") from error
    if found != set(fields):
        expected = ", ".join(f"{{{key}}}" for key in fields)
        raise ConfigError(f"{name}={template!r}: expected the placeholder {expected} and no other")


def build_config(output_dir: str | Path, fields: dict[str, Any]) -> ImagineOPDConfig:
    """The config for `output_dir` with `fields` set; an unknown field is a `ConfigError` that names the nearest one."""
    known = {item.name for item in dataclasses.fields(ImagineOPDConfig) if item.init}
    fields = {_CHECKPOINTING.get(name, name) if name not in known else name: value for name, value in fields.items()}
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown config field {name!r}{hint}")
    return ImagineOPDConfig(output_dir=str(output_dir), **fields)


def save_recipe(config: ImagineOPDConfig, folder: str | Path) -> None:
    """Write `RECIPE_FIELDS` into `folder`, so that the model is later asked as it was trained."""
    recipe = {name: getattr(config, name) for name in RECIPE_FIELDS}
    Path(folder, RECIPE_FILE).write_text(json.dumps(recipe, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_recipe(model: object) -> dict[str, Any]:
    """The recipe saved beside a model folder, or `{}`. Raises `ConfigError` when the file is damaged."""
    if not isinstance(model, (str, Path)) or not Path(model, RECIPE_FILE).is_file():
        return {}
    path = Path(model, RECIPE_FILE)
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error}); remove it or train again") from error
    if not isinstance(recipe, dict) or (unknown := set(recipe) - set(RECIPE_FIELDS)):
        found = sorted(unknown) if isinstance(recipe, dict) else type(recipe).__name__
        raise ConfigError(f"{path}: expected an object with fields of {RECIPE_FIELDS}, found {found}")
    return recipe
