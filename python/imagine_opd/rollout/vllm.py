"""Rollouts by vLLM: its weights brought up to date once a step, its prompts and log-probs compared with ours.

What runs vLLM is behind `VLLMBackend`: in this process (`vllm_colocate`) or over HTTP (`vllm_server`).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch

from imagine_opd.errors import EngineError
from imagine_opd.models import TokenIds, get_device
from imagine_opd.rollout.hf import HFEngine
from imagine_opd.rollout.sampler import SamplingConfig
from imagine_opd.rollout.vllm_inputs import (
    EngineOutput,
    EngineRequest,
    collect_rollouts,
    make_requests,
    make_sampling_params,
    make_seeds,
    refuse_other_layout,
    refuse_other_prompt,
)
from imagine_opd.types import Prompt, Rollouts, ViewConfig

ReadWeights = Callable[[Any], Mapping[str, torch.Tensor]]
"""The model's weights by their names in a checkpoint, adapters merged, as vLLM loads them."""

_COMPARED_PROMPTS = 4
_COMPARED_TOKENS = 32
_MOST_DRIFT = 0.2  # bf16 kernels of two libraries differ by 0.01 to 0.05 nats
_LEAST_MOVE = 0.05  # nats, of the model's own answers; a tenth is more than bf16 makes of the same weights


class _Comparison(NamedTuple):
    prompts: Sequence[Prompt]
    own: Rollouts
    theirs: Rollouts


class VLLMBackend(Protocol):
    """A running vLLM. All raise `EngineError`."""

    def start(self, model: Any) -> None:
        """Begin, or find, an engine for this model; once, before all else."""

    def send_weights(self, model: Any) -> bool:
        """Give it the model's weights; `False` where it keeps its own."""

    def complete(
        self, requests: Sequence[EngineRequest], params: Sequence[dict[str, Any]], salt: str
    ) -> list[EngineOutput]:
        """One completion a request, in order. What is cached under another `salt` is of other weights."""

    def sleep(self) -> None:
        """Give the device's memory back."""

    def wake(self) -> None:
        """Take it again; the weights are then undefined unless it keeps its own."""


class VLLMEngine:
    """A `RolloutEngine` (docs/rollout.md).

    sleeps: between rollouts its memory is free.
    """

    def __init__(
        self, token_ids: TokenIds, view_config: ViewConfig, backend: VLLMBackend, sleeps: bool = False
    ) -> None:
        refuse_other_layout(view_config)
        self.token_ids = token_ids
        self.view_config = view_config
        self.backend = backend
        self.sleeps = sleeps
        self.syncs = 0
        """How often weights were sent."""
        self.follows = False
        """Whether the engine is given the trained weights, or keeps those it was started with."""
        self._local = HFEngine(token_ids)
        self._nonce = secrets.token_hex(4)  # another run on the same server has other weights under the same count
        self._state: tuple[int, int] | None = None
        self._is_started = self._is_asleep = False
        self._is_compared = False
        self._first: _Comparison | None = None  # until training is seen to move the engine too
        self._is_seen_to_move = False
        self._next_sync = 1

    @contextmanager
    def opened(self, model: Any, step: int) -> Iterator[None]:
        """See `RolloutEngine.opened`."""
        with torch.autocast(get_device(model).type, enabled=False):  # it would reach into an engine of this process
            if not self._is_started:
                self.backend.start(model)
                self._is_started = True
            if self._is_asleep:
                self.backend.wake()
                self._is_asleep, self._is_compared, self._state = False, False, None
            state = (step, count_changes(model))
            if state != self._state:
                self.follows = self.backend.send_weights(model)
                self.syncs += self.follows
                self._state = state
        try:
            yield
        finally:
            if self.sleeps:
                self.backend.sleep()
                self._is_asleep = True

    def generate(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seed: int | Sequence[int] | None = None,
    ) -> Rollouts:
        """See `RolloutEngine.generate`; inside `opened`. The first call after a start or a sleep compares
        vLLM's greedy completions with the model's own; so do those after the syncs 2, 4, 8 ... until training is seen
        to move both."""
        assert self._is_started, "generate was called outside of `opened`"
        assert not self._is_asleep, "generate was called outside of `opened`"
        device = get_device(model)
        is_due = not self._is_seen_to_move and self.syncs >= self._next_sync
        if self.follows and (is_due or not self._is_compared):
            self._compare(model, prompts[:_COMPARED_PROMPTS])
            self._is_compared, self._next_sync = True, 2 * self.syncs
        with torch.autocast(device.type, enabled=False):
            # Greedy completions draw nothing, from the caller's random state neither.
            seeds = make_seeds(seed if sampling.temperature > 0.0 else 0, len(prompts))
            outputs = self._complete(prompts, sampling, seeds)
        return collect_rollouts(outputs, self.token_ids, device)

    def _complete(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[EngineOutput]:
        params = [make_sampling_params(sampling, self.token_ids, seed) for seed in seeds]
        requests = make_requests(prompts, self.view_config)
        outputs = self.backend.complete(requests, params, f"{self._nonce}-{self.syncs}")
        for prompt, output in zip(prompts, outputs, strict=True):
            refuse_other_prompt(prompt, output)
            if len(output.logprobs) != len(output.token_ids):
                raise EngineError(
                    f"vLLM gave {len(output.logprobs)} log-probs for {len(output.token_ids)} tokens: it must give that "
                    "of each sampled token"
                )
        return outputs

    def _compare(self, model: Any, prompts: Sequence[Prompt]) -> None:
        """Raise `EngineError` unless greedy completions are the same here and there, to rounding.

        Weights lost in sleep, mapped to other names or left as they were make a student that learns from another's
        completions, with a loss that looks fine. The engine may hold the first weights without having been sent any, so
        the prompts of the first comparison are asked again until the model answers them otherwise: then vLLM must too.
        """
        first = self._first
        if first is not None:
            prompts = first.prompts
        greedy = SamplingConfig(_COMPARED_TOKENS, temperature=0.0)
        own = self._local.generate(model, prompts, greedy)
        with torch.autocast(get_device(model).type, enabled=False):
            theirs = collect_rollouts(
                self._complete(prompts, greedy, [0] * len(prompts)), self.token_ids, own.completion_ids_BT.device
            )
        drift = measure_drift(own, theirs)
        if not drift <= _MOST_DRIFT:
            raise EngineError(
                f"vLLM's greedy completions of {len(prompts)} prompts are {drift:.3f} away from the model's (at most "
                f"{_MOST_DRIFT}): its weights, or what it makes of images, are not the model's. Serve the model that "
                "is trained; on a CPU, where vLLM does not reload a head tied to the embeddings, with "
                "--hf-overrides '{\"tie_word_embeddings\": false}'"
            )
        if self._is_seen_to_move:
            return
        if first is None:
            self._first = _Comparison(prompts, own, theirs)
        elif (moved := measure_drift(first.own, own)) > _LEAST_MOVE:
            if (followed := measure_drift(first.theirs, theirs)) < moved / 10:
                raise EngineError(
                    f"at sync {self.syncs} vLLM's greedy completions of {len(prompts)} prompts are {followed:.2g} away "
                    f"from those of the first, and the model's own {moved:.2g}: it does not take the weights that it "
                    "is sent; start it with vllm >= 0.32, or set vllm_server_sync='none' to sample from those it has"
                )
            self._first, self._is_seen_to_move = None, True


def measure_drift(own: Rollouts, theirs: Rollouts) -> float:
    """How far two engines' greedy completions are apart: the mean over completions of the larger of two numbers.

    One is the mean difference of log-probs (nats) of the tokens up to the first that differs. The other is by how much
    their distributions differ at least at that token, in total variation, where each engine gives its own and likeliest
    token p and p': |p - p'| or p + p' - 1. A tie gives 0; two certain answers, or one and a uniform guess, give 1.
    """
    drifts: list[float] = []
    for row in range(len(own.completion_ids_BT)):
        (own_ids, own_logprobs), (their_ids, their_logprobs) = (_read_row(side, row) for side in (own, theirs))
        same = next((i for i, pair in enumerate(zip(own_ids, their_ids, strict=False)) if pair[0] != pair[1]), None)
        least = 0.0
        if same is not None:
            p, q = math.exp(own_logprobs[same]), math.exp(their_logprobs[same])
            least = max(abs(p - q), p + q - 1.0)
        end = min(len(own_ids), len(their_ids)) if same is None else same
        gaps = [abs(a - b) for a, b in zip(own_logprobs[:end], their_logprobs[:end], strict=True)]
        drifts.append(max(sum(gaps) / max(len(gaps), 1), least))
    return sum(drifts) / len(drifts)


def _read_row(side: Rollouts, row: int) -> tuple[list[int], list[float]]:
    mask_T = side.completion_mask_BT[row]
    return side.completion_ids_BT[row][mask_T].tolist(), side.sampling_logprobs_BT[row][mask_T].tolist()


def count_changes(model: Any) -> int:
    """How often the trained weights were changed in place, as far as torch counts it: not all optimizers let it."""
    return sum(parameter._version for parameter in model.parameters() if parameter.requires_grad)
