"""Token classes by what the tokens say, whatever the tokenizer's cuts; KL figures against sums by hand."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from imagine_opd.metrics.step import StepMetrics
from imagine_opd.metrics.token_classes import (
    ANSWER,
    NOTHING,
    TEMPLATE,
    TRACE,
    TokenClassifier,
    classify_tokens,
    note_kl,
)

LETTERS = {ANSWER: "a", TRACE: "t", TEMPLATE: "x", NOTHING: "-"}


def make_bytes_tokenizer(merged: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with some whole pieces, as BPE would cut them, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(["<end>", *alphabet])}
    merges: list[tuple[str, str]] = []
    for piece in merged:
        built = piece[0]
        for character in piece[1:]:
            if (built, character) not in merges:
                merges.append((built, character))
            built += character
            vocabulary.setdefault(built, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", clean_up_tokenization_spaces=False)


def read_classes(tokenizer, text: str) -> tuple[list[str], str]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    classes = TokenClassifier(tokenizer).classify_one(ids)
    return [tokenizer.decode([token]) for token in ids], "".join(LETTERS[kind] for kind in classes)


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("see<answer>C</answer><end>", "ttt" + "x" * 8 + "a" + "x" * 9 + "x"),
        ("é<answer> 12 </answer>", "tt" + "x" * 8 + "xaax" + "x" * 9),
        ("<answer>no", "x" * 8 + "aa"),
        ("no tags", "ttttttt"),
        ("<answer>A</answer><answer>B", "x" * 8 + "t" + "x" * 9 + "x" * 8 + "a"),
        ("<ANSWER>A</ANSWER>", "x" * 8 + "a" + "x" * 9),
        ("</answer>", "x" * 9),
        ("\u0130\u0130<answer>7</answer>", "tttt" + "x" * 8 + "a" + "x" * 9),  # longer in lower case
        ("<answer></answer>.", "x" * 17 + "t"),
    ],
)
def test_each_byte_has_the_class_of_its_place(text, classes):
    assert read_classes(make_bytes_tokenizer(), text)[1] == classes


def test_a_token_across_tag_and_answer_is_part_of_the_answer():
    pieces, classes = read_classes(make_bytes_tokenizer((">C</", "answer")), "ok<answer>C</answer>")
    assert pieces == ["o", "k", "<", "answer", ">C</", "answer", ">"]
    assert classes == "ttxxaxx"


def test_tiny_worlds_trace_and_padding_are_told_apart(tiny):
    tokenizer = tiny.processor.tokenizer
    ids = tokenizer("look at left . <answer> 7 </answer> <|im_end|>", add_special_tokens=False)["input_ids"]
    ids_BT = torch.tensor([[*ids, tokenizer.pad_token_id]])
    mask_BT = torch.tensor([[True] * len(ids) + [False]])
    assert "".join(LETTERS[int(kind)] for kind in classify_tokens(ids_BT, mask_BT, tiny.processor)[0]) == "ttttxaxx-"


def test_kl_figures_are_the_means_of_their_tokens():
    metrics = StepMetrics()
    kl_N = torch.tensor([4.0, 1.0, 2.0, 3.0, 0.0, 10.0])
    classes_N = torch.tensor([TRACE, TRACE, ANSWER, TEMPLATE, TRACE, ANSWER], dtype=torch.uint8)
    position_N = torch.tensor([0, 1, 2, 3, 0, 20])  # two completions: four tokens, and 21 of which two count
    length_N = torch.tensor([4, 4, 4, 4, 21, 21])
    note_kl(metrics, kl_N, classes_N, position_N, length_N)
    assert metrics.drain() == pytest.approx(
        {
            "kl/trace": 5 / 3,
            "kl/answer": 6.0,
            "kl/template": 3.0,
            "kl/quarter_1": 2.0,
            "kl/quarter_2": 1.0,
            "kl/quarter_3": 2.0,
            "kl/quarter_4": 6.5,
            "kl/position_0": 2.0,
            "kl/position_1_3": 2.0,
            "kl/position_16_63": 10.0,
            "kl/top5_share": 0.5,
        }
    )


def test_shares_and_means_add_up_over_micro_batches():
    generator = torch.Generator().manual_seed(1)
    kl_N = torch.rand(100, generator=generator)
    classes_N = torch.randint(1, 4, (100,), generator=generator)
    position_N, length_N = torch.arange(100), torch.full((100,), 100)
    parts, whole = StepMetrics(), StepMetrics()
    for part in (slice(0, 40), slice(40, 100)):
        note_kl(parts, kl_N[part], classes_N[part], position_N[part], length_N[part])
    note_kl(whole, kl_N, classes_N, position_N, length_N)
    split, joined = parts.drain(), whole.drain()
    assert joined["kl/top5_share"] == pytest.approx(float(kl_N.topk(5).values.sum() / kl_N.sum()))
    top = sum(float(kl_N[part].topk(count).values.sum()) for part, count in ((slice(0, 40), 2), (slice(40, 100), 3)))
    assert split.pop("kl/top5_share") == pytest.approx(top / float(kl_N.sum()))
    joined.pop("kl/top5_share")
    assert split == pytest.approx(joined)


def test_no_token_makes_no_figure():
    metrics = StepMetrics()
    nothing = torch.zeros(0)
    note_kl(metrics, nothing, nothing, nothing, nothing)
    assert metrics.drain() == {}
