"""Accuracy per mode on held-out rows: what the student sees, or what the teacher sees, answered greedily."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from imagine_opd.answers import judge_row
from imagine_opd.config import ImagineOPDConfig
from imagine_opd.errors import ConfigError, RowError
from imagine_opd.memory_advice import explain_pass, explained_memory, read_memory_gib, read_pass
from imagine_opd.models import read_token_ids
from imagine_opd.parallel import gather_figures, get_place
from imagine_opd.privilege import build_pairs
from imagine_opd.prompts import build_prompt
from imagine_opd.rollout import HFEngine, SamplingConfig
from imagine_opd.settings import make_privilege_config
from imagine_opd.types import Prompt, Row, ViewConfig, ViewError
from imagine_opd.views import make_views

MODES = ("direct", "imagine", "zoom", "teacher")
_Z95 = 1.959963984540054

_Answered = tuple[int, str, bool | None]
"""Place of the row, its completion, and whether that is right."""


@dataclass(frozen=True, slots=True)
class ModeResult:
    """One mode's figures. accuracy with its 95 % Wilson interval (low, high), all of `rows` counted;
    unparsed: completions without an answer, counted as wrong; mean_tokens per completion."""

    accuracy: float
    low: float
    high: float
    rows: int
    unparsed: int
    mean_tokens: float
    seconds: float
    completions: tuple[str, ...]
    correct: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class EvalResult:
    """`modes[name]` for each mode asked for; `left_out` rows had no readable view or no answer."""

    modes: dict[str, ModeResult]
    left_out: int = 0

    def __getitem__(self, mode: str) -> ModeResult:
        return self.modes[mode]

    def list_figures(self, mode: str) -> dict[str, float]:
        """A mode's figures by the names they have in a log."""
        found = self.modes[mode]
        return {
            "accuracy": found.accuracy,
            "rows": float(found.rows),
            "left_out": float(self.left_out),
            "unparsed": float(found.unparsed),
            "mean_tokens": found.mean_tokens,
            "runtime": found.seconds,
        }


def evaluate_model(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    view_config: ViewConfig,
    config: ImagineOPDConfig,
    modes: Sequence[str] = ("imagine",),
    batch_size: int = 64,
    shared: bool = False,
) -> EvalResult:
    """Answer every row greedily in each mode and compare with its `answer` (a letter where it has options).

    shared: all processes call this; each answers its part of the rows, and all get the whole result.

    Modes: `direct` (global image, answer at once), `imagine` (global image, the trained instruction), `zoom` (global
    image and crops, the student's instruction), `teacher` (what the config shows and tells the teacher).
    """
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ConfigError(f"unknown evaluation mode {unknown[0]!r}; expected {', '.join(MODES)}")
    usable = [row for row in rows if row.answer is not None]
    if not usable:
        raise RowError(f"none of the {len(rows)} rows has an answer to compare with")
    engine = HFEngine(read_token_ids(model, processor))
    results: dict[str, ModeResult] = {}
    left_out = len(rows) - len(usable)
    rank, ranks = get_place() if shared else (0, 1)
    field = "per_device_eval_batch_size" if shared else "batch_size"
    for mode in modes:
        started = time.perf_counter()
        answered: list[_Answered] = []
        tokens = 0
        own = range(rank, len(usable), ranks)
        for start in range(0, len(own), batch_size):
            places = own[start : start + batch_size]
            prompts, kept = _build_mode_prompts([usable[i] for i in places], processor, view_config, config, mode)
            with explained_memory(lambda error: _explain_memory(error, prompts, config, field)):  # noqa: B023
                texts, count = answer_prompts(model, processor, engine, prompts, config.max_completion_length)
            tokens += count
            for index, text in zip(kept, texts, strict=True):
                answered.append((places[index], text, judge_row(text, usable[places[index]])))
        seconds = time.perf_counter() - started
        parts = gather_figures((answered, tokens, seconds)) if shared else [(answered, tokens, seconds)]
        answered = sorted((item for part in parts for item in part[0]), key=lambda item: item[0])
        results[mode] = _summarise(answered, sum(part[1] for part in parts), max(part[2] for part in parts))
        left_out = max(left_out, len(rows) - len(answered))
    return EvalResult(results, left_out)


def answer_prompts(
    model: Any, processor: Any, engine: HFEngine, prompts: Sequence[Prompt], max_completion_length: int
) -> tuple[list[str], int]:
    """Greedy completions as text, and how many tokens they hold."""
    if not prompts:
        return [], 0
    rollouts = engine.generate(model, prompts, SamplingConfig(max_completion_length, temperature=0.0))
    return decode_completions(processor, rollouts.completion_ids_BT, rollouts.completion_mask_BT), int(
        rollouts.completion_mask_BT.sum()
    )


def decode_completions(processor: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> list[str]:
    """The completions as text, special tokens left out."""
    if not len(ids_BT):
        return []
    kept = [ids_T[mask_T].tolist() for ids_T, mask_T in zip(ids_BT.cpu(), mask_BT.cpu().bool(), strict=True)]
    return [str(text) for text in processor.tokenizer.batch_decode(kept, skip_special_tokens=True)]


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion; (0, 1) for no trials."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = correct / total, _Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    spread = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # At 0 and at 1 rounding may put the share itself a hair outside.
    return max(0.0, min(centre - spread, share)), min(1.0, max(centre + spread, share))


def _explain_memory(error: BaseException, prompts: Sequence[Prompt], config: ImagineOPDConfig, field: str) -> str:
    facts = read_pass("the evaluation", prompts, config.max_completion_length)
    return explain_pass(error, facts, field, memory_gib=read_memory_gib(config.device))


def _build_mode_prompts(
    rows: Sequence[Row], processor: Any, view_config: ViewConfig, config: ImagineOPDConfig, mode: str
) -> tuple[list[Prompt], list[int]]:
    """The prompts of one mode, and of which rows they are: those that can be shown."""
    if mode == "teacher":
        pairs = build_pairs(rows, processor, view_config, make_privilege_config(config))
        found = [(pair.teacher, index) for index, pair in enumerate(pairs) if not isinstance(pair, ViewError)]
        return [prompt for prompt, _ in found], [index for _, index in found]
    prompts, kept = [], []
    template = config.direct_prompt_template if mode == "direct" else config.student_prompt_template
    for index, (row, views) in enumerate(zip(rows, make_views(rows, view_config), strict=True)):
        if isinstance(views, ViewError):
            continue
        view = views.teacher if mode == "zoom" else views.student
        prompts.append(build_prompt(row, view, processor, template, config.chat_template_kwargs))
        kept.append(index)
    return prompts, kept


def _summarise(answered: list[_Answered], tokens: int, seconds: float) -> ModeResult:
    verdicts = [verdict for _, _, verdict in answered]
    total, correct = len(verdicts), sum(verdict is True for verdict in verdicts)
    low, high = wilson_interval(correct, total)
    return ModeResult(
        accuracy=correct / total if total else 0.0,
        low=low,
        high=high,
        rows=total,
        unparsed=sum(verdict is None for verdict in verdicts),
        mean_tokens=tokens / total if total else 0.0,
        seconds=seconds,
        completions=tuple(text for _, text, _ in answered),
        correct=tuple(verdict is True for verdict in verdicts),
    )
