"""Evaluation: accuracy per view with an honest interval; unreadable or unanswered rows are counted, not hidden."""

from __future__ import annotations

import pytest

import imagine_opd
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import ConfigError, RowError
from imagine_opd.evaluation import wilson_interval
from imagine_opd.types import Row


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (283, 1000, 0.2559, 0.3117), (0, 0, 0, 1)],
)
def test_wilson_interval_equals_published_values(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=2e-4)


def test_teacher_view_beats_the_students_on_the_base_model(tiny, make_rows):
    rows = make_rows(60)
    result = imagine_opd.evaluate(
        tiny.model, rows, modes=("imagine", "teacher"), processor=tiny.processor, **TINY_RECIPE
    )
    assert result["teacher"].accuracy > 0.85
    assert result["imagine"].accuracy < 0.6
    for mode in result.modes.values():
        assert mode.rows == 60 == len(mode.completions) == len(mode.correct)
        assert mode.low <= mode.accuracy <= mode.high
        assert mode.accuracy == sum(mode.correct) / 60
        assert 10 < mode.mean_tokens < 18


def test_rows_without_answer_are_left_out_and_counted(tiny, make_rows):
    rows = make_rows(3)
    rows.append(Row(rows[0].images, rows[0].question))
    result = imagine_opd.evaluate(tiny.model, rows, modes=("imagine",), processor=tiny.processor, **TINY_RECIPE)
    assert (result["imagine"].rows, result.left_out) == (3, 1)
    with pytest.raises(RowError, match="none of the 1 rows has an answer"):
        imagine_opd.evaluate(tiny.model, rows[3:], modes=("imagine",), processor=tiny.processor, **TINY_RECIPE)


def test_unknown_mode_is_refused(tiny, make_rows):
    with pytest.raises(ConfigError, match="unknown evaluation mode 'oracle'"):
        imagine_opd.evaluate(tiny.model, make_rows(1), modes=("oracle",), processor=tiny.processor, **TINY_RECIPE)


def test_one_mode_may_be_a_name_and_an_empty_batch_is_refused(tiny, make_rows):
    fields = {"processor": tiny.processor, **TINY_RECIPE}
    assert list(imagine_opd.evaluate(tiny.model, make_rows(1), modes="imagine", **fields).modes) == ["imagine"]
    with pytest.raises(ConfigError, match="batch_size=0"):
        imagine_opd.evaluate(tiny.model, make_rows(1), batch_size=0, **fields)


def test_options_are_judged_by_letter(tiny, make_rows):
    from imagine_opd.answers import judge_row

    row = make_rows(1)[0]

    asked = Row(row.images, "which?", options=("red", "green"), answer="B")
    assert judge_row("<answer>(B) green</answer>", asked) is True
    assert judge_row("<answer>A</answer>", asked) is False
    assert judge_row("<answer>C</answer>", asked) is None
