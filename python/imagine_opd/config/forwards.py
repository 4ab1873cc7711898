"""Fields of a step's forwards: how sequences are laid out, how many tokens go at once, and what is done once only."""

from __future__ import annotations

from dataclasses import dataclass, field

CHOICES: dict[str, tuple[str, ...]] = {}
RANGES: dict[str, tuple[float, float | None]] = {"max_tokens_per_forward": (1, None)}


@dataclass
class ForwardFields:
    """The forwards of rollout, student and teacher (docs/speed.md). None of it changes what is learnt, beyond rounding.

    padding_free: each side's sequences of a micro-batch are one row without padding (TRL's name; docs/packing.md).
    max_tokens_per_forward: a micro-batch of which a side has more tokens, padding counted, goes through the model in
        several forwards. None: always in one.
    share_vision_features: the vision tower runs on each image once a forward, and where it is frozen once a step:
    rollout, student and teacher take the same features. A tower that trains is run for the student's own forward.
    share_prefill: the prompt of a row's `num_generations` completions goes through the model once.
    prefetch_views: the next step's images are read and cut by a thread while the device is busy with this one.
    """

    padding_free: bool = field(default=False, metadata={"help": "Pack each side's sequences without padding."})
    max_tokens_per_forward: int | None = field(
        default=None, metadata={"help": "Cut a micro-batch whose longer side has more tokens."}
    )
    share_vision_features: bool = field(default=True, metadata={"help": "Run the vision tower on an image once."})
    share_prefill: bool = field(default=True, metadata={"help": "Run a row's prompt once for all its completions."})
    prefetch_views: bool = field(default=True, metadata={"help": "Make the next step's views beside this one."})
