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

_OUR_TEMPLATE_KEYS = frozenset(("tokenize", "add_generation_prompt", "return_dict", "return_tensors", "padding"))

CHOICES: dict[str, tuple[str, ...]] = {}
RANGES: dict[str, tuple[float, float | None]] = {}


@dataclass
class PrivilegeFields:
    """Templates and the teacher's privilege.

    student_prompt_template, teacher_prompt_template, direct_prompt_template: contain `{question}`.
    answer_hint: add the row's answer to the teacher's prompt, as answer_hint_template (contains `{answer}`) says it.
    chat_template_kwargs: for the chat template.
    """

    student_prompt_template: str = field(default=IMAGINE_INSTRUCTION, metadata={"help": "Contains {question}."})
    teacher_prompt_template: str = field(default=TEACHER_INSTRUCTION, metadata={"help": "Contains {question}."})
    direct_prompt_template: str = field(default=DIRECT_INSTRUCTION, metadata={"help": "Contains {question}."})
    answer_hint: bool = field(default=False, metadata={"help": "Show the answer to the teacher."})
    answer_hint_template: str = field(default=ANSWER_HINT, metadata={"help": "Contains {answer}."})
    chat_template_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "For the chat template."})


def refuse_bad_privilege(config: ImagineOPDConfig) -> None:
    """Raise `ConfigError` for fields of the privilege that do not go together."""
    if taken := set(config.chat_template_kwargs or {}) & _OUR_TEMPLATE_KEYS:
        raise ConfigError(f"chat_template_kwargs: {sorted(taken)[0]!r} is set by the package; leave it out")
    for name in ("student_prompt_template", "teacher_prompt_template", "direct_prompt_template"):
        refuse_bad_template(name, getattr(config, name), ("question",))
    refuse_bad_template("answer_hint_template", config.answer_hint_template, ("answer",))
