"""Leaks of a batch on a real tokenizer: the right tokens, and figures that are shares of the batch."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from imagine_opd.evaluation import decode_completions
from imagine_opd.leaks.meter import LeakMeter
from imagine_opd.metrics.step import StepMetrics
from imagine_opd.privilege import PrivilegeConfig, build_prompts
from imagine_opd.types import PromptPair, Rollouts
from imagine_opd.views import make_views


def make_rollouts(tokenizer, texts: list[str]) -> tuple[Rollouts, list[list[str]]]:
    encoded = [tokenizer(f"{text} <|im_end|>", add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, encoded))
    ids_BT = torch.tensor([[*ids, *[tokenizer.pad_token_id] * (width - len(ids))] for ids in encoded])
    mask_BT = torch.tensor([[place < len(ids) for place in range(width)] for ids in encoded])
    return Rollouts(ids_BT, mask_BT, torch.zeros(ids_BT.shape)), [
        tokenizer.convert_ids_to_tokens(ids) for ids in encoded
    ]


@pytest.fixture
def pairs(tiny, make_rows) -> list[PromptPair]:
    rows = make_rows(3)
    config = PrivilegeConfig("{question}", "{question} i see red on the left image .")
    views = make_views(rows, tiny.view_config)
    return [build_prompts(row, view, tiny.processor, config) for row, view in zip(rows, views, strict=True)]


def test_leaked_tokens_are_marked_and_counted(tiny, pairs):
    tokenizer, metrics = tiny.processor.tokenizer, StepMetrics()
    texts = ["look at left . <answer> 7 </answer>", "i see red on the top", "look . digit zoom digit"]
    rollouts, tokens = make_rollouts(tokenizer, texts)
    leaked_BT = LeakMeter(tokenizer, metrics, 4, ["digit zoom"]).mark(pairs, rollouts)
    marked = [
        [word for word, bad in zip(row, mask, strict=False) if bad] for row, mask in zip(tokens, leaked_BT, strict=True)
    ]
    assert marked == [[], ["i", "see", "red", "on", "the"], ["digit", "zoom"]]
    assert leaked_BT.shape == rollouts.completion_ids_BT.shape
    assert metrics.drain() == {"leak_rate": pytest.approx(2 / 3), "leak_tokens": 7.0}


def test_without_ngrams_the_lexicon_alone_counts(tiny, pairs):
    rollouts, _ = make_rollouts(tiny.processor.tokenizer, ["i see red on the top"] * 3)
    assert not LeakMeter(tiny.processor.tokenizer, StepMetrics(), 0, None).mark(pairs, rollouts).any()


def test_empty_batch_and_dropped_completions_leak_nothing(tiny, pairs):
    metrics = StepMetrics()
    meter = LeakMeter(tiny.processor.tokenizer, metrics, 4, None)
    nothing = torch.zeros(0, 1)
    assert meter.mark([], Rollouts(nothing.long(), nothing.bool(), nothing)).shape == (0, 1)
    assert metrics.drain() == {"leak_tokens": 0.0}
    rollouts, _ = make_rollouts(tiny.processor.tokenizer, ["i see red on the left"] * 3)
    dropped = dataclasses.replace(rollouts, completion_mask_BT=torch.zeros_like(rollouts.completion_mask_BT))
    assert not meter.mark(pairs, dropped).any()


def test_no_completions_have_no_texts_even_where_the_tokenizer_makes_one_of_them(tiny):
    class Older:
        """As `batch_decode` was up to transformers 5.19 at least."""

        def batch_decode(self, sequences, **kwargs):
            return tiny.processor.tokenizer.batch_decode(sequences, **kwargs) if sequences else [""]

    metrics, nothing = StepMetrics(), torch.zeros(0, 1)
    rollouts = Rollouts(nothing.long(), nothing.bool(), nothing)
    assert LeakMeter(Older(), metrics, 4, None).mark([], rollouts).shape == (0, 1)
    assert decode_completions(SimpleNamespace(tokenizer=Older()), nothing.long(), nothing.bool()) == []
