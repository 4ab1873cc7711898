"""Fields of the two prompts: what each side is told, and what only the teacher knows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from imagine_opd.config.checks import refuse_bad_template
from imagine_opd.errors import ConfigError

if TYPE_CHECKING:
    from imagine_opd.config import ImagineOPDConfig

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
TEXT_HINT = "\nThe evidence is here: {hint}. Use this silently and never mention it."

_OUR_TEMPLATE_KEYS = frozenset(("tokenize", "add_generation_prompt", "return_dict", "return_tensors", "padding"))

CHOICES: dict[str, tuple[str, ...]] = {
    "teacher_view": ("crops", "crops_only", "whole", "full_resolution", "images"),
    "teacher_images_mode": ("append", "replace", "full"),
    "text_hint": ("none", "relative_1000", "pixels", "row"),
    "contrast": ("none", "mean", "blur", "low_resolution"),
}
RANGES: dict[str, tuple[float, float | None]] = {
    "teacher_min_pixels": (1, None),
    "teacher_max_pixels": (1, None),
}


@dataclass
class PrivilegeFields:
    """Templates and the teacher's privilege.

    student_prompt_template, teacher_prompt_template, direct_prompt_template: contain `{question}`; the teacher's is
        used where it sees more images than the student.
    teacher_view: `crops`, the whole images and the boxes' crops; `crops_only`; `whole`, what the student sees (for a
        privilege in words, or a student degraded by `student_scale`); `full_resolution`, the whole images at
        teacher_min_pixels to teacher_max_pixels (an area; default: the processor's) beside a student at max_pixels, no
        box needed; `images`, the row's `teacher_images`.
    teacher_images_mode: `append` them to the row's images; `replace` those; `full`, they are the teacher's complete
        list, the row's own among them.
    text_hint: `relative_1000` or `pixels` tell the teacher where the boxes lie; `row` gives it the row's `hint`;
        text_hint_template contains `{hint}`.
    answer_hint: add the row's answer to the teacher's prompt, as answer_hint_template (contains `{answer}`) says it.
    contrast: score each completion once more with the teacher's evidence neutralised (`mean` colour, `blur`,
        `low_resolution`), for `contrast_beta` and `contrast_token_weight`.
    chat_template_kwargs: for the chat template.
    """

    student_prompt_template: str = field(default=IMAGINE_INSTRUCTION, metadata={"help": "Contains {question}."})
    teacher_prompt_template: str = field(default=TEACHER_INSTRUCTION, metadata={"help": "Contains {question}."})
    direct_prompt_template: str = field(default=DIRECT_INSTRUCTION, metadata={"help": "Contains {question}."})
    answer_hint: bool = field(default=False, metadata={"help": "Show the answer to the teacher."})
    answer_hint_template: str = field(default=ANSWER_HINT, metadata={"help": "Contains {answer}."})
    teacher_view: str = field(default="crops", metadata={"help": "What only the teacher sees."})
    teacher_images_mode: str = field(default="append", metadata={"help": "append, replace or full."})
    teacher_min_pixels: int | None = field(default=None, metadata={"help": "Least area at full resolution."})
    teacher_max_pixels: int | None = field(default=None, metadata={"help": "Largest area at full resolution."})
    text_hint: str = field(default="none", metadata={"help": "Boxes or the row's hint in words, to the teacher."})
    text_hint_template: str = field(default=TEXT_HINT, metadata={"help": "Contains {hint}."})
    contrast: str = field(default="none", metadata={"help": "Neutral evidence of a second teacher pass."})
    chat_template_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "For the chat template."})


def refuse_bad_privilege(config: ImagineOPDConfig) -> None:
    """Raise `ConfigError` for fields of the privilege that do not go together."""
    if taken := set(config.chat_template_kwargs or {}) & _OUR_TEMPLATE_KEYS:
        raise ConfigError(f"chat_template_kwargs: {sorted(taken)[0]!r} is set by the package; leave it out")
    for name in ("student_prompt_template", "teacher_prompt_template", "direct_prompt_template"):
        refuse_bad_template(name, getattr(config, name), ("question",))
    refuse_bad_template("answer_hint_template", config.answer_hint_template, ("answer",))
    refuse_bad_template("text_hint_template", config.text_hint_template, ("hint",))
    if config.teacher_view != "full_resolution":
        for name in ("teacher_min_pixels", "teacher_max_pixels"):
            if (value := getattr(config, name)) is not None:
                raise ConfigError(
                    f"{name}={value} goes with teacher_view='full_resolution'; crops have crop_max_pixels"
                )
    if config.contrast != "none" and config.teacher_view in ("whole", "images"):
        raise ConfigError(
            f"contrast={config.contrast!r} needs evidence cut from the image; teacher_view={config.teacher_view!r} "
            "has none"
        )
