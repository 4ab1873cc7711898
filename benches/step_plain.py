"""The plain peer: one on-policy distillation step of Hugging Face's own parts, as a user would write it.

The processor makes each view, `generate` samples, both forwards give logits, `F.kl_div` compares them over the
vocabulary, and AdamW steps. Nothing is wasted on purpose: an image is opened once a row, the teacher runs without
gradient, the optimizer is the fused one, and generation takes the case's cache.
"""

# B rows, L prompt tokens, T completion tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from benches.step_cases import StepCase, place_boxes
from imagine_opd.config.privilege import IMAGINE_INSTRUCTION, TEACHER_INSTRUCTION
from imagine_opd.types import Row

Stage = Callable[[str], AbstractContextManager[None]]


class PlainLoop:
    """`step(rows)`: one optimizer step; the mean token loss is given back.

    Args:
        teacher: a frozen copy of the model; `None`: the model without its adapter.
        keeps: `all`: logits at every position, as the model's forward gives them; `completion`: only where the loss
            is, by `logits_to_keep`.
    """

    def __init__(self, case: StepCase, model: Any, teacher: Any, processor: Any, keeps: str = "all") -> None:
        self.case, self.model, self.teacher, self.processor, self.keeps = case, model, teacher, processor, keeps
        self.device = next(model.parameters()).device
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=case.learning_rate, weight_decay=0.01, fused=True)
        if case.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.before_update: Callable[[], None] = lambda: None

    def step(
        self, rows: Sequence[Row], stage: Stage = lambda name: nullcontext(), completion_ids_BT: Any = None
    ) -> tuple[float, torch.Tensor]:
        """The loss and the completions, which are sampled unless they are given."""
        with stage("views"):
            students, teachers = self.make_inputs(rows)
        if completion_ids_BT is None:
            with stage("rollout"):
                completion_ids_BT = self.generate(students)
        micro = self.case.micro_rows
        total = 0.0
        self.model.train()
        for start in range(0, len(rows), micro):
            part = slice(start // micro, start // micro + 1)
            student, teacher, ids_BT = students[part][0], teachers[part][0], completion_ids_BT[start : start + micro]
            with self.autocast():
                with stage("teacher"), torch.no_grad(), self.use_teacher() as teacher_model:
                    teacher_logits_BTV = self.score(teacher_model, teacher, ids_BT)
                with stage("student"):
                    student_logits_BTV = self.score(self.model, student, ids_BT)
                with stage("loss"):
                    loss = reverse_kl(student_logits_BTV, teacher_logits_BTV) / self.case.accumulation
            del student_logits_BTV, teacher_logits_BTV
            with stage("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        with stage("update"):
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.before_update()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return total, completion_ids_BT

    def make_inputs(self, rows: Sequence[Row]) -> tuple[list[Any], list[Any]]:
        """Model inputs of both sides, a micro-batch each."""
        boxes = place_boxes(self.case) if self.case.views == "crops" else []
        students, teachers = [], []
        for start in range(0, len(rows), self.case.micro_rows):
            part = rows[start : start + self.case.micro_rows]
            images = [Image.open(str(row.images[0])).convert("RGB") for row in part]
            shown = [[image, *(image.crop(box) for box in boxes)] for image in images]
            questions = [row.question for row in part]
            students.append(self.encode(IMAGINE_INSTRUCTION, questions, [[image] for image in images]))
            teachers.append(self.encode(TEACHER_INSTRUCTION if boxes else IMAGINE_INSTRUCTION, questions, shown))
        return students, teachers

    def encode(self, template: str, questions: Sequence[str], images: Sequence[list[Any]]) -> Any:
        """One side's prompts by the processor, padded on the left."""
        texts = [
            self.processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}] * len(shown)
                        + [{"type": "text", "text": template.format(question=question)}],
                    }
                ],
                tokenize=False,
                add_generation_prompt=True,
            )
            for question, shown in zip(questions, images, strict=True)
        ]
        return self.processor(text=texts, images=images, padding=True, return_tensors="pt").to(self.device)

    @torch.no_grad()
    def generate(self, students: Sequence[Any]) -> torch.Tensor:
        """As many new tokens as the case has; the model has no end token."""
        self.model.eval()
        found = []
        for inputs in students:
            with self.autocast():
                ids_BL = self.model.generate(
                    **inputs,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    max_new_tokens=self.case.new_tokens,
                    cache_implementation=None if self.case.cache == "dynamic" else self.case.cache,
                )
            found.append(ids_BL[:, inputs["input_ids"].shape[1] :])
        return torch.cat(found)

    def score(self, model: Any, inputs: Any, completion_ids_BT: torch.Tensor) -> torch.Tensor:
        """`[B, T, V]` logits that predict the completions."""
        completion_ids_BT = completion_ids_BT.to(self.device)
        ones_BT = torch.ones_like(completion_ids_BT)
        length = completion_ids_BT.shape[1]
        logits: torch.Tensor = model(
            **{
                **inputs,
                "input_ids": torch.cat([inputs["input_ids"], completion_ids_BT], dim=1),
                "attention_mask": torch.cat([inputs["attention_mask"], ones_BT], dim=1),
                "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], 0 * ones_BT], dim=1),
            },
            use_cache=False,
            logits_to_keep=length + 1 if self.keeps == "completion" else 0,
        ).logits
        return logits[:, -length - 1 : -1]

    def use_teacher(self) -> AbstractContextManager[Any]:
        """The frozen copy, or the model with its adapter off."""
        return nullcontext(self.teacher) if self.teacher is not None else _WithoutAdapter(self.model)

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 where the case's weights are."""
        if self.case.dtype != "bfloat16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


class _WithoutAdapter:
    def __init__(self, model: Any) -> None:
        self.model, self.context = model, model.disable_adapter()

    def __enter__(self) -> Any:
        self.context.__enter__()
        return self.model

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


def reverse_kl(student_logits_BTV: torch.Tensor, teacher_logits_BTV: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of KL(student || teacher), over the whole vocabulary in fp32."""
    student_BTV = F.log_softmax(student_logits_BTV.float(), dim=-1)
    teacher_BTV = F.log_softmax(teacher_logits_BTV.float(), dim=-1)
    return F.kl_div(teacher_BTV, student_BTV, log_target=True, reduction="none").sum(-1).mean()
