"""Answers: found in the last closed tag, compared by kind; no answer is None, never wrong."""

from __future__ import annotations

import pytest

from imagine_opd.answers import extract_answer, is_correct
from imagine_opd.errors import AnswerError


@pytest.mark.parametrize(
    ("text", "letters", "expected"),
    [
        ("look. <answer> 7 </answer>", None, "7"),
        ("<answer>A</answer> no, <answer>C</answer>", "ABCD", "C"),
        ("<answer>(c) red</answer>", "ABCD", "C"),
        ("<answer>b.</answer>", "ABCD", "B"),
        ("<answer>Because</answer>", "ABCD", None),
        ("<answer>E</answer>", "ABCD", None),
        ("the answer is C", "ABCD", None),
        ("<answer>C", "ABCD", None),
        ("<answer></answer>", None, None),
        ("<ANSWER>two\nlines</ANSWER>", None, "two\nlines"),
    ],
)
def test_answer_is_what_the_last_closed_tag_holds(text, letters, expected):
    assert extract_answer(text, letters=letters) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "kind", "expected"),
    [
        ("7", "7", "text", True),
        ("Red  Circle.", "red circle", "text", True),
        ("red", "blue", "text", False),
        ("C", "c", "choice", True),
        ("D", "C", "choice", False),
        ("maybe", "C", "choice", None),
        ("(C) red", "C", None, True),
        ("(F) red", "F", None, True),
        ("7", "7", None, True),
        ("Yes, it is", "yes", "yesno", True),
        ("no", "yes", "yesno", False),
        ("perhaps", "yes", "yesno", None),
        ("1,200", "1200", "number", True),
        ("about 3.5 cm", "3.5", "number", True),
        ("3 or 4", "3", "number", None),
    ],
)
def test_correctness_by_kind(answer, gold, kind, expected):
    assert is_correct(f"trace <answer>{answer}</answer>", gold, kind=kind) is expected


def test_no_tag_is_unparsed_not_wrong():
    assert is_correct("the answer is 7", "7") is None


def test_unknown_kind_and_bad_gold_are_refused():
    with pytest.raises(AnswerError, match="kind='essay'"):
        is_correct("<answer>x</answer>", "x", kind="essay")
    with pytest.raises(AnswerError, match="gold answer 'many' is not a number"):
        is_correct("<answer>3</answer>", "many", kind="number")
