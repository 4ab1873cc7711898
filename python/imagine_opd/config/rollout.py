"""Fields of the rollout: how the student samples its completions (names of TRL)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from imagine_opd.errors import ConfigError

if TYPE_CHECKING:
    from imagine_opd.config import ImagineOPDConfig

SHAPING_KWARGS = frozenset(
    {"typical_p", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "min_new_tokens", "suppress_tokens"}
)
"""Keys of `generation_kwargs` that change which tokens are drawn."""
ENGINE_KWARGS = frozenset(
    {"cache_implementation", "cache_config", "prefill_chunk_size", "compile_config", "disable_compile"}
)
"""Keys of `generation_kwargs` that change how they are computed."""

CHOICES: dict[str, tuple[str, ...]] = {"rollout_cache_implementation": ("dynamic", "static")}
RANGES: dict[str, tuple[float, float | None]] = {
    "num_generations": (1, None),
    "generation_batch_size": (1, None),
    "max_completion_length": (1, None),
    "temperature": (1e-6, None),
    "top_p": (1e-6, 1.0),
    "top_k": (0, None),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, None),
}


@dataclass
class RolloutFields:
    """Sampling.

    num_generations, max_completion_length (tokens), temperature (sampling and loss alike), top_p, top_k, min_p,
    repetition_penalty; generation_kwargs: `typical_p`, `epsilon_cutoff`, `eta_cutoff`, `no_repeat_ngram_size`,
    `min_new_tokens`, `suppress_tokens`, and how `generate` caches and compiles; generation_batch_size: completions
    sampled in one call (`None`: all of a step).
    rollout_cache_implementation: `dynamic`, keys and values grow with the completion; `static`, room for the longest is
    taken at once, which a compiled forward needs. rollout_compile: with `static` on CUDA, `generate` compiles the
    model's forward (its first call takes minutes).
    """

    num_generations: int = field(default=1, metadata={"help": "Completions per row (paper: 1)."})
    generation_batch_size: int | None = field(default=None, metadata={"help": "Completions sampled in one call."})
    max_completion_length: int = field(default=256, metadata={"help": "Most new tokens per completion (paper: 256)."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling and of both sides of the loss."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling."})
    top_k: int = field(default=0, metadata={"help": "Top-k sampling; 0: off."})
    min_p: float | None = field(default=None, metadata={"help": "Minimum probability relative to the top token."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "1: off."})
    generation_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "More GenerationConfig fields."})
    rollout_cache_implementation: str = field(default="dynamic", metadata={"help": "dynamic or static."})
    rollout_compile: bool = field(default=False, metadata={"help": "Compile the forward (static cache, CUDA)."})


def refuse_bad_rollout(config: ImagineOPDConfig) -> None:
    """Raise `ConfigError` for fields of the rollout that do not go together."""
    for name in config.generation_kwargs or {}:
        if name not in SHAPING_KWARGS | ENGINE_KWARGS:
            known = ", ".join(sorted(SHAPING_KWARGS | ENGINE_KWARGS))
            raise ConfigError(
                f"generation_kwargs: {name!r} is unknown, has a field of its own, or does not go with sampling of one "
                f"token at a time; expected {known}"
            )
    if config.rollout_compile and config.rollout_cache_implementation != "static":
        raise ConfigError("rollout_compile=True needs a cache of one size: set rollout_cache_implementation='static'")
    doubled = {"cache_implementation", "disable_compile"} & set(config.generation_kwargs or {})
    if doubled and config.rollout_cache_implementation != "dynamic":
        raise ConfigError(
            f"generation_kwargs: {min(doubled)!r} beside rollout_cache_implementation="
            f"{config.rollout_cache_implementation!r} says it twice; leave one out"
        )
