"""Fields of a step's forwards: how sequences are laid out, how many tokens go at once, and what is done once only."""

from __future__ import annotations

from dataclasses import dataclass, field

CHOICES: dict[str, tuple[str, ...]] = {}
RANGES: dict[str, tuple[float, float | None]] = {}


@dataclass
class ForwardFields:
    """The forwards of rollout, student and teacher (docs/speed.md). None of it changes what is learnt, beyond rounding.

    share_vision_features: the vision tower runs on each image once a forward, and where it is frozen once a step:
    rollout, student and teacher take the same features. A tower that trains is run for the student's own forward.
    share_prefill: the prompt of a row's `num_generations` completions goes through the model once.
    prefetch_views: the next step's images are read and cut by a thread while the device is busy with this one.
    """

    share_vision_features: bool = field(default=True, metadata={"help": "Run the vision tower on an image once."})
    share_prefill: bool = field(default=True, metadata={"help": "Run a row's prompt once for all its completions."})
    prefetch_views: bool = field(default=True, metadata={"help": "Make the next step's views beside this one."})
