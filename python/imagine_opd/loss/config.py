"""What the objective reads of a run's config: a frozen copy under the same names, that needs no Trainer to be built."""

from __future__ import annotations

from dataclasses import dataclass

from imagine_opd.kernels import BackendName


@dataclass(frozen=True, slots=True)
class ObjectiveConfig:
    """The fields of `ImagineOPDConfig` that the objective reads, under the same names and with the same defaults."""

    distillation_mode: str = "full"
    distillation_alpha: float = 1.0
    distillation_topk: int = 100
    distillation_kl_clip: float | None = None
    distillation_is_clip: float | None = None
    loss_max_clamp: float | None = None
    temperature: float = 1.0
    epsilon: float = 0.2
    epsilon_high: float = 0.3
    dual_clip: float = 3.0
    log_ratio_clamp: float | None = None
    log_prob_min_clamp: float | None = None
    advantage_baseline: str = "none"
    whiten_advantages: bool = False
    contrast_beta: float = 1.0
    contrast_token_weight: bool = False
    reward_weight: float = 1.0
    leak_unlikelihood_weight: float = 0.1
    kernel_backend: BackendName = "auto"

    @property
    def shapes_advantages(self) -> bool:
        """Whether advantages depend on all tokens of the step, so that `Scores.advantages_N` must be given."""
        return self.whiten_advantages or self.advantage_baseline == "position"

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """Where the importance ratio of a sampled token is clipped: below and above."""
        if self.distillation_mode == "sampled_token":
            return 1.0 - self.epsilon, 1.0 + self.epsilon_high
        return 0.0, float("inf") if self.distillation_is_clip is None else self.distillation_is_clip
