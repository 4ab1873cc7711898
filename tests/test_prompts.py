"""Prompts: one placeholder per image expanded to its token count, crops after the global images, no silent mismatch."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import ConfigError, RowError
from imagine_opd.privilege import PrivilegeConfig, build_pairs, build_prompts
from imagine_opd.prompts import build_prompt, format_question
from imagine_opd.types import PromptPair, Row, SideView
from imagine_opd.views import make_views

TEMPLATE = TINY_RECIPE["student_prompt_template"]


def test_teacher_prompt_is_the_students_plus_the_crop(tiny, make_rows):
    row = make_rows(1)[0]
    views = make_views([row], tiny.view_config)[0]
    pair = build_prompts(row, views, tiny.processor, PrivilegeConfig(TEMPLATE, TEMPLATE))
    image_id = tiny.processor.tokenizer.convert_tokens_to_ids(tiny.processor.image_token)
    assert pair.student.image_tokens == (9,)
    assert pair.teacher.image_tokens == (9, 4)
    assert pair.student.input_ids.count(image_id) == sum(pair.student.mm_token_type_ids) == 9
    assert pair.teacher.input_ids.count(image_id) == sum(pair.teacher.mm_token_type_ids) == 13
    assert pair.student.input_ids[-8:] == pair.teacher.input_ids[-8:]
    assert row.question in pair.student.text


def test_prompt_equals_the_processors_own(tiny, make_rows):
    """The real processor, given the same text and image, makes the same ids and modality ids."""
    import io

    from PIL import Image

    row = make_rows(1)[0]
    views = make_views([row], tiny.view_config)[0]
    prompt = build_prompt(row, views.student, tiny.processor, TEMPLATE)
    picture = Image.open(io.BytesIO(row.images[0]))
    theirs = tiny.processor(text=[prompt.text], images=[picture], return_tensors="np")
    assert tuple(theirs["input_ids"][0].tolist()) == prompt.input_ids
    assert tuple(theirs["mm_token_type_ids"][0].tolist()) == prompt.mm_token_type_ids
    assert theirs["image_grid_thw"].tolist() == prompt.view.image_grid_thw.tolist()
    assert abs(theirs["pixel_values"] - prompt.view.pixel_values).max() <= 2 / 255


def test_answer_hint_goes_to_the_teacher_only(tiny, make_rows):
    row = make_rows(1)[0]
    views = make_views([row], tiny.view_config)[0]
    pair = build_prompts(
        row,
        views,
        tiny.processor,
        PrivilegeConfig(TEMPLATE, TEMPLATE, answer_hint=True, answer_hint_template=" i see {answer}"),
    )
    assert f"i see {row.answer}" in pair.teacher.text
    assert "i see" not in pair.student.text


def test_placeholder_in_the_question_is_refused(tiny, make_rows):
    row = make_rows(1)[0]
    bad = Row(row.images, f"what {tiny.processor.image_token} ?", row.boxes, source="rows.jsonl:9")
    views = make_views([bad], tiny.view_config)[0]
    with pytest.raises(RowError, match="rows.jsonl:9: the text contains the image placeholder"):
        build_prompt(bad, views.student, tiny.processor, TEMPLATE)


def test_placeholder_in_a_hint_leaves_its_row_out_and_no_other(tiny, make_rows):
    rows = make_rows(3)
    text = f"see {tiny.processor.image_token}"
    rows[1] = dataclasses.replace(rows[1], hint=text, source="rows.jsonl:2")
    told = lambda row: SideView(row.images, hint=text if row is rows[2] else "")  # noqa: E731
    first, second, third = build_pairs(
        rows, tiny.processor, tiny.view_config, PrivilegeConfig(TEMPLATE, TEMPLATE), teacher_view=told
    )
    assert isinstance(first, PromptPair)
    for found in (second, third):
        assert found.reason == "text"
        assert "the text contains the image placeholder" in found.message


def test_template_that_loses_an_image_is_refused(tiny, make_rows):
    row = make_rows(1)[0]
    views = make_views([row], tiny.view_config)[0]
    processor = copy.deepcopy(tiny.processor)
    processor.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
    with pytest.raises(ConfigError, match="placed 0 image placeholders"):
        build_prompt(row, views.student, processor, TEMPLATE)


def test_options_become_lettered_lines():
    row = Row((b"",), "which colour?", options=("red", "green"))
    assert format_question(row) == "which colour?\nA. red\nB. green"
    with pytest.raises(RowError, match="27 options"):
        format_question(Row((b"",), "?", options=("x",) * 27))
