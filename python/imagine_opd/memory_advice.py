"""Out of memory, in a micro-batch or beside it: error and facts in, a sentence with numbers and advice out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from imagine_opd.errors import DeviceMemoryError
from imagine_opd.types import Prompt

_GIB = 2**30
_CPU_REFUSAL = re.compile(r"DefaultCPUAllocator|can't allocate memory|not enough memory", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class MicroBatchFacts:
    """What a micro-batch asked of the device, in tokens; sequences are prompt and completion.

    tokens: of the largest forward of several sequences, as `max_tokens_per_forward` counts them; 0: none has several.
    """

    completions: int
    rows: int
    longest_student: int
    longest_teacher: int
    image_tokens_student: int
    image_tokens_teacher: int
    longest_completion: int
    tokens: int


@dataclass(frozen=True, slots=True)
class PassFacts:
    """What a pass without gradient asked of the device: `prompts` at once, tokens of the longest of them, of the most
    images, and the cap of a completion. name: of the pass, as a sentence has it: `the rollout`."""

    name: str
    prompts: int
    longest: int
    image_tokens: int
    max_completion_length: int


@contextmanager
def explained_memory(explain: Callable[[BaseException], str]) -> Iterator[None]:
    """Memory that runs out inside becomes a `DeviceMemoryError` with `explain`'s text, once; other errors go on."""
    try:
        yield
    except DeviceMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(explain(error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on an accelerator or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _CPU_REFUSAL.search(str(error)) is not None


def read_facts(batch: Any, *, packed: bool) -> MicroBatchFacts:
    """The facts of a `batches.MicroBatch`, run without padding where it is `packed`. Image tokens are those of the
    completion with the most."""
    lengths = batch.rollouts.completion_mask_BT.sum(dim=1).tolist()

    def measure(side: str) -> list[int]:
        prompts = [getattr(pair, side) for pair in batch.prompts]
        return [len(prompt.input_ids) + n if prompt else 0 for prompt, n in zip(prompts, lengths, strict=True)]

    def count(part: Sequence[int]) -> int:
        sides = [[lengths_of_side[row] for row in part] for lengths_of_side in (student, teacher, neutral)]
        return max(sum(side) if packed else len(side) * max(side) for side in sides)

    def image_tokens(side: str) -> int:
        return max((sum(getattr(pair, side).image_tokens) for pair in batch.prompts), default=0)

    student, teacher, neutral = measure("student"), measure("teacher"), measure("neutral")
    forwards = batch.parts if len(batch.parts) > 1 else (range(len(lengths)),)
    return MicroBatchFacts(
        completions=len(lengths),
        rows=len({id(row) for row in batch.rows}),
        longest_student=max(student, default=0),
        longest_teacher=max(teacher, default=0),
        image_tokens_student=image_tokens("student"),
        image_tokens_teacher=image_tokens("teacher"),
        longest_completion=int(max(lengths, default=0)),
        tokens=max((count(part) for part in forwards if len(part) > 1), default=0),
    )


def explain_out_of_memory(
    error: BaseException,
    facts: MicroBatchFacts,
    *,
    batch_size: int,
    gradient_checkpointing: bool = False,
    memory_gib: tuple[float, float] | None = None,
    plan_advice: Sequence[str] = (),
) -> str:
    """What ran out, what the micro-batch held, and what to change, the cheapest first.

    `memory_gib`: most allocated and most reserved so far. `plan_advice`: what a plan of the whole run's memory says;
    it goes before the general advice.
    """
    advice = [*plan_advice, *_list_advice(facts, batch_size, gradient_checkpointing)]
    return (
        f"out of memory in a micro-batch of {facts.completions} completions ({facts.rows} rows): longest sequence "
        f"{facts.longest_student} tokens for the student, {facts.longest_teacher} for the teacher; image tokens up to "
        f"{facts.image_tokens_student} and {facts.image_tokens_teacher}; completions up to {facts.longest_completion} "
        f"tokens.{_tell_rest(error, advice, memory_gib)}"
    )


def read_pass(
    name: str, prompts: Sequence[Prompt], max_completion_length: int, at_once: int | None = None
) -> PassFacts:
    """The facts of a pass over these prompts, `at_once` of them together (`None`: all)."""
    return PassFacts(
        name,
        min(at_once or len(prompts), len(prompts)),
        max((len(prompt.input_ids) for prompt in prompts), default=0),
        max((sum(prompt.image_tokens) for prompt in prompts), default=0),
        max_completion_length,
    )


def explain_pass(
    error: BaseException,
    facts: PassFacts,
    field: str | None,
    *,
    memory_gib: tuple[float, float] | None = None,
    plan_advice: Sequence[str] = (),
) -> str:
    """What ran out in a pass without gradient and what to change: first `field`, if there is one that says how
    many prompts go at once, then lengths and pixels, then what is held all the time."""
    advice = []
    if field is not None and facts.prompts > 1:
        advice.append(f"{field}={facts.prompts // 2} (now {facts.prompts})")
    if 4 * facts.max_completion_length > facts.longest:
        advice.append(f"max_completion_length below {facts.max_completion_length}")
    if 2 * facts.image_tokens > facts.longest:
        advice.append(f"a lower max_pixels or crop_max_pixels: images are {facts.image_tokens} of the prompt's tokens")
    advice += [*plan_advice, "LoRA (peft) with model_dtype='bfloat16', or a larger device"]
    return (
        f"out of memory in {facts.name}: {facts.prompts} prompts at once, the longest of {facts.longest} tokens, "
        f"{facts.image_tokens} of images; completions up to {facts.max_completion_length} tokens."
        f"{_tell_rest(error, advice, memory_gib)}"
    )


def read_memory_gib(device: torch.device) -> tuple[float, float] | None:
    """Most allocated and most reserved of a CUDA device so far; `None` elsewhere."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / _GIB, torch.cuda.max_memory_reserved(device) / _GIB


def _tell_rest(error: BaseException, advice: Sequence[str], memory_gib: tuple[float, float] | None) -> str:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    held = ""
    if memory_gib is not None:
        held = f" At most {memory_gib[0]:.2f} GiB were allocated and {memory_gib[1]:.2f} GiB reserved."
    numbered = " ".join(f"({number}) {item}." for number, item in enumerate(advice, 1))
    return f"{held} What to change: {numbered} The allocator said: {first_line}"


def _list_advice(facts: MicroBatchFacts, batch_size: int, gradient_checkpointing: bool) -> list[str]:
    advice = []
    if batch_size > 1:
        half = max(size for size in range(1, batch_size) if batch_size % size == 0)
        advice.append(
            f"per_device_train_batch_size={half} with gradient_accumulation_steps times {batch_size // half}: the same "
            "step in smaller parts"
        )
    if facts.tokens:
        advice.append(f"max_tokens_per_forward={facts.tokens // 2}: the same step in forwards of fewer tokens")
    if not gradient_checkpointing:
        advice.append("gradient_checkpointing=True: activations are made again in backward")
    if facts.completions > facts.rows:
        each = facts.completions // max(facts.rows, 1)
        advice.append(f"num_generations below {each}: completions of a row are forwards of their own")
    if 2 * facts.image_tokens_teacher > facts.longest_teacher:
        extra = facts.image_tokens_teacher - facts.image_tokens_student
        if extra > facts.image_tokens_student:
            advice.append(f"a lower crop_max_pixels: {extra} of the teacher's image tokens are crops")
        advice.append(f"a lower max_pixels: images are {facts.image_tokens_teacher} of the teacher's tokens")
    if 4 * facts.longest_completion > facts.longest_student:
        advice.append(f"max_completion_length below {facts.longest_completion}")
    advice.append("LoRA (peft), whose teacher is the same weights without the adapter, or a larger device")
    return advice
