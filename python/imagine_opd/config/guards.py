"""Fields of the guards: what is checked before and while a run goes, and when it stops."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagine_opd.errors import ConfigError

if TYPE_CHECKING:
    from imagine_opd.config import ImagineOPDConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "leak_action": ("none", "mask", "unlikelihood"),
}
RANGES: dict[str, tuple[float, float | None]] = {
    "teacher_check_rows": (1, None),
    "teacher_check_steps": (0, None),
    "probe_rows": (0, None),
    "probe_steps": (0, None),
    "leak_ngram": (0, None),
    "leak_unlikelihood_weight": (0.0, None),
    "collapse_window": (1, None),
    "collapse_baseline_logs": (1, None),
    "collapse_patience": (1, None),
    "collapse_length_low": (0.0, 1.0),
    "collapse_length_high": (1.0, None),
    "collapse_tag_share": (0.0, 1.0),
    "collapse_entropy_share": (0.0, 1.0),
    "collapse_repetition": (0.0, 1.0),
    "collapse_truncation": (0.0, 1.0),
    "max_nonfinite_steps": (1, None),
}


@dataclass
class GuardFields:
    """Checks, monitors and what they do.

    teacher_checks, teacher_check_rows: check the teacher before step 0, on that many rows; teacher_check_steps: and
        again every so many steps (0: only before step 0). Without teacher_checks neither.
    probe_rows, probe_steps: rows on which the teacher's gap by views and by answer hint is measured before step 0
        (0: not at all), and again every so many steps (0: only before step 0, beside teacher_checks).
    leak_phrases: more phrases that must not stand in a completion, beside the built-in lexicon; leak_ngram: words in
        a row copied from what only the teacher was told (0: lexicon only); leak_action: `none` (counted), `mask`
        (leaked tokens leave the loss), `unlikelihood` (a loss of leak_unlikelihood_weight on their probability).
    collapse_...: limits of the monitors; `None` turns one off. Shares are of the mean of the first
        collapse_baseline_logs logs; a monitor looks at the mean of the last collapse_window logs and speaks when it
        is out of its limit collapse_patience logs in a row. stop_on_collapse: save and stop instead of a warning.
    max_nonfinite_steps: steps in a row whose loss or gradient is not finite before the run is given up.
    """

    teacher_checks: bool = field(default=True, metadata={"help": "Check the teacher before step 0."})
    teacher_check_rows: int = field(default=8, metadata={"help": "Rows used by the teacher checks."})
    teacher_check_steps: int = field(default=200, metadata={"help": "Steps between two checks; 0: only at the start."})
    probe_rows: int = field(default=8, metadata={"help": "Rows of the privilege probe; 0: off."})
    probe_steps: int = field(default=0, metadata={"help": "Steps between two probes; 0: only at the start."})
    leak_phrases: list[str] | None = field(default=None, metadata={"help": "More phrases that count as a leak."})
    leak_ngram: int = field(default=4, metadata={"help": "Words in a row from the teacher's text; 0: off."})
    leak_action: str = field(default="none", metadata={"help": "none, mask or unlikelihood."})
    leak_unlikelihood_weight: float = field(default=0.1, metadata={"help": "Weight of the unlikelihood loss."})
    stop_on_collapse: bool = field(default=False, metadata={"help": "Save and stop when a monitor finds a collapse."})
    collapse_window: int = field(default=5, metadata={"help": "Logs in the monitors' moving mean."})
    collapse_baseline_logs: int = field(default=10, metadata={"help": "First logs, to which shares refer."})
    collapse_patience: int = field(default=3, metadata={"help": "Logs in a row out of the limit."})
    collapse_length_low: float | None = field(default=0.5, metadata={"help": "Least share of the first mean length."})
    collapse_length_high: float | None = field(default=2.0, metadata={"help": "Most share of the first mean length."})
    collapse_tag_share: float | None = field(default=0.5, metadata={"help": "Least share of the first tag rate."})
    collapse_entropy_share: float | None = field(default=0.05, metadata={"help": "Least share of the first entropy."})
    collapse_repetition: float | None = field(default=0.3, metadata={"help": "Most repeated 4-grams, as a share."})
    collapse_truncation: float | None = field(default=0.9, metadata={"help": "Most completions cut, as a share."})
    max_nonfinite_steps: int = field(default=5, metadata={"help": "Not finite so many steps in a row: give up."})


def refuse_bad_guards(config: ImagineOPDConfig) -> None:
    """Raise `ConfigError` for leak phrases that are no list of texts, or would be found everywhere."""
    phrases = config.leak_phrases
    if phrases is None:
        return
    if not isinstance(phrases, list):
        raise ConfigError(f"leak_phrases={phrases!r}: expected a list of phrases")
    for phrase in phrases:
        if not isinstance(phrase, str) or not any(character.isalnum() for character in phrase):
            raise ConfigError(f"leak_phrases: {phrase!r} is no phrase; expected text with a letter or digit")
