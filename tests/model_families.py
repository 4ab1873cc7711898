"""A tiny random model of each real architecture, with a real processor made on the spot, for the family tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HIDDEN = 32
FRAME = 16
PATCH = 4

TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": FRAME,
    "patch_size": PATCH,
    "initializer_range": 0.15,
}
WORDS = (
    "what digit is on the red circle ? here is the original image and some crops to help you see better user\n\n\n\n"
)


@dataclass(frozen=True)
class Built:
    """One family. special: tokens that its processor's expansion puts into a prompt."""

    model: Any
    processor: Any
    special: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


def build_tokenizer(special: tuple[str, ...], kind: str, pad: str, eos: str, bos: str | None = None, **named: str):
    """A small BPE. `kind`: `"bytes"` as Qwen, Llama 3 and SmolLM have it, `"spaces"` as sentencepiece has it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, unk_token=None))
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        # A space in front of the text and after each special token, as Llama's and Mistral's tokenizers put it.
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            if kind == "prefixed"
            else [normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
        alphabet = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(special) + 40,
        initial_alphabet=alphabet,
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    if bos is not None:
        start = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, start)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        additional_special_tokens=[token for token in special if token not in (pad, eos, bos)],
        **({"extra_special_tokens": named} if named else {}),
    )


def chat_template(image: str, begin: str, end: str, reply: str) -> str:
    """As the checkpoints' templates: parts in order, one placeholder an image."""
    return (
        f"{{%- for message in messages %}}{{{{- {begin!r} }}}}"
        "{%- for part in message.content %}"
        f"{{%- if part.type == 'image' %}}{{{{- {image!r} }}}}"
        "{%- else %}{{- part.text | trim }}{%- endif %}{%- endfor %}"
        f"{{{{- {end!r} }}}}{{%- endfor %}}"
        f"{{%- if add_generation_prompt %}}{{{{- {reply!r} }}}}{{%- endif %}}"
    )


CHATML = ("<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n")
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def build_qwen(name: str) -> Built:
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL (deepstack), its MoE, Qwen3.5 (linear and full attention)."""
    vision_tokens = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    special = (*CHATML_TOKENS, *vision_tokens)
    tokenizer = build_tokenizer(special, "bytes", "<|endoftext|>", "<|im_end|>")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
    third = name.startswith("Qwen3")
    patch = 8
    vision = {"depth": 2, "num_heads": 2, "patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if name == "Qwen2VL":
        vision |= {"embed_dim": 24, "hidden_size": HIDDEN, "mlp_ratio": 2, "in_channels": 3}
    else:
        vision |= {"hidden_size": 24, "intermediate_size": 32, "out_hidden_size": HIDDEN, "initializer_range": 0.15}
    if name == "Qwen2_5_VL":
        vision |= {"fullatt_block_indexes": [1], "window_size": 32}
    if third:
        vision |= {"num_position_embeddings": 16}
    if name.startswith("Qwen3VL"):
        vision |= {"deepstack_visual_indexes": [0, 1]}
    text = {**TEXT, "vocab_size": len(tokenizer), "pad_token_id": ids["<|endoftext|>"]}
    sections = {"mrope_section": [3, 3, 2]}
    if third:
        sections["mrope_interleaved"] = True
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0, **sections}
    if name == "Qwen3_5":
        text |= {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        }
        text["rope_parameters"]["partial_rotary_factor"] = 1.0
    if name.endswith("Moe"):
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision,
        text_config=text,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    pixels = {
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 1024, "longest_edge": 2048},
    }
    kind = "Qwen3VL" if third else name
    video = getattr(transformers, f"{'Qwen3VL' if third else 'Qwen2VL'}VideoProcessor")(**pixels)
    processor = getattr(transformers, f"{kind}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=video,
        chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>", *CHATML),
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")
    return Built(model(config), processor, vision_tokens[:3], {"crop_max_pixels": 1024, "crop_min_pixels": 256})


def build_internvl() -> Built:
    """InternVL with a Qwen2 language model: tiles and a thumbnail, four features a frame."""
    vision_tokens = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    special = (*CHATML_TOKENS, *vision_tokens)
    tokenizer = build_tokenizer(special, "bytes", "<|endoftext|>", "<|im_end|>", **named)
    config = transformers.InternVLConfig(
        vision_config={**VISION, "image_size": [FRAME, FRAME], "patch_size": [PATCH, PATCH]},
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer), "use_sliding_window": False},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size={"height": FRAME, "width": FRAME}, max_patches=6),
        tokenizer=tokenizer,
        video_processor=transformers.InternVLVideoProcessor(size={"height": FRAME, "width": FRAME}),
        image_seq_length=4,
        chat_template=chat_template("<IMG_CONTEXT>\n", *CHATML),
    )
    return Built(transformers.InternVLForConditionalGeneration(config), processor, vision_tokens[:3])


PINPOINTS = [[FRAME, 2 * FRAME], [2 * FRAME, FRAME], [2 * FRAME, 2 * FRAME], [FRAME, 3 * FRAME]]


def build_llava_onevision() -> Built:
    """LLaVA-OneVision with a Qwen2 language model; `anyres_max_1` so that larger images are shrunk in features."""
    special = (*CHATML_TOKENS, "<image>", "<video>")
    tokenizer = build_tokenizer(special, "bytes", "<|endoftext|>", "<|im_end|>")
    config = transformers.LlavaOnevisionConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer), "use_sliding_window": False},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_1",
        tie_word_embeddings=False,
    )
    size = {"height": FRAME, "width": FRAME}
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(FRAME // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_1",
        chat_template=chat_template("<image>", "<|im_start|>user ", "<|im_end|>", "<|im_start|>assistant\n"),
    )
    return Built(transformers.LlavaOnevisionForConditionalGeneration(config), processor, ("<image>",))


def build_llava_next() -> Built:
    """LLaVA-NeXT with a Mistral language model and a CLIP tower, whose class feature is left out; the tokenizer, not
    the template, puts the start token."""
    special = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
    tokenizer = build_tokenizer(special, "prefixed", "<pad>", "</s>", bos="<s>")
    config = transformers.LlavaNextConfig(
        vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 16},
        text_config={**TEXT, "model_type": "mistral", "vocab_size": len(tokenizer), "sliding_window": None},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    image_processor = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": FRAME}, crop_size=FRAME, image_grid_pinpoints=PINPOINTS
    )
    processor = transformers.LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>\n", "[INST] ", " [/INST]", ""),
    )
    return Built(transformers.LlavaNextForConditionalGeneration(config), processor, ("<image>",))


def build_idefics3(name: str) -> Built:
    """Idefics3 and SmolVLM with a Llama language model: splits with their row and column, then the whole."""
    grid = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    vision_tokens = ("<fake_token_around_image>", "<image>", "<global-img>", *grid)
    special = ("<|im_start|>", "<|im_end|>", "<end_of_utterance>", *vision_tokens)
    tokenizer = build_tokenizer(special, "bytes", "<|im_end|>", "<end_of_utterance>", bos="<|im_start|>")
    text = {**TEXT, "model_type": "llama", "vocab_size": len(tokenizer)}
    text["pad_token_id"] = tokenizer.pad_token_id
    config = getattr(transformers, f"{name}Config")(
        vision_config=dict(VISION),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    sizes = {"size": {"longest_edge": 3 * FRAME}, "max_image_size": {"longest_edge": FRAME}}
    image_processor = getattr(transformers, f"{name}ImageProcessor")(**sizes, resample=3)
    arguments: dict[str, Any] = {"image_processor": image_processor, "tokenizer": tokenizer, "image_seq_len": 4}
    if name == "SmolVLM":
        from transformers.models.smolvlm import processing_smolvlm

        # Only a video's prompt is written with it; the processor asks for it either way.
        processing_smolvlm.num2words = processing_smolvlm.num2words or str
        sampling = {"fps": 1, "max_frames": 2}
        video = transformers.SmolVLMVideoProcessor(
            **sizes, video_sampling={**sampling, "video_size": {"longest_edge": FRAME}}, **sampling, num_frames=2
        )
        arguments["video_processor"] = video
    processor = getattr(transformers, f"{name}Processor")(
        **arguments,
        chat_template=chat_template("<image>", "<|im_start|>User:", "<end_of_utterance>\n", "Assistant:"),
    )
    return Built(getattr(transformers, f"{name}ForConditionalGeneration")(config), processor, vision_tokens)


def build_gemma3() -> Built:
    """Gemma 3 with a sliding window shorter than a prompt: image tokens see each other both ways; the template puts
    the start token, which the tokenizer would put as well."""
    vision_tokens = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    named = {"boi_token": vision_tokens[0], "eoi_token": vision_tokens[1], "image_token": vision_tokens[2]}
    special = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *vision_tokens)
    tokenizer = build_tokenizer(special, "spaces", "<pad>", "<end_of_turn>", bos="<bos>", **named)
    text = {**TEXT, "vocab_size": len(tokenizer), "sliding_window": 24, "query_pre_attn_scalar": 16}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "pad_token_id": tokenizer.pad_token_id}
    config = transformers.Gemma3Config(
        vision_config={**VISION, "vision_use_head": False},
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=True,
    )
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size={"height": FRAME, "width": FRAME}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=chat_template(
            "<start_of_image>", "<bos><start_of_turn>user\n", "<end_of_turn>\n", "<start_of_turn>model\n"
        ),
    )
    return Built(transformers.Gemma3ForConditionalGeneration(config), processor, vision_tokens)


def build_aya() -> Built:
    """Aya Vision with a Cohere 2 language model, by the code of docs/families.md: what a family of one's own takes."""
    page = (Path(__file__).parents[1] / "docs/families.md").read_text(encoding="utf-8")
    exec(page.partition("```python\n")[2].partition("```")[0], {"__name__": "families_page"})
    vision_tokens = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE_GLOBAL", "<image>")
    tiles = ("TILE", *(f"TILE_{index}" for index in range(1, 13)))
    special = ("<PAD>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", *vision_tokens)
    tokenizer = build_tokenizer(special, "bytes", "<PAD>", "<|END_OF_TURN_TOKEN|>", bos="<BOS_TOKEN>")
    tokenizer.add_tokens(list(tiles))
    text = {**TEXT, "model_type": "cohere2", "vocab_size": len(tokenizer), "sliding_window": 24, "logit_scale": 0.5}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0}
    config = transformers.AyaVisionConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
    )
    processor = transformers.AyaVisionProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size={"height": FRAME, "width": FRAME}, max_patches=6),
        tokenizer=tokenizer,
        patch_size=PATCH,
        img_size=FRAME,
        downsample_factor=2,
        chat_template=chat_template("<image>", "<BOS_TOKEN>user ", "<|END_OF_TURN_TOKEN|>", "bot "),
    )
    return Built(transformers.AyaVisionForConditionalGeneration(config), processor, (*vision_tokens[:4], "TILE_1"))


BUILDERS = {
    "qwen2_vl": lambda: build_qwen("Qwen2VL"),
    "qwen2_5_vl": lambda: build_qwen("Qwen2_5_VL"),
    "qwen3_vl": lambda: build_qwen("Qwen3VL"),
    "qwen3_vl_moe": lambda: build_qwen("Qwen3VLMoe"),
    "qwen3_5": lambda: build_qwen("Qwen3_5"),
    "internvl": build_internvl,
    "llava_onevision": build_llava_onevision,
    "llava_next": build_llava_next,
    "idefics3": lambda: build_idefics3("Idefics3"),
    "smolvlm": lambda: build_idefics3("SmolVLM"),
    "gemma3": build_gemma3,
    "aya_vision": build_aya,
}


def build_family(name: str) -> Built:
    """A model with the same random weights each time, in eval mode."""
    torch.manual_seed(7)
    built = BUILDERS[name]()
    with torch.no_grad():
        for module_name, parameter in built.model.named_parameters():
            # Norm weights, biases and tables that start at 0 or 1 would hide a wrong order or a missing addition.
            if parameter.ndim < 2 or bool((parameter == 0).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))
            assert bool(torch.isfinite(parameter).all()), module_name
    built.model.generation_config.eos_token_id = built.processor.tokenizer.eos_token_id
    built.model.generation_config.pad_token_id = built.processor.tokenizer.pad_token_id
    return Built(built.model.eval(), built.processor, built.special, built.options)
