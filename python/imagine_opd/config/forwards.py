"""Fields of the scoring forwards: how a micro-batch's sequences are laid out, and how many tokens go at once."""

from __future__ import annotations

from dataclasses import dataclass, field

CHOICES: dict[str, tuple[str, ...]] = {}
RANGES: dict[str, tuple[float, float | None]] = {"max_tokens_per_forward": (1, None)}


@dataclass
class ForwardFields:
    """The forwards of student and teacher over prompts and completions (docs/packing.md).

    padding_free: each side's sequences of a micro-batch are one row without padding (TRL's name).
    max_tokens_per_forward: a micro-batch of which a side has more tokens, padding counted, goes through the model in
        several forwards, the same step to rounding. None: always in one.
    """

    padding_free: bool = field(default=False, metadata={"help": "Pack each side's sequences without padding."})
    max_tokens_per_forward: int | None = field(
        default=None, metadata={"help": "Cut a micro-batch whose longer side has more tokens."}
    )
