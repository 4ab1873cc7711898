"""The leak meter: what gives the privilege away is found to the character and to the token, and nothing else is."""

from __future__ import annotations

import math

import pytest
import torch

from imagine_opd.leaks.spans import collect_private_ngrams, find_leaks, mask_leaks
from imagine_opd.leaks.weighing import unlikelihood


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The sign reads STOP in the Second Image.", ["Second Image"]),
        ("as the zoomed-in\nimage shows, and the provided crop too", ["zoomed-in\nimage", "provided crop"]),
        ("Image 2 shows a dog", ["Image 2"]),
        ("view two and the 3rd picture", ["view two", "3rd picture"]),
        ("The ground truth is B", ["ground truth"]),
        ("I imagine zooming in on the image; the sign becomes clear", []),
        ("the first image, image 1", []),
        ("a crop of wheat behind the croppers, thumbnails, grounds truth", []),
        ("It is the last. Image of a ship", []),
        ("", []),
    ],
)
def test_phrases_are_found_with_word_boundaries_and_nothing_else(text, found):
    report = find_leaks(text)
    assert [span.text for span in report.spans] == found
    assert report.count == len(found)
    assert all(text[span.start : span.end] == span.text and span.kind == "phrase" for span in report.spans)


def test_users_phrases_extend_the_lexicon():
    assert find_leaks("see panel B").count == 0
    assert [span.text for span in find_leaks("see Panel-B", phrases=("panel b",)).spans] == ["Panel-B"]


def test_what_the_students_own_prompt_says_or_shows_is_no_leak():
    assert find_leaks("the ground truth is 3", student_text="What does the ground truth label say?").count == 0
    assert find_leaks("the second image is darker", student_images=2).count == 0
    assert find_leaks("the third image is darker", student_images=2).count == 1


def test_ngrams_of_the_teachers_text_alone_are_leaks():
    student = "user: Which number is on the boat? Answer in tags."
    teacher = "user: Which number is on the boat? Answer in tags. The boat near the left pier carries it."
    copied = "I see the boat near the LEFT pier. Which number is on the boat? 7"
    report = find_leaks(copied, teacher, student)
    assert [(span.text, span.kind) for span in report.spans] == [("the boat near the LEFT pier", "ngram")]
    assert find_leaks(copied, teacher, student, ngram=0).count == 0
    assert find_leaks(copied, teacher, student, ngram=7).count == 0
    assert ("the", "boat", "near", "the") in collect_private_ngrams(teacher, student, 4)
    assert ("which", "number", "is", "on") not in collect_private_ngrams(teacher, student, 4)


def test_leaked_characters_become_leaked_tokens():
    pieces = ["It", " is in", " the sec", "ond", " image", ".", " Done"]
    decode = lambda ids: "".join(pieces[i] for i in ids)  # noqa: E731
    ids = list(range(len(pieces)))
    spans = find_leaks(decode(ids)).spans
    assert [span.text for span in spans] == ["second image"]
    assert mask_leaks(ids, spans, decode) == [False, False, True, True, True, False, False]
    assert mask_leaks(ids, (), decode) == [False] * 7


def test_token_mask_equals_the_characters_overlap_at_every_cut():
    text = "so the zoomed view and image 3, the ground truth"
    spans = find_leaks(text).spans
    assert len(spans) == 3
    for size in (1, 2, 3, 5, 11):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]

        def decode(ids, pieces=pieces):
            return "".join(pieces[i] for i in ids)

        expected = [any(s.start < (i + 1) * size and s.end > i * size for s in spans) for i in range(len(pieces))]
        assert mask_leaks(range(len(pieces)), spans, decode) == expected


def test_a_number_of_thousands_of_digits_is_no_image():
    assert find_leaks("image " + "1" * 5000).spans == ()


def test_unlikelihood_is_minus_log_of_the_rest_with_a_floor():
    p_N = torch.tensor([0.5, 0.9, 1e-9, 1.0], dtype=torch.float64)
    logprob_N = p_N.log().requires_grad_()
    weight_N = torch.tensor([0.1, 0.1, 0.1, 0.2], dtype=torch.float64)
    loss_N = unlikelihood(logprob_N, weight_N)
    expected = [0.1 * math.log(2), -0.1 * math.log(0.1), 1e-10, -0.2 * math.log(1e-6)]
    torch.testing.assert_close(loss_N, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-15)
    loss_N.sum().backward()
    # d/d log p of -w log(1 - p) = w p / (1 - p): pushes the leaked token down; none at the floor
    torch.testing.assert_close(logprob_N.grad[:2], torch.tensor([0.1, 0.9], dtype=torch.float64))
    assert float(logprob_N.grad[3]) == 0.0


def test_unlikelihood_in_fp32_is_finite_at_certainty():
    loss_N = unlikelihood(torch.tensor([0.0, 1e-7]), torch.ones(2))
    torch.testing.assert_close(loss_N, torch.full((2,), -math.log(1e-6)), rtol=1e-3, atol=0)
