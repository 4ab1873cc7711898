"""What a completion gives away of the teacher's privilege: completion and prompts in, leaked spans and tokens out.

Two meters. A lexicon of phrases that speak of evidence the student never saw ("the second image", "the provided
crop"), and runs of words that stand in the teacher's prompt and not in the student's (SpatialOPSD's n-grams).
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

LEXICON = (
    "zoomed image",
    "zoomed-in image",
    "zoomed-in view",
    "zoomed-in crop",
    "zoomed view",
    "zoomed crop",
    "enlarged image",
    "enlarged view",
    "magnified image",
    "magnified view",
    "magnified crop",
    "cropped image",
    "cropped view",
    "cropped region",
    "close-up image",
    "close-up view",
    "image crop",
    "provided crop",
    "provided crops",
    "given crop",
    "additional image",
    "additional images",
    "additional view",
    "extra image",
    "extra images",
    "extra view",
    "other image",
    "last image",
    "last images",
    "evidence image",
    "evidence crop",
    "reference image",
    "the crop",
    "the crops",
    "this crop",
    "ground truth",
    "ground-truth",
    "reference answer",
    "reference solution",
    "correct answer is given",
    "provided answer",
    "given answer",
    "the hint",
    "bounding box",
)
"""Phrases that have no place in an answer from the global image alone. Case, hyphens and line breaks do not matter."""

_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_CARDINALS = ("one", "two", "three", "four", "five")
# "the second image", "image 2", "view two": a leak only beyond the images that the student has.
_NUMBERED = re.compile(
    rf"(?<!\w)(?:(?P<ordinal>{'|'.join(_ORDINALS)}|\d{{1,6}}(?:st|nd|rd|th))[\s-]+(?:image|picture|photo|view|crop)"
    rf"|(?:image|picture|photo|view|crop)\s*\#?\s*(?P<number>\d{{1,6}}|{'|'.join(_CARDINALS)}))(?!\w)",
    re.IGNORECASE,
)
_NUMBERED_NOUNS = frozenset(("image", "picture", "photo", "view", "crop"))
_WORD = re.compile(r"\w+")
_STOP = re.compile(r"[.,;:!?]")  # a phrase does not reach over one

_PhraseIndex = dict[str, list[tuple[str, ...]]]


@dataclass(frozen=True, slots=True)
class LeakSpan:
    """One leak: characters `start` to `end` (excluded) of the completion, and what was found (`phrase` or `ngram`)."""

    start: int
    end: int
    text: str
    kind: str


@dataclass(frozen=True, slots=True)
class LeakReport:
    """`count` leaks of one completion, in order of their start, overlapping ones joined."""

    count: int
    spans: tuple[LeakSpan, ...]


def find_leaks(
    text: str,
    teacher_text: str = "",
    student_text: str = "",
    *,
    ngram: int = 4,
    phrases: Sequence[str] = (),
    student_images: int = 1,
) -> LeakReport:
    """The leaks of a completion.

    A phrase of the lexicon or of `phrases` counts unless the student's own prompt says it too; a numbered image
    ("the third image", "image 2") counts beyond `student_images`; so does every run of `ngram` words (0: none) of
    `teacher_text`, the teacher's prompt, that `student_text` does not hold.
    """
    words = list(_WORD.finditer(text))
    lowered = [word.group().lower() for word in words]
    found = _find_phrases(text, words, lowered, _index_phrases(tuple(phrases)))
    if not _NUMBERED_NOUNS.isdisjoint(lowered):
        numbered = [match for match in _NUMBERED.finditer(text) if _read_number(match) > student_images]
        found += [LeakSpan(match.start(), match.end(), match.group(), "phrase") for match in numbered]
    found = [span for span in found if not _stands_in(span.text, student_text)]
    if ngram > 0 and teacher_text:
        found += _find_ngrams(text, words, collect_private_ngrams(teacher_text, student_text, ngram), ngram)
    spans = _join_spans(text, found)
    return LeakReport(len(spans), spans)


@lru_cache(maxsize=1024)
def collect_private_ngrams(teacher_text: str, student_text: str, n: int) -> frozenset[tuple[str, ...]]:
    """Runs of `n` words, case folded, of the teacher's text that the student's does not hold."""
    return frozenset(_list_ngrams(teacher_text, n)) - frozenset(_list_ngrams(student_text, n))


def mask_leaks(
    completion_ids: Sequence[int], spans: Sequence[LeakSpan], decode: Callable[[Sequence[int]], str]
) -> list[bool]:
    """For each token of a completion, whether it carries a leaked character.

    `decode` must be the call that made the text in which the spans were found. Where a token begins is the length of
    the text before it; it is looked up by halving, so a completion of T tokens costs 2 log T decodes a span.
    """
    leaked = [False] * len(completion_ids)
    lengths: dict[int, int] = {}

    def measure(count: int) -> int:
        if count not in lengths:
            lengths[count] = len(decode(completion_ids[:count]))
        return lengths[count]

    for span in spans:
        # The token after which the text is longer than `start` holds that character.
        first = bisect.bisect_right(range(len(leaked) + 1), span.start, key=measure) - 1
        last = bisect.bisect_left(range(len(leaked) + 1), span.end, key=measure)
        for token in range(max(first, 0), min(last, len(leaked))):
            leaked[token] = True
    return leaked


def _find_phrases(
    text: str, words: Sequence[re.Match[str]], lowered: Sequence[str], phrases: _PhraseIndex
) -> list[LeakSpan]:
    found = []
    for place, word in enumerate(lowered):
        for phrase in phrases.get(word, ()):
            end = place + len(phrase)
            if tuple(lowered[place:end]) != phrase:
                continue
            first, last = words[place].start(), words[end - 1].end()
            gaps = (text[words[i].end() : words[i + 1].start()] for i in range(place, end - 1))
            if not any(_STOP.search(gap) for gap in gaps):
                found.append(LeakSpan(first, last, text[first:last], "phrase"))
                break
    return found


def _find_ngrams(
    text: str, words: Sequence[re.Match[str]], private: frozenset[tuple[str, ...]], n: int
) -> list[LeakSpan]:
    if not private or private.isdisjoint(grams := _list_ngrams(text, n)):
        return []
    spans = [(words[i].start(), words[i + n - 1].end()) for i, gram in enumerate(grams) if gram in private]
    return [LeakSpan(first, last, text[first:last], "ngram") for first, last in spans]


def _list_ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = [word.casefold() for word in _WORD.findall(text)]
    return list(zip(*(words[start:] for start in range(n)), strict=False))


@lru_cache(maxsize=16)
def _index_phrases(phrases: tuple[str, ...]) -> _PhraseIndex:
    """All phrases as words, by their first; longest first, so that of two which begin alike the longer is found."""
    index: dict[str, list[tuple[str, ...]]] = {}
    for phrase in (*LEXICON, *phrases):
        words = tuple(word.lower() for word in _WORD.findall(phrase))
        index.setdefault(words[0], []).append(words)
    return {first: sorted(found, key=len, reverse=True) for first, found in index.items()}


def _stands_in(phrase: str, text: str) -> bool:
    if not text:
        return False
    parts = [re.escape(word) for word in _WORD.findall(phrase)]
    return re.search(r"(?<!\w)" + r"\W+".join(parts) + r"(?!\w)", text, re.IGNORECASE) is not None


def _read_number(match: re.Match[str]) -> int:
    ordinal, number = match.group("ordinal"), match.group("number")
    if ordinal is not None:
        word = ordinal.casefold()
        return _ORDINALS.index(word) + 1 if word in _ORDINALS else int(re.sub(r"\D", "", word))
    word = str(number).casefold()
    return _CARDINALS.index(word) + 1 if word in _CARDINALS else int(word)


def _join_spans(text: str, spans: Sequence[LeakSpan]) -> tuple[LeakSpan, ...]:
    joined: list[LeakSpan] = []
    for span in sorted(spans, key=lambda item: (item.start, -item.end)):
        if joined and span.start < joined[-1].end:
            before = joined[-1]
            end = max(before.end, span.end)
            joined[-1] = LeakSpan(before.start, end, text[before.start : end], before.kind)
        else:
            joined.append(span)
    return tuple(joined)
