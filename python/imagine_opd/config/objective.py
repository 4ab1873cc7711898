"""Fields of the objective: which divergence, over which tokens, bounded and weighted how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagine_opd.config.rollout import SHAPING_KWARGS
from imagine_opd.errors import ConfigError

if TYPE_CHECKING:
    from imagine_opd.config import ImagineOPDConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "distillation_mode": ("full", "sampled_token", "topk_tail"),
    "loss_aggregation": ("token_mean", "sequence_mean"),
    "advantage_baseline": ("none", "expected", "position"),
    "kernel_backend": ("auto", "triton", "reference"),
}
RANGES: dict[str, tuple[float, float | None]] = {
    "distillation_alpha": (0.0, 1.0),
    "distillation_topk": (1, None),
    "distillation_kl_clip": (1e-6, None),
    "distillation_is_clip": (1e-6, None),
    "loss_max_clamp": (1e-6, None),
    "epsilon": (0.0, 1.0),
    "epsilon_high": (0.0, None),
    "log_ratio_clamp": (1e-6, None),
    "num_loss_tokens_to_skip": (0, None),
    "truncated_weight": (0.0, 1.0),
    "early_weight_half_life": (1.0, None),
    "contrast_beta": (0.0, 100.0),
    "reward_weight": (0.0, None),
}

_MODE_ALIASES = {"full_logits": "full"}
_REFUSED_MODES = {
    "topk_logits": "plain truncation is no divergence: the student lowers it by leaving the set, and the sum can be "
    "negative; use 'topk_tail', which adds one cell for all other tokens, or 'full'",
    "k1": "log p_S(y) - log p_T(y) as a loss has the gradient of log p_S(y) alone, which does not depend on the "
    "teacher; use 'sampled_token', which takes it as an advantage, or 'full'",
}
_ALPHA_MARGIN = 0.01

FOREIGN: dict[str, str] = {
    "beta": "TRL's and ms-swift's beta is distillation_alpha, but their JSD tends to 0 at both ends, and ours is "
    "divided by alpha (1 - alpha); set distillation_alpha, and know that at 0.5 the loss is 4 times theirs",
    "jsd_token_clip": "OPSD's clip is distillation_kl_clip, of entries that between the ends are divided by "
    "alpha (1 - alpha): 0.05 there is 0.2 here at distillation_alpha=0.5, and 0.05 at 0",
    "distillation_add_tail": "distillation_mode='topk_tail' always has the tail; without it use 'full'",
    "loss_mode": "verl's estimators are distillation_mode: k1 as an advantage is 'sampled_token'; k1 as a loss has a "
    "gradient that does not depend on the teacher, and is not offered",
}
"""Fields of other trainers that mean nearly the same, and what to write instead."""


@dataclass
class ObjectiveFields:
    """Teacher signal to loss (docs/objectives.md has the formulas). `None` turns a bound off.

    distillation_mode: `full`, a divergence over the whole vocabulary; `sampled_token`, the paper's PPO-clipped
        policy gradient on the sampled tokens; `topk_tail`, `full` over the student's `distillation_topk` likeliest
        tokens and one cell for all others. TRL's `full_logits` is `full`.
    distillation_alpha: 1 reverse KL(student || teacher), 0 forward KL(teacher || student), 0.5 JSD; between the ends
        the JSD is divided by alpha (1 - alpha), which leaves no jump (`full`, `topk_tail`).
    distillation_kl_clip: most that one vocabulary entry adds to a token's divergence, nats (OPSD: 0.05 at alpha 0;
        `full`, `topk_tail`; runs in PyTorch, not in the kernels).
    distillation_is_clip: each token's loss times min(p_S(y)/p_old(y), this), for rollouts from other weights or
        another engine than the student's (TRL: 2.0; `full`, `topk_tail`).
    loss_max_clamp: most that a token's divergence counts, nats; above it the token gives no gradient (verl: 10;
        `full`, `topk_tail`).
    epsilon, epsilon_high: clip range of the ratio, 1 - epsilon to 1 + epsilon_high (`sampled_token`).
    dual_clip: bound of the loss for negative advantages, as a ratio; must exceed 1 (`sampled_token`).
    log_ratio_clamp: bound of |log p_T(y) - log p_old(y)|, the advantage, and of the ratio's logarithm, nats (GNDPO:
        5, ViCuR: 10; `sampled_token`).
    log_prob_min_clamp: lowest log p_T(y) and log p_old(y) in the advantage, nats (verl: -10; `sampled_token`).
    advantage_baseline: `none` (paper); `expected`, the advantage's exact expectation, -KL; `position`, the mean
        advantage of the step's other tokens at the same position (`sampled_token`).
    whiten_advantages: advantages of mean 0 and deviation 1 over all tokens of the step (GNDPO; `sampled_token`).
    loss_aggregation: `token_mean`, each token counts alike; `sequence_mean`, each completion does.
    num_loss_tokens_to_skip: leave out the first k response tokens.
    mask_special_tokens: leave out the tokens that the tokenizer calls special, the end token among them.
    mask_truncated_completions: leave out completions cut by `max_completion_length`.
    truncated_weight: what such completions count, 0 to 1.
    early_weight_half_life: a token's weight halves every so many tokens of its completion.
    contrast_beta: with `contrast`, the target is q ~ p+ (p+ / p0)^beta, p0 the teacher without evidence (OPD-Aha: 4).
    contrast_token_weight: with `contrast`, tokens weigh by max(log p+(y) - log p0(y), 0), mean 1 over a completion.
    reward_weight: of the policy-gradient loss on rewards (`train(..., reward_funcs=...)`), beside the teacher's;
        scale_rewards: divide a row's by their deviation. distill_failures_only: the teacher corrects only completions
        whose reward is below success_reward.
    kernel_backend: `auto`, `triton` or `reference`.
    """

    distillation_mode: str = field(default="full", metadata={"help": "full, sampled_token or topk_tail."})
    distillation_alpha: float = field(default=1.0, metadata={"help": "1: reverse KL, 0.5: JSD, 0: forward KL."})
    distillation_topk: int = field(default=100, metadata={"help": "Tokens of topk_tail, beside the tail."})
    distillation_kl_clip: float | None = field(default=None, metadata={"help": "Most that an entry adds, nats."})
    distillation_is_clip: float | None = field(default=None, metadata={"help": "Clip of the importance ratio."})
    loss_max_clamp: float | None = field(
        default=None, metadata={"help": "Most that a token's divergence counts, nats."}
    )
    epsilon: float = field(default=0.2, metadata={"help": "Lower clip of the ratio (paper: 0.2)."})
    epsilon_high: float = field(default=0.3, metadata={"help": "Upper clip of the ratio (paper: 0.3)."})
    dual_clip: float = field(default=3.0, metadata={"help": "Dual clip for negative advantages (paper: 3.0)."})
    log_ratio_clamp: float | None = field(default=None, metadata={"help": "Bound of the advantage, nats."})
    log_prob_min_clamp: float | None = field(default=None, metadata={"help": "Lowest log-prob in it, nats."})
    advantage_baseline: str = field(default="none", metadata={"help": "none, expected or position."})
    whiten_advantages: bool = field(default=False, metadata={"help": "Mean 0, deviation 1 over the step."})
    loss_aggregation: str = field(default="token_mean", metadata={"help": "token_mean or sequence_mean."})
    num_loss_tokens_to_skip: int = field(default=0, metadata={"help": "Leave out the first k response tokens."})
    mask_special_tokens: bool = field(default=False, metadata={"help": "Leave out special tokens."})
    mask_truncated_completions: bool = field(default=False, metadata={"help": "Leave out completions cut short."})
    truncated_weight: float = field(default=1.0, metadata={"help": "What completions cut short count."})
    early_weight_half_life: float | None = field(default=None, metadata={"help": "Weight halves every so many tokens."})
    contrast_beta: float = field(default=1.0, metadata={"help": "Tilt of the target, with contrast."})
    contrast_token_weight: bool = field(default=False, metadata={"help": "Weigh tokens by the evidence's gain."})
    reward_weight: float = field(default=1.0, metadata={"help": "Of the loss on rewards, where there are any."})
    scale_rewards: bool = field(default=True, metadata={"help": "Divide a row's rewards by their deviation."})
    distill_failures_only: bool = field(default=False, metadata={"help": "No teacher where the reward is won."})
    success_reward: float = field(default=1.0, metadata={"help": "A reward that is won."})
    kernel_backend: str = field(default="auto", metadata={"help": "auto, triton or reference."})


def read_aliases(config: ImagineOPDConfig) -> None:
    """Put our name of a mode where another trainer's stands. Raises `ConfigError` for one that is wrong, with why."""
    mode = config.distillation_mode
    if isinstance(mode, str):
        if mode in _REFUSED_MODES:
            raise ConfigError(f"distillation_mode={mode!r}: {_REFUSED_MODES[mode]}")
        config.distillation_mode = _MODE_ALIASES.get(mode, mode)


def refuse_bad_objective(config: ImagineOPDConfig) -> None:
    """Raise `ConfigError` for fields of the objective that do not go together."""
    if config.dual_clip <= 1.0:
        raise ConfigError(f"dual_clip={config.dual_clip!r}: expected more than 1")
    alpha = config.distillation_alpha
    if 0.0 < min(alpha, 1.0 - alpha) < _ALPHA_MARGIN:
        raise ConfigError(
            f"distillation_alpha={alpha!r}: so near its end the JSD is lost in rounding; expected 0, 1, or "
            f"{_ALPHA_MARGIN} to {1.0 - _ALPHA_MARGIN}"
        )
    if config.distillation_mode == "sampled_token":
        _refuse_beside_sampled_token(config)
    else:
        _refuse_beside_divergence(config)
    if config.kernel_backend == "triton":
        for name, is_set in (
            ("distillation_mode='topk_tail'", config.distillation_mode == "topk_tail"),
            ("distillation_kl_clip", config.distillation_kl_clip is not None),
        ):
            if is_set:
                raise ConfigError(
                    f"kernel_backend='triton': {name} is not in the kernels and runs in PyTorch; use 'auto'"
                )
    if config.num_loss_tokens_to_skip >= config.max_completion_length:
        raise ConfigError(
            f"num_loss_tokens_to_skip={config.num_loss_tokens_to_skip} leaves nothing of "
            f"max_completion_length={config.max_completion_length}"
        )
    if config.mask_truncated_completions and config.truncated_weight != 1.0:
        raise ConfigError(
            f"truncated_weight={config.truncated_weight!r} with mask_truncated_completions=True, which is weight 0: "
            "set one of them"
        )
    _refuse_idle_contrast(config)


def _refuse_beside_sampled_token(config: ImagineOPDConfig) -> None:
    reasons = {
        "distillation_alpha": (1.0, "the estimator is one of the reverse KL, alpha 1"),
        "distillation_kl_clip": (None, "only one vocabulary entry is seen, and log_ratio_clamp bounds it"),
        "distillation_is_clip": (None, "its ratio is clipped by epsilon already"),
        "loss_max_clamp": (None, "it would silence the tokens with the strongest signal; use log_ratio_clamp"),
    }
    for name, (off, reason) in reasons.items():
        if getattr(config, name) != off:
            raise ConfigError(f"{name}={getattr(config, name)!r} with distillation_mode='sampled_token': {reason}")
    if config.log_prob_min_clamp is not None and config.log_prob_min_clamp >= 0.0:
        raise ConfigError(f"log_prob_min_clamp={config.log_prob_min_clamp!r}: expected less than 0")
    if config.whiten_advantages and config.advantage_baseline == "expected":
        raise ConfigError("whiten_advantages takes the mean out already: advantage_baseline='expected' goes without it")


def _refuse_beside_divergence(config: ImagineOPDConfig) -> None:
    mode = config.distillation_mode
    off = {
        "advantage_baseline": "none",
        "whiten_advantages": False,
        "log_ratio_clamp": None,
        "log_prob_min_clamp": None,
    }
    for name, value in off.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} goes with distillation_mode='sampled_token', not {mode!r}: a "
                "divergence over the vocabulary has no advantages"
            )
    if config.top_p < 1.0 or config.top_k > 0 or config.min_p:
        raise ConfigError(
            f"top_p, top_k and min_p change where the student is trained: distillation_mode={mode!r} needs "
            "top_p=1.0, top_k=0 and min_p=None"
        )
    if config.repetition_penalty != 1.0:
        raise ConfigError(
            f"repetition_penalty changes where the student is trained: distillation_mode={mode!r} needs 1.0"
        )
    for name in config.generation_kwargs or {}:
        if name in SHAPING_KWARGS:
            raise ConfigError(
                f"generation_kwargs: {name!r} changes where the student is trained: distillation_mode={mode!r} needs "
                "it left out"
            )


def _refuse_idle_contrast(config: ImagineOPDConfig) -> None:
    has_contrast = getattr(config, "contrast", "none") != "none"
    if config.contrast_token_weight and not has_contrast:
        raise ConfigError("contrast_token_weight=True needs the teacher's pass without evidence: set contrast")
    if has_contrast and config.contrast_beta == 0.0 and not config.contrast_token_weight:
        raise ConfigError(
            "contrast_beta=0.0: the pass without evidence would be made for nothing; set contrast_beta, "
            "contrast_token_weight, or contrast='none'"
        )
