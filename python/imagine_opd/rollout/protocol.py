"""What every rollout engine is: opened with the step's weights, then prompts in and completions out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from imagine_opd.models import TokenIds
from imagine_opd.rollout.sampler import SamplingConfig
from imagine_opd.types import Prompt, Rollouts


class RolloutEngine(Protocol):
    """Samples completions of prompts. `HFEngine` uses the model itself, `VLLMEngine` a copy that follows it."""

    @property
    def token_ids(self) -> TokenIds: ...

    def opened(self, model: Any, step: int) -> AbstractContextManager[None]:
        """Awake, with the model's weights of optimizer step `step`; calls of `generate` go inside.

        A copy of the weights is brought up to date once per step. On leaving, an engine that sleeps between rollouts
        goes to sleep. All processes enter and leave together, with whole weights. Raises `EngineError`.
        """
        ...

    def generate(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seed: int | Sequence[int] | None = None,
    ) -> Rollouts:
        """One completion per prompt, by its own seed: one number a completion, or one for all, from which each takes
        its own; `None`: drawn from torch's random state. Log-probs are those of the model at the sampling temperature,
        before penalties, bans, top-k and top-p. Raises `EngineError`."""
        ...
