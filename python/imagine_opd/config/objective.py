"""Fields of the objective: which divergence, over which tokens, clipped how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagine_opd.errors import ConfigError

if TYPE_CHECKING:
    from imagine_opd.config import ImagineOPDConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "distillation_mode": ("full", "sampled_token"),
    "advantage_baseline": ("none", "expected"),
    "kernel_backend": ("auto", "triton", "reference"),
}
RANGES: dict[str, tuple[float, float | None]] = {
    "epsilon": (0.0, 1.0),
    "epsilon_high": (0.0, None),
    "num_loss_tokens_to_skip": (0, None),
}


@dataclass
class ObjectiveFields:
    """Teacher signal to loss.

    distillation_mode: `full`, the exact reverse KL over the vocabulary; `sampled_token`, the paper's PPO-clipped
        policy gradient on the sampled tokens.
    distillation_alpha: 1.0, reverse KL (0 would be forward KL, 0.5 JSD; neither is built yet).
    epsilon, epsilon_high: clip range of the ratio, 1 - epsilon to 1 + epsilon_high (`sampled_token`).
    dual_clip: bound of the loss for negative advantages, as a ratio; must exceed 1 (`sampled_token`).
    advantage_baseline: `none` (paper), or `expected`: subtract the advantage's exact expectation, -KL, which
        leaves the expected gradient as it is (`sampled_token`).
    num_loss_tokens_to_skip: leave out the first k response tokens.
    mask_truncated_completions: leave out completions cut by `max_completion_length`.
    kernel_backend: `auto`, `triton` or `reference`.
    """

    distillation_mode: str = field(default="full", metadata={"help": "full or sampled_token."})
    distillation_alpha: float = field(default=1.0, metadata={"help": "1: reverse KL."})
    epsilon: float = field(default=0.2, metadata={"help": "Lower clip of the ratio (paper: 0.2)."})
    epsilon_high: float = field(default=0.3, metadata={"help": "Upper clip of the ratio (paper: 0.3)."})
    dual_clip: float = field(default=3.0, metadata={"help": "Dual clip for negative advantages (paper: 3.0)."})
    advantage_baseline: str = field(default="none", metadata={"help": "none or expected."})
    num_loss_tokens_to_skip: int = field(default=0, metadata={"help": "Leave out the first k response tokens."})
    mask_truncated_completions: bool = field(default=False, metadata={"help": "Leave out completions cut short."})
    kernel_backend: str = field(default="auto", metadata={"help": "auto, triton or reference."})


def refuse_bad_objective(config: ImagineOPDConfig) -> None:
    """Raise `ConfigError` for fields of the objective that do not go together."""
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
    if config.num_loss_tokens_to_skip >= config.max_completion_length:
        raise ConfigError(
            f"num_loss_tokens_to_skip={config.num_loss_tokens_to_skip} leaves nothing of "
            f"max_completion_length={config.max_completion_length}"
        )
