"""What is known of one row of a run: the values that `explain` gathers and `report` shows."""

from __future__ import annotations

from dataclasses import dataclass

from imagine_opd.pictures import Picture, Pixels
from imagine_opd.types import Box

Position = tuple[int, int, int]
"""Time, height and width of a token, where a model's positions have three parts."""


@dataclass(frozen=True, slots=True)
class Original:
    """An original image, shrunk to be shown, and where the evidence lies on it, in pixels of its true size."""

    pixels_HWC: Pixels
    width_px: int
    height_px: int
    boxes: tuple[Box, ...]
    crops: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class ShownImage:
    """One image of a side, numbered from 1: what the model is given of it, from what size, for how many tokens."""

    number: int
    source_width_px: int
    source_height_px: int
    tokens: int
    pictures: tuple[Picture, ...]

    def describe_size(self) -> str:
        """`336x336 px`, or of a tiled image `5 frames of 448x448 px`."""
        height, width, _ = self.pictures[0].pixels_HWC.shape
        frames = sum(picture.frames for picture in self.pictures)
        return f"{width}x{height} px" if frames == 1 else f"{frames} frames of {width}x{height} px"


@dataclass(frozen=True, slots=True)
class SideFacts:
    """What one side is given. text: the rendered prompt, each image placeholder replaced by what stands there;
    response_start: index of the response's first token in this side's sequence; response_position: its (t, h, w) as
    the model's own forward computed them, `None` for models with plain positions."""

    text: str
    images: tuple[ShownImage, ...]
    text_tokens: int
    image_tokens: int
    response_start: int
    response_position: Position | None

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return self.text_tokens + self.image_tokens


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """One token of the rollout, in nats: KL(student || teacher), both log-probs, the student's entropy; weight: what
    it counts in the loss, 0 for none."""

    text: str
    token_id: int
    reverse_kl: float
    student_logprob: float
    teacher_logprob: float
    entropy: float
    weight: float


@dataclass(frozen=True, slots=True)
class RunSize:
    """How long the run is. *_tokens: mean prompt of `sampled_rows` rows spread over the data; completion_tokens: the
    cap of a completion; total_tokens: both sides of all completions, prompts included, at that cap."""

    rows: int
    rows_per_step: int
    steps: int
    sampled_rows: int
    student_tokens: float
    teacher_tokens: float
    completion_tokens: int
    total_tokens: float


@dataclass(frozen=True, slots=True)
class Setting:
    """A config field that is not at its default."""

    name: str
    value: str
    default: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that is shown of a row and its run. neutral: the teacher's view without its evidence, of a contrast;
    dropped: why the rollout would not train, or empty; teacher_checks:
    the start-up figures, nats per token; teacher_fault: the sentence with which they failed, or empty."""

    row_index: int
    source: str
    id: str
    question: str
    options: tuple[str, ...]
    boxes: tuple[Box, ...]
    answer: str | None
    originals: tuple[Original, ...]
    student: SideFacts
    teacher: SideFacts
    neutral: SideFacts | None
    teacher_kind: str
    privilege: tuple[str, ...]
    tokens: tuple[TokenFacts, ...]
    dropped: str
    teacher_checks: tuple[tuple[str, float], ...]
    teacher_fault: str
    memory: tuple[str, ...]
    settings: tuple[Setting, ...]
    size: RunSize
