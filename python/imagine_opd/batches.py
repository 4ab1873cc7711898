"""Rows to micro-batches: views, prompts, rollouts and token weights of one optimizer step.

A completion's seed depends on (seed, step, place of its row in the step) alone, where the place counts over all
processes: one process with a batch of 4 and two with 2 sample the same completions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from imagine_opd.config import ImagineOPDConfig
from imagine_opd.errors import RowError
from imagine_opd.evaluation import decode_completions
from imagine_opd.leaks import LeakMeter
from imagine_opd.loss import make_token_weights
from imagine_opd.memory_advice import explain_pass, explained_memory, read_memory_gib, read_pass
from imagine_opd.metrics import StepMetrics
from imagine_opd.parallel import gather_parameters, sum_over_ranks
from imagine_opd.privilege import ViewFunction, build_pairs
from imagine_opd.rewards import RewardFunction, compute_rewards, normalise_rewards
from imagine_opd.rollout import HFEngine, RolloutEngine
from imagine_opd.rollout.finish import join_rollouts
from imagine_opd.rollout.sampler import mix_seed
from imagine_opd.settings import make_privilege_config, make_sampling_config
from imagine_opd.types import PromptPair, Rollouts, Row, ViewConfig, ViewError

# B completions, T completion tokens, N kept response tokens, D hidden

MadeAhead = tuple[list[PromptPair | ViewError], float]
"""Prompts made in a thread, and the seconds it took."""

_MOST_EMPTY_STEPS = 10
_SPARE_SEARCH = 64


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward and backward needs: prompts, their completions, and each token's weight in the loss (0: out).

    `rows[i]` is the row of completion i.
    """

    rows: tuple[Row, ...]
    prompts: tuple[PromptPair, ...]
    rollouts: Rollouts
    weights_BT: torch.Tensor
    is_used: bool = True
    """False: a spare row stands in, so that this process goes through the same forwards as the others."""
    teacher_hidden_ND: torch.Tensor | None = None
    """Where the teacher was run before the step's first backward (`step_advantages`), as the two below."""
    neutral_hidden_ND: torch.Tensor | None = None
    advantages_N: torch.Tensor | None = None
    distill_B: torch.Tensor | None = None
    """Where there are rewards: factor of the teacher's loss, and the rewards' advantage below."""
    reward_advantages_B: torch.Tensor | None = None
    leaked_BT: torch.Tensor | None = None
    """Tokens with an unlikelihood loss of their own."""
    parts: tuple[tuple[int, ...], ...] = ()
    """Completions of each forward, where `micro_batches` cuts it; an empty one: a spare forward."""


class BatchBuilder:
    """Builds the micro-batches of a step. What cannot be used is left out, counted and said once."""

    def __init__(
        self,
        processor: Any,
        engine: RolloutEngine,
        view_config: ViewConfig,
        args: ImagineOPDConfig,
        accelerator: Accelerator,
        metrics: StepMetrics,
        say: Callable[[str], None],
        spare_rows: Iterable[Row],
        student_view: ViewFunction | None = None,
        teacher_view: ViewFunction | None = None,
        reward_functions: Sequence[RewardFunction] = (),
        weights_advice: Sequence[str] = (),
    ) -> None:
        self.processor, self.engine, self.view_config, self.args = processor, engine, view_config, args
        self.local_engine = HFEngine(engine.token_ids)  # the teacher's own words, and all checks, are the model's
        self.accelerator, self.metrics, self.say = accelerator, metrics, say
        self.privilege_config = make_privilege_config(args)
        self.student_view, self.teacher_view = student_view, teacher_view
        self.reward_functions = tuple(reward_functions)
        self.weights_advice = tuple(weights_advice)
        self.sampling = make_sampling_config(args)
        self.leak_meter = LeakMeter(processor.tokenizer, metrics, args.leak_ngram, args.leak_phrases)
        self.spare_rows = spare_rows
        self._own_processor = copy.deepcopy(processor)  # a tokenizer serves one thread at a time
        self._spare: tuple[Row, PromptPair] | None = None
        self._empty_steps = 0

    def build(
        self, model: Any, batches: Sequence[Sequence[Row]], step: int, made: Future[MadeAhead] | None = None
    ) -> tuple[list[MicroBatch], Rollouts, torch.Tensor]:
        """The micro-batches, all their rollouts, and the sum of token weights over all processes.

        A micro-batch none of whose rows can be used holds a spare row of weight 0: every process goes through the
        same forwards, whatever its rows. `made`: what `build_ahead` makes of the rows, in a thread.
        """
        rows = [row for batch in batches for row in batch]
        places = self._find_places([len(batch) for batch in batches])
        pairs = self.build_pairs(rows) if made is None else self.take_pairs(rows, made)
        kept = [index for index, pair in enumerate(pairs) if pair is not None]
        copies = self.args.num_generations
        prompts = [pair.student for pair in pairs if pair is not None for _ in range(copies)]
        seeds = [mix_seed(self.args.seed, step, places[index], copy) for index in kept for copy in range(copies)]
        self._refuse_empty_steps(len(prompts))
        rollouts = self.sample(model, prompts, seeds, step)
        leaked_BT = self.leak_meter.mark([pair for pair in pairs if pair for _ in range(copies)], rollouts)
        masked_BT = leaked_BT if self.args.leak_action == "mask" else None
        weights_BT = make_token_weights(rollouts, self.engine.token_ids, self.args, masked_BT)
        distill_B, advantages_B = self._reward([rows[index] for index in kept for _ in range(copies)], rollouts)
        unlikely_BT = leaked_BT if self.args.leak_action == "unlikelihood" else None
        micro_batches, start, begin = [], 0, 0
        for batch in batches:
            used = [index for index in range(start, start + len(batch)) if pairs[index] is not None]
            part = slice(begin, begin + len(used) * copies)
            found = [(rows[index], pair) for index in used if (pair := pairs[index]) is not None]
            if found:
                doubled = [item for item in found for _ in range(copies)]
                micro_batches.append(
                    MicroBatch(
                        rows=tuple(row for row, _ in doubled),
                        prompts=tuple(pair for _, pair in doubled),
                        rollouts=rollouts.select(part),
                        weights_BT=weights_BT[part],
                        distill_B=None if distill_B is None else distill_B[part],
                        reward_advantages_B=None if advantages_B is None else advantages_B[part],
                        leaked_BT=None if unlikely_BT is None else unlikely_BT[part],
                    )
                )
                self._spare = self._spare or found[0]
            else:
                micro_batches.append(self._make_spare_batch())
            start, begin = start + len(batch), part.stop
        total = torch.tensor(sum_over_ranks({"weights": float(weights_BT.sum())})["weights"])
        return micro_batches, rollouts, total

    def build_pairs(self, rows: Sequence[Row]) -> list[PromptPair | None]:
        """Both prompts of each row; `None` where views or text failed, counted and said once a row."""
        with self.metrics.stage("views"):
            found = self._build_pairs(rows)
        return self._count_failed(found)

    def take_pairs(self, rows: Sequence[Row], made: Future[MadeAhead]) -> list[PromptPair | None]:
        """The same of rows whose prompts a thread makes: waits until it has."""
        with self.metrics.stage("views"):
            found, seconds = made.result()
        self.metrics.add_seconds("views_background", seconds)
        return self._count_failed(found[: len(rows)])  # a last micro-batch may have been cut since

    def _count_failed(self, found: Sequence[PromptPair | ViewError]) -> list[PromptPair | None]:
        pairs: list[PromptPair | None] = []
        for pair in found:
            if isinstance(pair, ViewError):
                self.metrics.add_total(f"rows_dropped/{pair.reason}")
                self.say(f"{pair.message} (left out)")
                pairs.append(None)
            else:
                pairs.append(pair)
        return pairs

    def build_ahead(self, rows: Sequence[Row]) -> list[PromptPair | ViewError]:
        """The prompts of rows that are not due yet; for one thread beside the main one."""
        return self._build_pairs(rows, self._own_processor)

    def _build_pairs(self, rows: Sequence[Row], processor: Any = None) -> list[PromptPair | ViewError]:
        return build_pairs(
            rows,
            processor or self.processor,
            self.view_config,
            self.privilege_config,
            self.student_view,
            self.teacher_view,
        )

    def sample(self, model: Any, prompts: Sequence[Any], seeds: Sequence[int], step: int) -> Rollouts:
        """The completions of the prompts, `generation_batch_size` at a time; sharded weights are gathered once."""
        size = self.args.generation_batch_size or max(len(prompts), 1)
        calls = [slice(start, start + size) for start in range(0, len(prompts), size)]

        def explain(error: BaseException) -> str:
            facts = read_pass("the rollout", prompts, self.args.max_completion_length, size)
            memory_gib = read_memory_gib(self.accelerator.device)
            field = "generation_batch_size"
            return explain_pass(error, facts, field, memory_gib=memory_gib, plan_advice=self.weights_advice)

        with (
            explained_memory(explain),
            self.metrics.stage("rollout"),
            self.accelerator.autocast(),
            gather_parameters(model) as gathered,
            self.engine.opened(gathered, step),
        ):
            parts = [self.engine.generate(gathered, prompts[call], self.sampling, seeds[call]) for call in calls]
        # On the host: what is picked and counted of them from here on then never waits for the device.
        return join_rollouts(parts, self.engine.token_ids.pad, torch.device("cpu"))

    def _reward(self, rows: Sequence[Row], rollouts: Rollouts) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """`distill_B` and `reward_advantages_B` of all completions; nothing without reward functions."""
        if not self.reward_functions:
            return None, None
        with self.metrics.stage("reward"):
            texts = decode_completions(self.processor, rollouts.completion_ids_BT, rollouts.completion_mask_BT)
            rewards_B = compute_rewards(self.reward_functions, rows, texts)
        rewards_B[~rollouts.completion_mask_BT.any(dim=1)] = torch.nan  # dropped: no part of its group
        known_B = rewards_B[~rewards_B.isnan()]
        self.metrics.add_mean("reward", float(known_B.sum()), len(known_B))
        advantages_B = normalise_rewards(rewards_B, self.args.num_generations, self.args.scale_rewards)
        won_B = rewards_B >= self.args.success_reward  # false for NaN
        distill_B = torch.where(won_B & self.args.distill_failures_only, 0.0, 1.0)
        if self.args.distill_failures_only:
            self.metrics.add_mean("reward/failures", float((known_B < self.args.success_reward).sum()), len(known_B))
        return distill_B, advantages_B

    def _find_places(self, sizes: Sequence[int]) -> list[int]:
        """Each row's place in the step over all processes: micro-batch by micro-batch, then rank by rank."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = self.args.train_batch_size
        return [(m * ranks + rank) * size + j for m, count in enumerate(sizes) for j in range(count)]

    def _refuse_empty_steps(self, prompts: int) -> None:
        found = sum_over_ranks({"prompts": float(prompts)})["prompts"]
        self._empty_steps = 0 if found else self._empty_steps + 1
        if self._empty_steps >= _MOST_EMPTY_STEPS:
            raise RowError(f"no row of the last {_MOST_EMPTY_STEPS} steps could be used; see the messages above")

    def _make_spare_batch(self) -> MicroBatch:
        row, pair = self._find_spare()
        end = torch.tensor([[self.engine.token_ids.eos[0]]])
        nothing = torch.zeros(1, 1)
        return MicroBatch(
            (row,), (pair,), Rollouts(end, torch.ones_like(end, dtype=torch.bool), nothing), nothing, is_used=False
        )

    def _find_spare(self) -> tuple[Row, PromptPair]:
        if self._spare is None:
            for count, row in enumerate(self.spare_rows):
                pair = self._build_pairs([row])[0]
                if not isinstance(pair, ViewError):
                    self._spare = row, pair
                    break
                if count + 1 >= _SPARE_SEARCH:
                    break
        if self._spare is None:
            raise RowError("none of the first rows can be used, nor any of this step; see the messages above")
        return self._spare
