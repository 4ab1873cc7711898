"""The leaks of a batch: completions and their prompts in, a mask of leaked tokens and the log's figures out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from imagine_opd.leaks.spans import find_leaks, mask_leaks
from imagine_opd.metrics import StepMetrics
from imagine_opd.types import PromptPair, Rollouts

# B completions, T completion tokens


class LeakMeter:
    """Marks leaked tokens. Logs `leak_rate`, the share of completions with a leak, and `leak_tokens`, their number."""

    def __init__(self, tokenizer: Any, metrics: StepMetrics, ngram: int, phrases: Sequence[str] | None) -> None:
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.ngram = ngram
        self.phrases = tuple(phrases or ())

    def mark(self, prompts: Sequence[PromptPair], rollouts: Rollouts) -> torch.Tensor:
        """`[B, T]` bool on the completions' device; `prompts[i]` are those of completion i."""
        leaked_BT = torch.zeros(rollouts.completion_ids_BT.shape, dtype=torch.bool)
        ids = rollouts.completion_ids_BT.tolist()
        lengths = rollouts.completion_mask_BT.sum(dim=1).tolist()
        kept = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        # No completions decode to one empty text in releases of transformers up to 5.19 at least.
        decode = self.tokenizer.batch_decode
        texts = decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False) if kept else []
        leaky = 0
        for index, (pair, text) in enumerate(zip(prompts, texts, strict=True)):
            report = find_leaks(
                text,
                pair.teacher.text,
                pair.student.text,
                ngram=self.ngram,
                phrases=self.phrases,
                student_images=len(pair.student.view.frame_counts),
            )
            if report.count:
                leaky += 1
                mask = mask_leaks(kept[index], report.spans, self._decode)
                leaked_BT[index, : len(mask)] = torch.tensor(mask)
        self.metrics.add_mean("leak_rate", float(leaky), len(texts))
        self.metrics.add_total("leak_tokens", float(leaked_BT.sum()))
        return leaked_BT.to(rollouts.completion_ids_BT.device)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
