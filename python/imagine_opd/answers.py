"""The answer in a completion: find it, and say whether it is right.

A completion that holds no answer is `None` (unparsed), counted apart from a wrong one.
"""

from __future__ import annotations

import math
import re

from imagine_opd.errors import AnswerError
from imagine_opd.types import Row

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_YES = {"yes", "true"}
_NO = {"no", "false"}


def extract_answer(text: str, letters: str | None = "ABCD") -> str | None:
    """The answer inside the last closed `<answer>` tag: one of `letters`, or with `letters=None` the text itself.

    `None` where there is no closed tag, or no single letter in it (`(C) red`, `C.` and `c` all give `C`).
    """
    spans = _TAG.findall(text)
    if not spans:
        return None
    span = str(spans[-1]).strip()
    if letters is None:
        return span or None
    match = re.fullmatch(rf"\(?\s*([{re.escape(letters)}])\s*(?:[).:,]\s*.*|\s*)", span, re.DOTALL | re.IGNORECASE)
    return match.group(1).upper() if match else None


def has_answer_tag(text: str) -> bool:
    """Whether the text holds a closed, non-empty `<answer>` tag."""
    return extract_answer(text, letters=None) is not None


def is_correct(text: str, gold: str, letters: str | None = None, kind: str | None = None) -> bool | None:
    """Whether the completion's answer is `gold`; `None` when no answer can be read from it.

    `kind`: `choice` (a letter of `letters`, default ABCD, or A to Z for a gold beyond), `yesno`, `number` (equal to
    1e-6), `text` (equal after folding case, space and a final full stop); `None`: `choice` where `letters` are given
    or the gold is one letter, else `text`. Raises `AnswerError` for another kind or a gold that does not parse.
    """
    if kind is None:
        kind = "choice" if letters or re.fullmatch(r"\s*[A-Za-z]\s*", gold) else "text"
    if kind == "choice":
        letters = letters or ("ABCD" if gold.strip().upper() in "ABCD" else "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        return _compare(extract_answer(text, letters), gold.strip().upper())
    answer = extract_answer(text, letters=None)
    if kind == "text":
        return _compare(None if answer is None else _fold(answer), _fold(gold))
    if kind == "yesno":
        return _compare(_read_yes_no(answer), _require(_read_yes_no(gold), gold, kind))
    if kind == "number":
        wanted = _require(_read_number(gold), gold, kind)
        found = _read_number(answer)
        return None if found is None else math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9)
    raise AnswerError(f"kind={kind!r}: expected choice, yesno, number or text")


def _compare(found: object, wanted: object) -> bool | None:
    return None if found is None else found == wanted


def _require(value: object, gold: str, kind: str) -> float:
    if value is None:
        raise AnswerError(f"gold answer {gold!r} is not a {kind}")
    return float(value)  # type: ignore[arg-type]


def _fold(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip().casefold()


def _read_yes_no(text: str | None) -> float | None:
    word = "" if text is None else re.split(r"\W+", _fold(text), maxsplit=1)[0]
    return 1.0 if word in _YES else 0.0 if word in _NO else None


def _read_number(text: str | None) -> float | None:
    found = _NUMBER.findall("" if text is None else text)
    try:
        return float(found[0].replace(",", "")) if len(found) == 1 else None
    except ValueError:
        return None


def judge_row(text: str, row: Row) -> bool | None:
    """Whether a completion gives the row's answer, a letter where it has options; `None`: no answer in it.

    Raises `AnswerError` for a gold answer that cannot be compared with. `row.answer` must be there.
    """
    assert row.answer is not None
    if row.options:
        return is_correct(text, row.answer, letters=_LETTERS[: len(row.options)], kind="choice")
    return is_correct(text, row.answer)
