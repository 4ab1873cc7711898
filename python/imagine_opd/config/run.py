"""Fields of the run: data, logs, and the defaults of `TrainingArguments` that are the recipe's."""

from __future__ import annotations

from dataclasses import dataclass, field

CHOICES: dict[str, tuple[str, ...]] = {
    "box_format": ("xyxy", "xywh", "xyxy_1000"),
    "bad_rows": ("raise", "skip"),
}
RANGES: dict[str, tuple[float, float | None]] = {
    "check_rows": (0, None),
    "num_completions_to_log": (0, None),
}


@dataclass
class RunFields:
    """Data and run.

    image_root: images of a data file may not lie outside this folder (default: the file's own).
    box_format: default `xyxy`; `xywh`, or `xyxy_1000` (0 to 1000 of each side).
    bad_rows: `raise`, or `skip` (counted and reported).
    check_rows: decode the images of this many rows before the run starts; headers of all are read.
    log_completions, num_completions_to_log: sample completions written to `completions.jsonl`.
    """

    image_root: str | None = field(default=None, metadata={"help": "Images may not lie outside this folder."})
    box_format: str = field(default="xyxy", metadata={"help": "xyxy, xywh or xyxy_1000, unless the row says."})
    bad_rows: str = field(default="raise", metadata={"help": "raise or skip."})
    check_rows: int = field(default=1000, metadata={"help": "Rows whose images are decoded before the run."})
    log_completions: bool = field(default=True, metadata={"help": "Write sample completions."})
    num_completions_to_log: int = field(default=4, metadata={"help": "Completions written at each logging step."})
