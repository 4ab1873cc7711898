"""The cases of the step bench: names in; random-weight Qwen3-VL models, their processors and rows of pictures out.

Everything is made on the spot from fixed seeds, so that two processes that build a case hold the same weights, files
and rows, and nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from imagine_opd.config.privilege import IMAGINE_INSTRUCTION, TEACHER_INSTRUCTION
from imagine_opd.types import Box, Row

QWEN_VOCABULARY = 151_936
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
QUESTION = "What is written on the small sign to the left of the door ?"

# Left, top, width, height as shares of the picture; of a 12 MP picture 0.3, 0.15, 0.8 and 0.2 MP.
BOX_SHARES = (
    (0.10, 0.15, 0.161, 0.155),
    (0.55, 0.50, 0.109, 0.114),
    (0.60, 0.45, 0.259, 0.255),
    (0.30, 0.70, 0.130, 0.128),
)
DISTINCT_BATCHES = 2
"""Pictures are drawn for so many batches, which then come again: drawing takes longer than a step."""


@dataclass(frozen=True)
class StepCase:
    """One optimizer step: which model, how much data, what is trained."""

    name: str
    text: dict[str, Any]
    vision: dict[str, Any]
    dtype: str
    rows: int
    """Of one optimizer step."""
    micro_rows: int
    """Of one forward and backward; a step has rows / micro_rows of them."""
    crops: int
    new_tokens: int
    max_pixels: int
    picture: tuple[int, int]
    """Width and height of the files."""
    vocabulary: int = QWEN_VOCABULARY
    trains: str = "full"
    """`full`: all weights of the language model; `lora`: an adapter on it. The vision tower is frozen in both."""
    views: str = "crops"
    """`crops`: the teacher also sees the boxes' crops; `same`: it sees what the student sees."""
    cache: str = "dynamic"
    """Of `generate`, for every peer: `dynamic`, or `static`, which transformers compiles on a GPU."""
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-6
    weight_std: float = 0.02

    @property
    def accumulation(self) -> int:
        return self.rows // self.micro_rows


_HEAD_64, _HEAD_128 = [12, 10, 10], [24, 20, 20]

CASES = {
    case.name: case
    for case in (
        StepCase(
            name="cpu",
            text={
                "hidden_size": 256,
                "intermediate_size": 768,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 64,
            },
            vision={
                "depth": 4,
                "hidden_size": 256,
                "intermediate_size": 1024,
                "num_heads": 4,
                "deepstack_visual_indexes": [1, 2],
            },
            dtype="float32",
            rows=4,
            micro_rows=4,
            crops=3,
            new_tokens=32,
            max_pixels=384 * 384,
            picture=(1920, 1080),
            weight_std=0.05,
        ),
        StepCase(
            name="gpu",
            text={
                "hidden_size": 2560,
                "intermediate_size": 9728,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
            },
            vision={
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_heads": 16,
                "deepstack_visual_indexes": [5, 11, 17],
            },
            dtype="bfloat16",
            rows=8,
            micro_rows=8,
            crops=3,
            new_tokens=64,  # at 256 a step of ours takes 24 s, 23 of them in `generate`, and no case ends in its time
            max_pixels=1024 * 1024,
            picture=(4032, 3024),
            gradient_checkpointing=True,
        ),
        StepCase(
            name="tiny",
            text={
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 64,
            },
            vision={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "deepstack_visual_indexes": [0],
            },
            dtype="float32",
            rows=2,
            micro_rows=2,
            crops=2,
            new_tokens=4,
            max_pixels=128 * 128,
            picture=(480, 270),
            vocabulary=2048,
            weight_std=0.1,
        ),
    )
}


def make_case(name: str, **changes: Any) -> StepCase:
    """A case of the table with some of its fields changed."""
    return make_case_of(CASES[name], **changes)


def make_case_of(case: StepCase, **changes: Any) -> StepCase:
    """A case with some of its fields changed."""
    return dataclasses.replace(case, **changes)


@lru_cache(maxsize=4)
def build_tokenizer(vocabulary: int) -> Any:
    """A small BPE filled up with words that no text holds, so that every id of the model's vocabulary is one."""
    small = Tokenizer(models.BPE())
    small.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    small.train_from_iterator([IMAGINE_INSTRUCTION, TEACHER_INSTRUCTION, QUESTION, "user\n assistant\n"], trainer)
    learnt = json.loads(small.to_str())["model"]
    words = dict(learnt["vocab"])
    for number in range(vocabulary - len(words) - len(SPECIAL)):
        words[f"Ġw{number}"] = len(words)
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in learnt["merges"]]
    backend = Tokenizer(models.BPE(vocab=words, merges=merges))
    backend.pre_tokenizer = small.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *SPECIAL[3:]],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else %}{{- part.text }}{%- endif %}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def build_processor(case: StepCase) -> Any:
    """The real Qwen3-VL processor with the case's budget of pixels."""
    pixels = {
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 64 * 64, "longest_edge": case.max_pixels},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**pixels),
        tokenizer=build_tokenizer(case.vocabulary),
        video_processor=transformers.Qwen3VLVideoProcessor(**pixels),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(case: StepCase, processor: Any, device: torch.device) -> Any:
    """Random weights of the case's seed, made in place on the device; sdpa attention; no end token of its own."""
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    sections = _HEAD_64 if case.text["head_dim"] == 64 else _HEAD_128
    config = transformers.Qwen3VLConfig(
        vision_config={
            **case.vision,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": case.text["hidden_size"],
            "num_position_embeddings": 48**2,
            "initializer_range": case.weight_std,
        },
        text_config={
            **case.text,
            "vocab_size": case.vocabulary,
            "max_position_embeddings": 32_768,
            "initializer_range": case.weight_std,
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": sections,
                "mrope_interleaved": True,
            },
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, case.dtype))
    try:
        with device:
            model = transformers.Qwen3VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config = transformers.GenerationConfig(pad_token_id=ids["<|endoftext|>"])
    for parameter in model.model.visual.parameters():
        parameter.requires_grad_(False)
    return add_adapter(model) if case.trains == "lora" else model


def add_adapter(model: Any) -> Any:
    """LoRA of rank 16 on the language model, as a run that has begun: neither of its matrices is 0."""
    import peft

    # One module name in a layer, never the vision tower's.
    names = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    torch.manual_seed(1)
    with warnings.catch_warnings():
        # Peft asks transformers for a setting by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=names))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return adapted


def make_rows(case: StepCase, folder: Path, batches: int) -> list[Row]:
    """Rows for so many optimizer steps; each picture has the case's boxes."""
    folder.mkdir(parents=True, exist_ok=True)
    count = case.rows * min(batches, DISTINCT_BATCHES)
    paths = [folder / f"{case.picture[0]}x{case.picture[1]}-{number}.jpeg" for number in range(count)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda item: _write_picture(item[1], case.picture, item[0]), enumerate(paths)))
    boxes = tuple(Box(*box) for box in place_boxes(case))
    return [
        Row(images=(paths[number % count],), question=QUESTION, boxes=boxes, id=str(number))
        for number in range(case.rows * batches)
    ]


def place_boxes(case: StepCase) -> list[tuple[int, int, int, int]]:
    """The case's boxes in whole pixels of its pictures."""
    width, height = case.picture
    boxes = []
    for left, top, wide, high in BOX_SHARES[: case.crops]:
        x0, y0 = int(left * width), int(top * height)
        boxes.append((x0, y0, x0 + int(wide * width) | 1, y0 + int(high * height) | 1))
    return boxes


def _write_picture(path: Path, size: tuple[int, int], number: int) -> None:
    if path.exists():
        return
    draw_picture(size, number).save(path.with_suffix(".part"), "JPEG", quality=90, subsampling="4:2:0")
    path.with_suffix(".part").rename(path)


def draw_picture(size: tuple[int, int], number: int) -> Image.Image:
    """Shapes of three sizes in colour and a sensor's grain: about as many bits a pixel as a camera's JPEG."""
    random = np.random.default_rng(number)
    total = np.zeros((size[1], size[0], 3), dtype=np.float32)
    for cells, strength in ((6, 60.0), (40, 30.0), (240, 12.0)):
        shape = (max(1, cells * size[1] // size[0]), cells, 3)
        coarse = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
        fine = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        total += (fine - 128.0) * np.float32(strength / 128.0)
    grain = random.standard_normal((size[1], size[0], 1), dtype=np.float32) * np.float32(3.2)
    return Image.fromarray(np.clip(total + 128.0 + grain, 0, 255).astype(np.uint8))
