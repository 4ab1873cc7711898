"""An `Explanation` as text: plain columns, with colours where the reader's terminal shows them.

Texts of rows and models are shown, never obeyed: control and direction characters come out as their escapes.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence

from imagine_opd.explanation import Explanation, RunSize, SideFacts, TokenFacts
from imagine_opd.types import Box

_JOINERS = "\u200c\u200d"  # invisible, but part of how Persian and emoji are written
_WIDEST_TOKEN = 24
_HEAT = (231, 230, 223, 217, 216, 209, 202)  # of 256 colours: white to orange


def format_text(found: Explanation, *, colour: bool = False) -> str:
    """The whole explanation; `colour` marks tokens by their KL with ANSI codes."""
    parts = [
        list(describe_row(found)),
        *(list(_describe_side(name, side)) for name, side in (("student", found.student), ("teacher", found.teacher))),
        [
            f"teacher    {make_printable(found.teacher_kind)}",
            f"privilege  {make_printable(describe_privilege(found))}",
            *(["contrast   the teacher is also asked with neutral evidence"] if found.neutral is not None else []),
        ],
        list(_describe_rollout(found, colour)),
        [
            f"memory     {line}" if place == 0 else f"           {line}"
            for place, line in enumerate(map(make_printable, found.memory))
        ],
        list(_describe_checks(found)),
        list(_describe_settings(found)),
        [
            f"run        {line}" if place == 0 else f"           {line}"
            for place, line in enumerate(describe_size(found.size))
        ],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def make_printable(text: str) -> str:
    """The text with control, direction and unpaired characters as escapes; line breaks and tabs stay."""
    return "".join(_escape(character) for character in text)


def _escape(character: str) -> str:
    if character in "\n\t" or character in _JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co"):
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def describe_row(found: Explanation) -> Iterator[str]:
    """Which row it is and what it says, a line each."""
    name = ", ".join(part for part in (found.source, f"id {found.id}" if found.id else "") if part)
    yield f"row        {found.row_index} of {found.size.rows}, from 0" + (f" ({make_printable(name)})" if name else "")
    question = make_printable(found.question).replace("\n", "\n           ")
    yield f"question   {question}"
    for letter, option in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", found.options, strict=False):
        yield f"           {letter}. {make_printable(option)}"
    yield f"answer     {make_printable(found.answer) if found.answer is not None else '(none)'}"
    boxes = [describe_box(box, len(found.originals)) for box in found.boxes]
    yield f"boxes      {'; '.join(boxes) or '(none)'}"


def describe_box(box: Box, image_count: int = 1) -> str:
    """`(12, 40, 28, 56)`, with its image where there are several."""
    place = f" on image {box.image + 1}" if image_count > 1 else ""
    return f"({', '.join(f'{side:g}' for side in (box.x0, box.y0, box.x1, box.y1))}){place}"


def describe_tokens(side: SideFacts) -> str:
    """Tokens of a prompt, and where the response starts behind them."""
    place = f"the response starts at index {side.response_start}"
    if side.response_position is not None:
        place += ", position (t, h, w) = ({}, {}, {})".format(*side.response_position)
    return f"{side.text_tokens} text + {side.image_tokens} image = {side.tokens} tokens; {place}"


def describe_privilege(found: Explanation) -> str:
    """What the teacher has that the student has not."""
    return "; ".join(found.privilege) or "none: both sides are given the same"


def describe_absence(found: Explanation) -> str:
    """Why a rollout has no token."""
    return make_printable(found.dropped) or "the first is an end token"


def describe_size(size: RunSize) -> list[str]:
    """Rows, steps and tokens of the run."""
    rows = f"{size.rows} rows, {size.rows_per_step} a step, {size.steps} step{'s' if size.steps != 1 else ''}"
    means = f"student prompt {size.student_tokens:.0f} tokens, teacher prompt {size.teacher_tokens:.0f}"
    return [
        rows,
        f"{means} (mean of {size.sampled_rows} rows), completion at most {size.completion_tokens}",
        f"at most {size.total_tokens:,.0f} tokens go through student and teacher to be scored",
    ]


def describe_means(tokens: Sequence[TokenFacts]) -> str:
    """Mean figures of the rollout in one line."""
    count = len(tokens)
    mean = {
        "KL": sum(token.reverse_kl for token in tokens) / count,
        "student": sum(token.student_logprob for token in tokens) / count,
        "teacher": sum(token.teacher_logprob for token in tokens) / count,
        "entropy": sum(token.entropy for token in tokens) / count,
    }
    figures = ", ".join(f"{name} {value:.4f}" for name, value in mean.items())
    return f"{count} tokens; mean {figures} (nats)"


def _describe_side(name: str, side: SideFacts) -> Iterator[str]:
    yield f"{name}'s prompt: {describe_tokens(side)}"
    for line in make_printable(side.text).split("\n"):
        yield f"  | {line}"


def _describe_rollout(found: Explanation, colour: bool) -> Iterator[str]:
    if not found.tokens:
        yield f"rollout    no token ({describe_absence(found)}): this row would not train"
        return
    yield f"rollout    {describe_means(found.tokens)}"
    highest = max((token.reverse_kl for token in found.tokens if math.isfinite(token.reverse_kl)), default=0.0)
    if colour:
        yield "  | " + "".join(_paint(make_printable(token.text), token, highest) for token in found.tokens)
    width = min(max(len(_show_token(token)) for token in found.tokens), _WIDEST_TOKEN)
    weighted = any(token.weight != 1.0 for token in found.tokens)
    heads = ["KL", "student", "teacher", "entropy", *(["weight"] if weighted else [])]
    yield f"  {'token':<{width}}" + "".join(f"{head:>10}" for head in heads)
    for token in found.tokens:
        shown = _show_token(token)
        shown = shown if len(shown) <= width else shown[: width - 1] + "…"
        numbers = [token.reverse_kl, token.student_logprob, token.teacher_logprob, token.entropy]
        cells = "".join(f"{number:>10.4f}" for number in numbers) + (f"{token.weight:>10.3g}" if weighted else "")
        padded = f"{shown:<{width}}"
        yield "  " + (_paint(padded, token, highest) if colour else padded) + cells


def _show_token(token: TokenFacts) -> str:
    return make_printable(token.text).replace("\n", "\\n").replace("\t", "\\t").strip(" ") or repr(token.text)


def _paint(text: str, token: TokenFacts, highest: float) -> str:
    share = token.reverse_kl / highest if highest > 0 and math.isfinite(token.reverse_kl) else 0.0
    code = _HEAT[round(min(max(share, 0.0), 1.0) * (len(_HEAT) - 1))]
    return f"\x1b[30;48;5;{code}m{text}\x1b[0m"


def _describe_checks(found: Explanation) -> Iterator[str]:
    if found.teacher_fault:
        yield f"FAILED     {make_printable(found.teacher_fault)}"
    for place, (name, value) in enumerate(found.teacher_checks):
        yield f"{'checks' if place == 0 else '':<11}{make_printable(name):<32} {value:.6g}"


def _describe_settings(found: Explanation) -> Iterator[str]:
    for place, item in enumerate(found.settings):
        value, default = (_shorten(make_printable(text)) for text in (item.value, item.default))
        yield f"{'settings' if place == 0 else '':<11}{item.name} = {value} (default {default})"


def _shorten(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
