"""Row + view to a prompt: the chat template rendered, each image placeholder expanded to its token count.

Ids are those that the model's own processor makes of the same text and images. Nothing is
ever truncated: a cut prompt would lose image tokens.
"""

from __future__ import annotations

from typing import Any

from imagine_opd.adapters import Expansion, find_adapter
from imagine_opd.errors import ConfigError, RowError
from imagine_opd.types import Prompt, Row, View

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def build_prompt(
    row: Row,
    view: View,
    processor: Any,
    template: str,
    chat_template_kwargs: dict[str, Any] | None = None,
    suffix: str = "",
) -> Prompt:
    """One side's prompt: rendered text, ids with expanded placeholders, modality ids, and the pixels they stand for."""
    adapter = find_adapter(processor)
    refuse_placeholder(row, processor, suffix)
    image_count = len(view.frame_counts)
    text_part = {"type": "text", "text": template.format(question=format_question(row)) + suffix}
    messages = [{"role": "user", "content": [{"type": "image"}] * image_count + [text_part]}]
    text = processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **(chat_template_kwargs or {})
    )
    placeholder = adapter.placeholder(processor)
    pieces = text.split(placeholder)
    if len(pieces) != image_count + 1:
        raise ConfigError(
            f"the processor's chat template placed {len(pieces) - 1} image placeholders ({placeholder!r}) "
            f"for {image_count} images; use a template with one per image"
        )
    # A run of feature tokens is one token in the text and repeated as ids: thousands of them are never tokenized.
    feature_token = adapter.feature_token(processor)
    expansions = adapter.expand(view, processor)
    runs = [part for expansion in expansions for part in expansion if isinstance(part, int)]
    compact = pieces[0]
    for expansion, piece in zip(expansions, pieces[1:], strict=True):
        compact += "".join(part if isinstance(part, str) else feature_token for part in expansion) + piece
    feature_id = processor.tokenizer.convert_tokens_to_ids(feature_token)
    compact_ids = tokenize(compact, processor.tokenizer)
    if compact_ids.count(feature_id) != len(runs):
        raise ConfigError(
            f"the tokenizer turned {len(runs)} runs of {feature_token!r} into {compact_ids.count(feature_id)} tokens; "
            "it must be one token, and stand nowhere else in the prompt"
        )
    ids: list[int] = []
    types: list[int] = []
    rest = iter(runs)
    for token in compact_ids:
        is_feature = token == feature_id
        repeats = next(rest) if is_feature else 1
        ids += [token] * repeats
        types += [int(is_feature)] * repeats
    return Prompt(
        text=text,
        input_ids=tuple(ids),
        mm_token_type_ids=tuple(types),
        view=view,
        image_tokens=tuple(sum_features(expansion) for expansion in expansions),
        family=adapter.family,
    )


def tokenize(text: str, tokenizer: Any) -> list[int]:
    """Ids of a rendered prompt: with the tokenizer's own start token, unless the template has put it there."""
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=not begins)["input_ids"]
    return ids


def refuse_placeholder(row: Row, processor: Any, *others: str) -> None:
    """Raise `RowError` when a text of the row, or one of `others`, holds a placeholder, which asks for pixels."""
    adapter = find_adapter(processor)
    names = {adapter.placeholder(processor): "image", adapter.feature_token(processor): "image"}
    if getattr(processor, "video_token", None) is not None:
        names[processor.video_token] = "video"
    for text in (row.question, row.answer or "", row.hint or "", *row.options, *others):
        for name, kind in names.items():
            if name in text:
                raise RowError(f"{row.source or row.id}: the text contains the {kind} placeholder {name!r}; remove it")


def format_question(row: Row) -> str:
    """The question, with its options as lettered lines where it has some."""
    if not row.options:
        return row.question
    if len(row.options) > len(_LETTERS):
        raise RowError(f"{row.source or row.id}: {len(row.options)} options; expected at most {len(_LETTERS)}")
    lines = [f"{letter}. {option}" for letter, option in zip(_LETTERS, row.options, strict=False)]
    return "\n".join([row.question, *lines])


def sum_features(expansion: Expansion) -> int:
    """Feature tokens of one image."""
    return sum(part for part in expansion if isinstance(part, int))
