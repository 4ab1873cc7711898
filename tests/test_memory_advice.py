"""Memory that ran out becomes a sentence with the batch's numbers and advice in order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from imagine_opd.errors import DeviceMemoryError, ImagineError
from imagine_opd.memory_advice import (
    MicroBatchFacts,
    PassFacts,
    explain_out_of_memory,
    explain_pass,
    explained_memory,
    is_out_of_memory,
    read_facts,
    read_memory_gib,
)
from imagine_opd.micro_batches import count_tokens, cut_rows, measure_lengths
from imagine_opd.types import Prompt, PromptPair, Rollouts

FACTS = MicroBatchFacts(
    completions=8,
    rows=4,
    longest_student=1300,
    longest_teacher=4500,
    image_tokens_student=1000,
    image_tokens_teacher=4000,
    longest_completion=256,
    tokens=20000,
)


def test_every_kind_of_refusal_is_known_and_other_errors_are_not():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)  # a real refusal of the CPU's allocator
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(("batch_size", "parts"), [(6, (3, 2)), (5, (1, 5)), (1, None)])
def test_smaller_batches_make_the_same_step(batch_size, parts):
    text = explain_out_of_memory(MemoryError(), FACTS, batch_size=batch_size)
    advice = "per_device_train_batch_size={} with gradient_accumulation_steps times {}:"
    assert (advice.format(*parts) in text) if parts else ("per_device_train_batch_size" not in text)


def test_sentence_holds_the_numbers_and_the_advice_in_order():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines")
    text = explain_out_of_memory(
        error, FACTS, batch_size=4, memory_gib=(70.5, 77.25), plan_advice=["teacher_device=cpu saves 8.0 GiB"]
    )
    assert text.startswith(
        "out of memory in a micro-batch of 8 completions (4 rows): longest sequence 1300 tokens for the student, 4500 "
        "for the teacher; image tokens up to 1000 and 4000; completions up to 256 tokens. At most 70.50 GiB were "
        "allocated and 77.25 GiB reserved. What to change: (1) teacher_device=cpu saves 8.0 GiB. "
        "(2) per_device_train_batch_size=2 with gradient_accumulation_steps times 2"
    )
    order = ["(3) max_tokens_per_forward=10000: the same step", "(4) gradient_checkpointing=True"]
    order += ["(5) num_generations below 2", "(6) a lower crop_max_pixels: 3000"]
    places = [text.index(item) for item in [*order, "(7) a lower max_pixels: images are 4000", "(8) LoRA"]]
    assert places == sorted(places)
    assert text.endswith("The allocator said: CUDA out of memory. Tried to allocate 2.00 GiB")


def test_advice_that_cannot_help_is_not_given():
    facts = MicroBatchFacts(1, 1, 900, 950, 300, 320, 600, 0)
    text = explain_out_of_memory(MemoryError(), facts, batch_size=1, gradient_checkpointing=True)
    assert "per_device_train_batch_size" not in text
    assert "gradient_checkpointing" not in text
    assert "max_tokens_per_forward" not in text
    assert "num_generations" not in text
    assert "max_pixels" not in text
    assert "(1) max_completion_length below 600. (2) LoRA" in text
    assert text.endswith("The allocator said: MemoryError")


def prompt(length: int, images: tuple[int, ...] = ()) -> Prompt:
    return Prompt("", (1,) * length, (0,) * length, None, images, "qwen_vl")


def test_facts_are_those_of_the_longest_and_the_most():
    mask_BT = torch.tensor([[True] * 3, [True, False, False]])
    row = object()
    batch = SimpleNamespace(
        rows=(row, row),
        prompts=(
            PromptPair(prompt(10, (4,)), prompt(20, (4, 9))),
            PromptPair(prompt(11, (6,)), prompt(23, (6, 1))),
        ),
        rollouts=Rollouts(mask_BT.long(), mask_BT, torch.zeros(2, 3)),
        parts=(),
    )
    assert read_facts(batch, packed=True) == MicroBatchFacts(2, 1, 13, 24, 6, 13, 3, 47)
    assert read_facts(batch, packed=False).tokens == 48


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("parts", [(), ((0, 2), (1, 3)), ((0,), (1,), (2,), (3,))], ids=["whole", "pairs", "single"])
def test_advised_budget_is_half_of_what_the_budget_counts(packed, parts):
    mask_BT = torch.ones(4, 2, dtype=torch.bool)
    pairs = [(prompt(3), prompt(5 + 40 * row), prompt(30)) for row in range(4)]
    batch = SimpleNamespace(
        rows=tuple(range(4)),
        prompts=tuple(PromptPair(*sides) for sides in pairs),
        rollouts=Rollouts(mask_BT.long(), mask_BT, torch.zeros(4, 2)),
        parts=parts,
    )
    lengths = measure_lengths(batch)
    counted = max((count_tokens(part, lengths, packed) for part in parts or [(0, 1, 2, 3)] if len(part) > 1), default=0)
    facts = read_facts(batch, packed=packed)
    assert facts.tokens == counted
    text = explain_out_of_memory(MemoryError(), facts, batch_size=1)
    assert (f"max_tokens_per_forward={counted // 2}:" in text) if counted else ("max_tokens_per_forward" not in text)
    if parts == ():
        assert len(cut_rows(lengths, counted // 2, packed)) > 1


def test_a_pass_without_gradient_is_told_with_its_numbers_and_the_advice_in_order():
    facts = PassFacts("the rollout", 8, 1300, 1000, 512)
    text = explain_pass(
        MemoryError("nothing left"),
        facts,
        "generation_batch_size",
        memory_gib=(70.5, 77.25),
        plan_advice=["teacher_placement='cpu': 8.0 GiB leave"],
    )
    assert text == (
        "out of memory in the rollout: 8 prompts at once, the longest of 1300 tokens, 1000 of images; completions up "
        "to 512 tokens. At most 70.50 GiB were allocated and 77.25 GiB reserved. What to change: "
        "(1) generation_batch_size=4 (now 8). (2) max_completion_length below 512. (3) a lower max_pixels or "
        "crop_max_pixels: images are 1000 of the prompt's tokens. (4) teacher_placement='cpu': 8.0 GiB leave. "
        "(5) LoRA (peft) with model_dtype='bfloat16', or a larger device. The allocator said: nothing left"
    )
    short = explain_pass(MemoryError(), PassFacts("the rollout", 1, 1300, 100, 64), "generation_batch_size")
    assert "What to change: (1) LoRA" in short


def test_the_error_is_the_users_keeps_its_cause_and_is_explained_once():
    cause = MemoryError("nothing left")
    with (
        pytest.raises(DeviceMemoryError, match="inner: nothing left") as caught,
        explained_memory(lambda error: f"outer: {error}"),
        explained_memory(lambda error: f"inner: {error}"),
    ):
        raise cause
    assert str(caught.value) == "inner: nothing left"
    assert caught.value.__cause__ is cause
    assert isinstance(caught.value, ImagineError)
    assert isinstance(caught.value, MemoryError)
    assert read_memory_gib(torch.device("cpu")) is None


@pytest.mark.parametrize("other", [RuntimeError("shape mismatch"), ValueError("bad"), KeyError("x")])
def test_errors_that_are_not_of_memory_travel_on(other):
    with pytest.raises(type(other)) as caught, explained_memory(lambda error: "out of memory"):
        raise other
    assert caught.value is other
