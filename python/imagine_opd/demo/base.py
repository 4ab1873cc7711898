"""Pretraining of the tiny base: it reads large digits in the image, and small ones only in a crop or in words.

That is the gap Imagine-OPD closes: the same weights answer with the evidence and fail without. Two stages:
1. Alignment. The visual token of a cell is pulled towards the words for its place, colour, shape and digit (cosine).
   Without it, naming a shape in the question and finding it in the image stay apart for thousands of steps.
2. Questions. Large digits in the whole image, small digits with their crop or with a hint in words, and captions,
   which teach the binding of colour, shape and digit. A small digit never appears in a prompt without crop or hint.

`python -m imagine_opd.demo.base --output DIR` reproduces the shipped folder in about three minutes on one idle core.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from imagine_opd.config import RECIPE_FILE
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.demo.scenes import (
    CAPTION_QUESTION,
    COLORS,
    LISTING_QUESTION,
    PLACES,
    SHAPES,
    Glyphs,
    Pixels,
    Scene,
    SceneObject,
    decode_scene,
    make_scenes,
)
from imagine_opd.demo.tiny import CROP_PX, GLOBAL_PX, build_model, build_processor
from imagine_opd.types import Box

# S scenes, O objects in each, B rows, L tokens, P patches of an image, F features of a patch, D hidden, V words

_IGNORED = -100
_COSINE_SCALE = 16.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps, rates and sizes of the pretraining; the defaults are the shipped checkpoint's."""

    large_scenes: int = 5000
    small_scenes: int = 2000
    align_steps: int = 150
    align_rate: float = 3e-3
    question_steps: int = 800
    question_rate: float = 1.2e-3
    large_rows: int = 20
    crop_rows: int = 4
    hint_rows: int = 3
    caption_rows: int = 6
    report_every: int = 100


@dataclass(frozen=True, slots=True)
class Bank:
    """Scenes with their pixels ready: global patches `[S, P, F]` and a crop of every object `[S, O, P, F]`, uint8."""

    scenes: list[Scene]
    global_SPF: torch.Tensor
    crop_SOPF: torch.Tensor


def build_bank(count: int, seed: int, glyphs: Glyphs, processor: Any) -> Bank:
    """Draw scenes and cut them into patches with the real image processor."""
    scenes = make_scenes(count, seed, glyphs)
    global_chunks, crop_chunks = [], []
    for start in range(0, count, 256):
        chunk = scenes[start : start + 256]
        pictures = [decode_scene(scene.image) for scene in chunk]
        crops = [
            cut_crop(picture, item.box)
            for picture, scene in zip(pictures, chunk, strict=True)
            for item in scene.objects
        ]
        global_chunks.append(_cut_patches(pictures, GLOBAL_PX, processor))
        crop_PF = _cut_patches(crops, CROP_PX, processor)
        crop_chunks.append(crop_PF.view(len(chunk), -1, *crop_PF.shape[1:]))
    return Bank(scenes, torch.cat(global_chunks), torch.cat(crop_chunks))


def cut_crop(picture_HWC: Pixels, box: Box) -> Pixels:
    """The 32x32 pixels around a digit's box: what `TINY_VIEWS` makes of it."""
    x0 = int(box.x0 + box.x1) // 2 - CROP_PX // 2
    y0 = int(box.y0 + box.y1) // 2 - CROP_PX // 2
    return picture_HWC[y0 : y0 + CROP_PX, x0 : x0 + CROP_PX]


def _cut_patches(pictures: Sequence[Pixels], side_px: int, processor: Any) -> torch.Tensor:
    size = {"shortest_edge": side_px**2, "longest_edge": side_px**2}
    patches = processor.image_processor(list(pictures), size=size, return_tensors="pt")["pixel_values"]
    levels: torch.Tensor = ((patches + 1) * 127.5).round().to(torch.uint8)
    return levels.view(len(pictures), -1, patches.shape[1])


class PromptBook:
    """Token ids of prompts and responses, each distinct text encoded once."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._ids: dict[tuple[str, int], list[int]] = {}

    def prompt(self, question: str, grids: Sequence[int]) -> list[int]:
        """A prompt with one image per entry of `grids`, the tokens on each one's side."""
        return self._look_up(question, sum(grids) + 1, lambda: self._render_prompt(question, grids))

    def response(self, text: str) -> list[int]:
        """A response and its end token."""
        return self._look_up(text, 0, lambda: text + " <|im_end|>")

    def _look_up(self, text: str, kind: int, render: Callable[[], str]) -> list[int]:
        if (text, kind) not in self._ids:
            self._ids[text, kind] = self.processor.tokenizer(render(), add_special_tokens=False)["input_ids"]
        return self._ids[text, kind]

    def _render_prompt(self, question: str, grids: Sequence[int]) -> str:
        content = [{"type": "image"}] * len(grids) + [{"type": "text", "text": question}]
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pieces = text.split("<|image_pad|>")
        expanded = pieces[0]
        for side, piece in zip(grids, pieces[1:], strict=True):
            expanded += "<|image_pad|>" * side**2 + piece
        return expanded


def build_inputs(
    model: Any, prompts: list[list[int]], responses: list[list[int]], images: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Model inputs of rows whose prompts have the same length and images. `images`: one `[B, P, F]` per image slot.

    Responses are padded on the right, where causal attention keeps the padding out of sight.
    """
    end = model.config.text_config.pad_token_id
    longest = max(len(response) for response in responses)
    ids_BL = torch.tensor(
        [
            prompt + response + [end] * (longest - len(response))
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    )
    labels_BL = ids_BL.clone()
    labels_BL[:, : len(prompts[0])] = _IGNORED
    for row, response in enumerate(responses):
        labels_BL[row, len(prompts[0]) + len(response) :] = _IGNORED
    sides = [math.isqrt(image_BPF.shape[1]) for image_BPF in images]
    pixels = torch.cat([torch.cat([image[row] for image in images]) for row in range(len(prompts))])
    grid = torch.tensor([[1, side, side] for side in sides])
    types_1L = (ids_BL[:1] == model.config.image_token_id).int()
    # Every row has the same layout, so the positions of the first one serve all.
    positions, _ = model.model.get_rope_index(ids_BL[:1], types_1L, image_grid_thw=grid)
    return {
        "input_ids": ids_BL,
        "labels": labels_BL,
        "position_ids": positions.expand(-1, len(prompts), -1),
        "mm_token_type_ids": types_1L.expand(len(prompts), -1),
        "pixel_values": to_pixel_values(pixels),
        "image_grid_thw": grid.repeat(len(prompts), 1),
    }


def to_pixel_values(levels: torch.Tensor) -> torch.Tensor:
    """Levels 0 to 255 as the model takes them, -1 to 1."""
    return levels.float() / 127.5 - 1


def train_base(recipe: Recipe, seed: int, report: Callable[[str], None] = print) -> tuple[Any, Any, list[float]]:
    """Both stages. Returns the model (fp32), the processor and the loss of every question step."""
    start = time.perf_counter()
    processor = build_processor()
    model = build_model(processor.tokenizer, seed)
    large = build_bank(recipe.large_scenes, 2 * seed + 1_000_000, "large", processor)
    small = build_bank(recipe.small_scenes, 2 * seed + 1_000_001, "small", processor)
    report(f"{len(large.scenes)} large and {len(small.scenes)} small scenes, {_minutes(start)}")
    rng = np.random.RandomState(seed)
    align_words(model, processor, large, small, recipe, rng, report)
    report(f"alignment done, {_minutes(start)}")
    losses = train_questions(model, processor, large, small, recipe, rng, report)
    report(f"questions done, {_minutes(start)}")
    return model, processor, losses


def align_words(
    model: Any,
    processor: Any,
    large: Bank,
    small: Bank,
    recipe: Recipe,
    rng: np.random.RandomState,
    report: Callable[[str], None],
) -> None:
    """Stage 1: the vision tower and the word embeddings only."""
    words = {
        name: torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(choices)))
        for name, choices in {
            "place": PLACES,
            "color": tuple(COLORS),
            "shape": SHAPES,
            "digit": tuple("0123456789"),
        }.items()
    }
    embeddings = model.get_input_embeddings()
    parameters = [*model.model.visual.parameters(), *embeddings.parameters()]
    optimizer, schedule = _build_optimizer(parameters, recipe.align_rate, recipe.align_steps)
    for step in range(recipe.align_steps):
        shown = rng.randint(len(large.scenes), size=32).tolist()
        scenes = [large.scenes[index] for index in shown]
        hidden_BPD = _see(model, large.global_SPF[shown])
        # One visual token is one cell, in raster order.
        cells = torch.tensor([[3 * item.row + item.column for item in scene.objects] for scene in scenes])
        hidden_ND = hidden_BPD.gather(1, cells[:, :, None].expand(-1, -1, hidden_BPD.shape[2])).flatten(0, 1)
        items = [item for scene in scenes for item in scene.objects]
        losses = [_align(hidden_ND, embeddings(words[name]), _find_labels(items, name)) for name in words]
        picks, objects = _pick_objects(rng, small, 32)
        hidden_BD = _see(model, small.crop_SOPF[picks, objects]).mean(dim=1)
        cropped = [small.scenes[scene].objects[item] for scene, item in zip(picks, objects, strict=True)]
        losses.append(_align(hidden_BD, embeddings(words["digit"]), _find_labels(cropped, "digit")))
        loss = torch.stack(losses).mean()
        _step(loss, parameters, optimizer, schedule)
        if (step + 1) % recipe.report_every == 0 or step + 1 == recipe.align_steps:
            parts = ", ".join(f"{name} {part:.2f}" for name, part in zip([*words, "crop"], losses, strict=True))
            report(f"alignment {step + 1}/{recipe.align_steps}: loss {loss:.3f} ({parts})")


def train_questions(
    model: Any,
    processor: Any,
    large: Bank,
    small: Bank,
    recipe: Recipe,
    rng: np.random.RandomState,
    report: Callable[[str], None],
) -> list[float]:
    """Stage 2: all weights, on large digits, small ones with crop or hint, and captions. Returns the losses."""
    book = PromptBook(processor)
    parameters = list(model.parameters())
    optimizer, schedule = _build_optimizer(parameters, recipe.question_rate, recipe.question_steps)
    # Places in order, then their shapes; and shapes in any order, then their places. The second is one half of
    # answering a question (from the name to the place), learned where each step of it is a target of its own.
    captions: list[tuple[str, Callable[[Scene], str]]] = [
        (CAPTION_QUESTION, lambda scene: scene.caption),
        (LISTING_QUESTION, lambda scene: scene.list_objects(rng.permutation(len(scene.objects)).tolist())),
    ]
    history: list[float] = []
    start = time.perf_counter()
    for step in range(recipe.question_steps):
        picks, objects = _pick_objects(rng, large, recipe.large_rows)
        asked = [large.scenes[scene].objects[item] for scene, item in zip(picks, objects, strict=True)]
        groups = [_question_rows(model, book, asked, [large.global_SPF[picks]])]
        picks, objects = _pick_objects(rng, small, recipe.crop_rows)
        asked = [small.scenes[scene].objects[item] for scene, item in zip(picks, objects, strict=True)]
        groups.append(_question_rows(model, book, asked, [small.global_SPF[picks], small.crop_SOPF[picks, objects]]))
        picks, objects = _pick_objects(rng, small, recipe.hint_rows)
        asked = [small.scenes[scene].objects[item] for scene, item in zip(picks, objects, strict=True)]
        groups.append(_question_rows(model, book, asked, [small.global_SPF[picks]], hinted=True))
        for question, describe in captions:
            picks = rng.randint(len(large.scenes), size=recipe.caption_rows).tolist()
            responses = [book.response(describe(large.scenes[index])) for index in picks]
            prompts = [book.prompt(question, (3,))] * len(picks)
            groups.append(build_inputs(model, prompts, responses, [large.global_SPF[picks]]))
        losses = [model(**group, use_cache=False).loss for group in groups]
        tokens = [int((group["labels"] != _IGNORED).sum()) for group in groups]
        loss = torch.stack([part * count for part, count in zip(losses, tokens, strict=True)]).sum() / sum(tokens)
        _step(loss, parameters, optimizer, schedule)
        history.append(loss.item())
        if (step + 1) % recipe.report_every == 0 or step + 1 == recipe.question_steps:
            parts = ", ".join(
                f"{name} {part:.3f}"
                for name, part in zip(("large", "crop", "hint", "caption", "listing"), losses, strict=True)
            )
            report(f"questions {step + 1}/{recipe.question_steps}: loss {history[-1]:.3f} ({parts}), {_minutes(start)}")
    return history


def save_base(model: Any, processor: Any, folder: Path) -> None:
    """Write the folder in bf16 (half the size, the same answers), with the recipe it is to be asked by."""
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    Path(folder, RECIPE_FILE).write_text(json.dumps(TINY_RECIPE, indent=2) + "\n", encoding="utf-8")


def _question_rows(
    model: Any, book: PromptBook, asked: list[SceneObject], images: list[torch.Tensor], hinted: bool = False
) -> dict[str, torch.Tensor]:
    sides = [math.isqrt(image_BPF.shape[1]) // 2 for image_BPF in images]
    questions = [f"what digit is on the {item.color} {item.shape} ?" for item in asked]
    if hinted:
        questions = [f"{question} {item.caption}" for question, item in zip(questions, asked, strict=True)]
    prompts = [book.prompt(question, sides) for question in questions]
    responses = [
        book.response(f"look at {item.place} . zoom . i see {item.digit} . <answer> {item.digit} </answer>")
        for item in asked
    ]
    return build_inputs(model, prompts, responses, images)


def _see(model: Any, levels_BPF: torch.Tensor) -> torch.Tensor:
    """Visual tokens `[B, P / 4, D]` of equally sized images."""
    side = math.isqrt(levels_BPF.shape[1])
    grid = torch.tensor([[1, side, side]] * len(levels_BPF))
    hidden: torch.Tensor = model.model.visual(to_pixel_values(levels_BPF.flatten(0, 1)), grid_thw=grid).pooler_output
    return hidden.view(len(levels_BPF), -1, hidden.shape[-1])


def _align(hidden_ND: torch.Tensor, words_VD: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    logits_NV = _COSINE_SCALE * F.normalize(hidden_ND, dim=1) @ F.normalize(words_VD, dim=1).T
    return F.cross_entropy(logits_NV, labels_N)


def _find_labels(items: list[SceneObject], name: str) -> torch.Tensor:
    find: dict[str, Callable[[SceneObject], int]] = {
        "place": lambda item: 3 * item.row + item.column,
        "color": lambda item: list(COLORS).index(item.color),
        "shape": lambda item: SHAPES.index(item.shape),
        "digit": lambda item: item.digit,
    }
    return torch.tensor([find[name](item) for item in items])


def _pick_objects(rng: np.random.RandomState, bank: Bank, count: int) -> tuple[list[int], list[int]]:
    scenes = rng.randint(len(bank.scenes), size=count)
    objects = rng.randint(bank.crop_SOPF.shape[1], size=count)
    return scenes.tolist(), objects.tolist()


def _build_optimizer(parameters: list[Any], rate: float, steps: int) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = min(50, steps // 5)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def _step(loss: torch.Tensor, parameters: list[Any], optimizer: Any, schedule: Any) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


def _minutes(start: float) -> str:
    return f"{(time.perf_counter() - start) / 60:.1f} min"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: train, report, save."""
    parser = argparse.ArgumentParser(prog="python -m imagine_opd.demo.base", description=train_base.__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint to write")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the scenes and their order")
    shipped = Recipe()
    parser.add_argument("--align-steps", type=int, default=shipped.align_steps)
    parser.add_argument("--question-steps", type=int, default=shipped.question_steps)
    parser.add_argument("--large-scenes", type=int, default=shipped.large_scenes)
    parser.add_argument("--small-scenes", type=int, default=shipped.small_scenes)
    options = parser.parse_args(arguments)
    recipe = Recipe(
        large_scenes=options.large_scenes,
        small_scenes=options.small_scenes,
        align_steps=options.align_steps,
        question_steps=options.question_steps,
    )
    torch.set_num_threads(1)  # more do not pay at this size, and sums in another order give other weights
    model, processor, losses = train_base(recipe, options.seed)
    save_base(model, processor, options.output)
    print(f"saved in {options.output}; last loss {losses[-1]:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
