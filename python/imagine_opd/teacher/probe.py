"""What the teacher's privilege is worth, part by part: the views, the answer hint, both, on a fixed set of rows.

The teacher answers each row greedily under four prompts: the student's, with the evidence views, with the answer hint,
with both. Its answer is replaced by the reference answer, and gap = mean log p(reference | more) - mean log p(reference
| student's prompt), in nats per answer token: each after the trace it wrote itself, so wrong evidence shows as a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from imagine_opd.kernels import linear_token_stats
from imagine_opd.metrics import ANSWER, classify_tokens
from imagine_opd.models import get_device, get_head
from imagine_opd.privilege import PrivilegeConfig, ViewFunction, build_pairs
from imagine_opd.rollout import HFEngine, SamplingConfig
from imagine_opd.scoring import score_side
from imagine_opd.types import Prompt, PromptPair, Rollouts, Row, ViewConfig, ViewError

# B rows, T tokens of the scored words

STUDENT, VIEWS, HINT, BOTH = "student", "views", "answer", "both"
_OPEN_TAG = "<answer>"


@dataclass(frozen=True, slots=True)
class PrivilegeProbe:
    """Prompts, words to score and which of their tokens count, by side: `student`, `views`, and where rows have
    answers `answer` and `both`.

    `target` says what counts: the reference `answer`, or where no row has one all of the `trace` that the teacher
    writes under its views.
    """

    prompts: dict[str, tuple[Prompt, ...]]
    words: dict[str, Rollouts]
    scored_BT: dict[str, torch.Tensor]
    target: str


def build_probe(
    rows: Sequence[Row],
    processor: Any,
    view_config: ViewConfig,
    privilege: PrivilegeConfig,
    teacher: Any,
    engine: HFEngine,
    max_completion_length: int,
    student_view: ViewFunction | None = None,
    teacher_view: ViewFunction | None = None,
) -> PrivilegeProbe | None:
    """The probe of the rows that can be used: of those with an answer where there are any, else of the teacher's
    traces. `None` where no row can be used.

    `views` is all of the config's privilege but the answer. With a `teacher_view` of the caller's own it is that, and
    `both` is left out: what the function tells is not known.
    """
    answered = [row for row in rows if row.answer is not None]
    rows = answered or rows
    configs = {VIEWS: replace(privilege, answer_hint=False)}
    if answered:
        configs[HINT] = replace(privilege, answer_hint=True, teacher_view="whole", text_hint="none")
        configs |= {} if teacher_view is not None else {BOTH: replace(privilege, answer_hint=True)}
    view_config = replace(view_config, neutral="none")
    built = {
        side: build_pairs(rows, processor, view_config, config, student_view, teacher_view if side == VIEWS else None)
        for side, config in configs.items()
    }
    usable = [
        index for index in range(len(rows)) if not any(isinstance(made[index], ViewError) for made in built.values())
    ]
    if not usable:
        return None
    pairs = {side: [pair for i in usable if isinstance(pair := made[i], PromptPair)] for side, made in built.items()}
    prompts = {STUDENT: tuple(pair.student for pair in pairs[VIEWS])}
    prompts |= {side: tuple(pair.teacher for pair in made) for side, made in pairs.items()}
    greedy = SamplingConfig(max_completion_length, temperature=0.0)
    if not answered:
        trace = engine.generate(teacher, prompts[VIEWS], greedy)
        mask_BT = trace.completion_mask_BT
        return PrivilegeProbe(prompts, dict.fromkeys(prompts, trace), dict.fromkeys(prompts, mask_BT), "trace")
    words, scored_BT = {}, {}
    answers = [str(rows[index].answer) for index in usable]
    for side in prompts:
        traces = decode_traces(engine.generate(teacher, prompts[side], greedy), processor)
        words[side] = put_answers(traces, answers, processor, engine.token_ids.pad)
        mask_BT = words[side].completion_mask_BT
        classes_BT = classify_tokens(words[side].completion_ids_BT, mask_BT, processor)
        scored_BT[side] = (classes_BT == ANSWER) & mask_BT
    return PrivilegeProbe(prompts, words, scored_BT, "answer")


def decode_traces(rollouts: Rollouts, processor: Any) -> list[str]:
    """Each completion's text up to its last `<answer>` tag, the tag included and put there where it has none."""
    kept = [
        ids_T[mask_T].tolist()
        for ids_T, mask_T in zip(
            rollouts.completion_ids_BT.cpu(), rollouts.completion_mask_BT.cpu().bool(), strict=True
        )
    ]
    texts = processor.tokenizer.batch_decode(kept, skip_special_tokens=True)
    cut = [text[: text.rindex(_OPEN_TAG)] if _OPEN_TAG in text else f"{text}\n" for text in texts]
    return [f"{text}{_OPEN_TAG}" for text in cut]


def put_answers(traces: Sequence[str], answers: Sequence[str], processor: Any, pad_id: int) -> Rollouts:
    """The traces, each ended by its answer and the closing tag, as completions."""
    texts = [f"{trace}{answer}</answer>" for trace, answer in zip(traces, answers, strict=True)]
    encoded = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(len(ids) for ids in encoded)
    ids_BT = torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in encoded])
    mask_BT = torch.tensor([[place < len(ids) for place in range(width)] for ids in encoded])
    return Rollouts(ids_BT, mask_BT, torch.zeros(ids_BT.shape))


def measure_sides(
    model: Any, probe: PrivilegeProbe, pad_id: int, batch_size: int = 8, sides: Sequence[str] | None = None
) -> dict[str, float]:
    """Mean log p of the scored words under each side's prompt; empty where there is none to score."""
    if not probe.scored_BT[STUDENT].any():
        return {}
    return {side: _mean_logprob(model, probe, side, pad_id, batch_size) for side in sides or probe.prompts}


def split_privilege(means: dict[str, float], student_mean: float | None = None) -> dict[str, float]:
    """`gap/views` and, where rows have answers, `gap/answer` and `gap/both`, of the teacher's `measure_sides`.

    With `student_mean`, the student's own under its own prompt, also `gap/student`: what its weights have gained. It
    is 0 before step 0 and should come near `gap/views`.
    """
    split = {f"gap/{side}": mean - means[STUDENT] for side, mean in means.items() if side != STUDENT}
    if student_mean is not None and means:
        split["gap/student"] = student_mean - means[STUDENT]
    return split


def _mean_logprob(model: Any, probe: PrivilegeProbe, side: str, pad_id: int, batch_size: int) -> float:
    total = 0.0
    prompts, device = probe.prompts[side], get_device(model)
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        words, scored_BT = probe.words[side].select(part), probe.scored_BT[side][part]
        if not scored_BT.any():
            continue
        with torch.no_grad():
            hidden_ND = score_side(model, prompts[part], words, scored_BT, pad_id)
            ids_N = words.completion_ids_BT[scored_BT].to(device)
            stats = linear_token_stats(hidden_ND, get_head(model), None, None, ids_N)
        total += float(stats.student_logprob_N.sum())
    return total / int(probe.scored_BT[side].sum())
