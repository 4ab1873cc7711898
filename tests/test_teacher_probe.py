"""The privilege split: each part's gap against log-probs by hand, and its sign where it must be known."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from imagine_opd.models.access import read_token_ids
from imagine_opd.privilege import PrivilegeConfig, show_student
from imagine_opd.rollout import HFEngine
from imagine_opd.teacher.probe import build_probe, decode_traces, measure_sides, put_answers, split_privilege
from imagine_opd.types import Rollouts

PRIVILEGE = PrivilegeConfig("{question}", "{question}", answer_hint_template=" i see {answer} .")


def make_probe(tiny, rows, **options):
    engine = HFEngine(read_token_ids(tiny.model, tiny.processor))
    probe = build_probe(rows, tiny.processor, tiny.view_config, PRIVILEGE, tiny.model, engine, 18, **options)
    return probe, engine.token_ids.pad


def plain_logprob(tiny, prompt, ids: list[int]) -> list[float]:
    """Log-probs of `ids` behind a prompt by the model's own forward, one row."""
    view = prompt.view
    sequence = torch.tensor([[*prompt.input_ids, *ids]])
    types = torch.tensor([[*prompt.mm_token_type_ids, *[0] * len(ids)]])
    with torch.no_grad():
        logits = tiny.model(
            input_ids=sequence,
            mm_token_type_ids=types,
            pixel_values=torch.from_numpy(view.pixel_values),
            image_grid_thw=torch.from_numpy(view.image_grid_thw),
        ).logits[0]
    logprobs = logits.log_softmax(-1)
    start = len(prompt.input_ids)
    return [float(logprobs[start + place - 1, token]) for place, token in enumerate(ids)]


def measure_privilege_split(teacher, probe, pad_id, batch_size=8, student=None):
    own = {} if student is None else measure_sides(student, probe, pad_id, batch_size, ("student",))
    return split_privilege(measure_sides(teacher, probe, pad_id, batch_size), own.get("student"))


def test_gap_is_the_mean_difference_of_the_answers_log_probs(tiny, make_rows):
    probe, pad = make_probe(tiny, make_rows(4))
    assert probe.target == "answer"
    split = measure_privilege_split(tiny.model, probe, pad)
    assert sorted(split) == ["gap/answer", "gap/both", "gap/views"]
    means = {}
    for side, prompts in probe.prompts.items():
        values = []
        for row, prompt in enumerate(prompts):
            ids = probe.words[side].completion_ids_BT[row][probe.words[side].completion_mask_BT[row]].tolist()
            scored = probe.scored_BT[side][row].nonzero().flatten().tolist()
            assert len(scored) == 1
            values.append(plain_logprob(tiny, prompt, ids)[scored[0]])
        means[side] = sum(values) / len(values)
    for side in ("views", "answer", "both"):
        assert split[f"gap/{side}"] == pytest.approx(means[side] - means["student"], abs=1e-4)


def test_words_are_the_teachers_trace_with_the_reference_answer(tiny, make_rows):
    rows = make_rows(3)
    probe, _ = make_probe(tiny, rows)
    words = probe.words["views"]
    for row, ids_T, mask_T in zip(rows, words.completion_ids_BT, words.completion_mask_BT, strict=True):
        text = tiny.processor.tokenizer.decode(ids_T[mask_T])
        assert text.startswith("look at ")
        assert text.endswith(f"<answer> {row.answer} </answer>")
        assert text.count("<answer>") == 1


def test_gap_of_the_student_is_zero_before_it_moves(tiny, make_rows):
    probe, pad = make_probe(tiny, make_rows(4))
    before = measure_privilege_split(tiny.model, probe, pad, student=tiny.model)
    assert before["gap/student"] == 0.0
    moved = copy.deepcopy(tiny.model)
    with torch.no_grad():
        moved.get_output_embeddings().weight.mul_(0.5)
    after = measure_privilege_split(tiny.model, probe, pad, student=moved)
    assert abs(after.pop("gap/student")) > 0.01
    before.pop("gap/student")
    assert after == before


def test_batches_of_any_size_give_the_same_split(tiny, make_rows):
    probe, pad = make_probe(tiny, make_rows(5))
    whole = measure_privilege_split(tiny.model, probe, pad)
    assert measure_privilege_split(tiny.model, probe, pad, batch_size=2) == pytest.approx(whole, abs=1e-5)


def test_prompts_hold_what_their_side_knows_and_nothing_else(tiny, make_rows):
    rows = make_rows(2)
    probe, _ = make_probe(tiny, rows)
    for row, (student, views, hint, both) in zip(rows, zip(*probe.prompts.values(), strict=True), strict=True):
        assert [len(prompt.view.frame_counts) for prompt in (student, views, hint, both)] == [1, 2, 1, 2]
        told = f"i see {row.answer} ."
        assert [told in prompt.text for prompt in (student, views, hint, both)] == [False, False, True, True]


def test_wrong_evidence_is_worth_less_than_right(tiny, make_rows):
    right, wrong = (
        measure_privilege_split(tiny.model, *make_probe(tiny, make_rows(16, kind)))["gap/views"]
        for kind in ("right", "wrong")
    )
    assert right > 0.5
    assert wrong < 0.0


def test_without_answers_the_teachers_own_trace_is_scored(tiny, make_rows):
    rows = [dataclasses.replace(row, answer=None) for row in make_rows(6)]
    probe, pad = make_probe(tiny, rows)
    assert probe.target == "trace"
    split = measure_privilege_split(tiny.model, probe, pad)
    assert sorted(split) == ["gap/views"]
    assert split["gap/views"] > 0.1


def test_rows_without_an_answer_are_left_out_where_others_have_one(tiny, make_rows):
    rows = make_rows(3)
    rows[1] = dataclasses.replace(rows[1], answer=None)
    probe, _ = make_probe(tiny, rows)
    assert len(probe.words["both"].completion_ids_BT) == len(probe.prompts["both"]) == 2


def test_a_teacher_view_of_the_callers_own_is_the_views_and_has_no_both(tiny, make_rows):
    probe, pad = make_probe(tiny, make_rows(3), teacher_view=show_student)
    split = measure_privilege_split(tiny.model, probe, pad)
    assert sorted(split) == ["gap/answer", "gap/views"]
    assert split["gap/views"] == pytest.approx(0.0, abs=1e-6)


def test_rows_that_cannot_be_shown_are_left_out(tiny, make_rows):
    rows = make_rows(3)
    rows[0] = dataclasses.replace(rows[0], images=(b"no image",))
    probe, _ = make_probe(tiny, rows)
    assert {len(prompts) for prompts in probe.prompts.values()} == {2}
    assert make_probe(tiny, rows[:1])[0] is None


def test_rows_without_boxes_have_a_gap_of_zero(tiny, make_rows):
    rows = [dataclasses.replace(row, boxes=()) for row in make_rows(3)]
    probe, pad = make_probe(tiny, rows)
    assert measure_privilege_split(tiny.model, probe, pad)["gap/views"] == pytest.approx(0.0, abs=1e-6)


def test_traces_end_at_the_last_tag_and_get_one_where_there_is_none(tiny):
    tokenizer, pad = tiny.processor.tokenizer, tiny.processor.tokenizer.pad_token_id
    texts = ["i see 3 . <answer> 3 </answer> <answer> 4", "i see 3 ."]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, encoded))
    ids_BT = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in encoded])
    mask_BT = torch.tensor([[place < len(ids) for place in range(width)] for ids in encoded])
    traces = decode_traces(Rollouts(ids_BT, mask_BT, torch.zeros(ids_BT.shape)), tiny.processor)
    assert traces == ["i see 3 . <answer> 3 </answer> <answer>", "i see 3 .\n<answer>"]
    words = put_answers(traces, ["7", "1 2"], tiny.processor, pad)
    assert tokenizer.decode(words.completion_ids_BT[0][words.completion_mask_BT[0]]).endswith("<answer> 7 </answer>")
    assert (
        tokenizer.decode(words.completion_ids_BT[1][words.completion_mask_BT[1]])
        == "i see 3 . \n <answer> 1 2 </answer>"
    )
    assert words.completion_ids_BT[1][~words.completion_mask_BT[1]].eq(pad).all()
