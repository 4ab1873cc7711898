"""Writes docs/scaling.md: one card, one node, several nodes, with the memory planner's figures for each model size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import Qwen3VLConfig

from imagine_opd.memory import (
    MemorySettings,
    ModelShape,
    advise_memory,
    choose_teacher_placement,
    estimate_view,
    plan_memory,
    read_model_shape,
)
from imagine_opd.memory.activations import ForwardLoad, count_cache_bytes
from imagine_opd.memory.items import StepMemory
from imagine_opd.memory.settings import GIB

# hidden, layers, heads, intermediate, tied, and of the vision tower: depth, hidden, intermediate, deepstack
SIZES = {
    "Qwen3-VL-2B": (2048, 28, 16, 6144, True, 24, 1024, 4096, (5, 11, 17)),
    "Qwen3-VL-4B": (2560, 36, 32, 9728, True, 24, 1024, 4096, (5, 11, 17)),
    "Qwen3-VL-8B": (4096, 36, 32, 12288, False, 27, 1152, 4304, (8, 16, 24)),
    "Qwen3-VL-32B": (5120, 64, 64, 25600, False, 27, 1152, 4304, (8, 16, 24)),
}
GLOBAL_PIXELS, CROP_PIXELS, CROPS, ROWS, NEW_TOKENS = 1024 * 1024, 512 * 512, 3, 4, 256
STUDENT_TEXT, TEACHER_TEXT = 128, 192
CARD_BYTES = 79 * GIB
SHAPE_OF_EXAMPLE = "Qwen3-VL-4B"

PAGE = """\
# Scaling

What fits where, and how to start it. The figures on this page are written by `make docs` from the memory planner
(`imagine_opd.memory`). They are planned, not measured on these cards; tests hold the planner to what real models hold
on a CPU: weights, gradients, optimizer states and cache to the byte, saved activations of Qwen3-VL within 6 % (in fp32
LoRA, with checkpointing or in other families within 30 %), and the peak of a whole step from 3 % below the real one to
25 % above it.

The run that is planned: {rows} rows a micro-batch and a rollout of as many, an image of 1 MP for the student, the same
and {crops} crops of 0.25 MP for the teacher, {new_tokens} new tokens ({student_tokens} and {teacher_tokens} tokens a
sequence), computing in bfloat16, `activation_checkpointing: true`, AdamW in fp32. LoRA is r=16 on all linear layers of
the language model, over frozen weights in bfloat16, and its teacher is the same model with the adapter off. Where all
weights are trained they are fp32 (16-bit weights would round the paper's small updates to nothing), and the teacher is
held in bfloat16: a second copy on the card, or on the CPU and brought in block by block.

## One card

{one_card}
Peak of one process, CUDA's own 0.8 GiB included. An 80 GB card holds about 79 GiB, and the planner fills 95 % of it.
The last column is the cache of one more row in a rollout: with `gradient_accumulation_steps: 8` all 32 rows of a step
are sampled at once unless `generation_batch_size` says otherwise. A teacher on the CPU takes 2 bytes a parameter of the
machine's memory.

Start it as any command: `imagine-opd train CONFIG.yaml`, or from Python with `imagine_opd.train`. When it does not fit,
the planner says what would help, for {example} with all weights and a teacher's copy:

```text
{advice}
```

Its plan in full:

```text
{plan}
```

On a card of {card} GiB the planner would choose `{placement}` for this teacher: {reason}.

## One node

{one_node}
Each of 8 cards, FSDP2: weights, gradients, optimizer states and a copied teacher are divided by 8, two blocks at a time
are gathered in bfloat16, and so are embeddings and head. Every card works on {rows} rows of its own, so activations and
cache are as on one card. A teacher on the CPU is not divided: each process brings in the same blocks, and holds what it
streams from in the machine's memory. With LoRA, DDP is the simpler choice as long as one card holds the model:

```bash
accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 8 -m imagine_opd train CONFIG.yaml
```

For all weights FSDP2:

```bash
accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_processes 8 -m imagine_opd train CONFIG.yaml
```

The batch is `per_device_train_batch_size` × processes × `gradient_accumulation_steps`.

### DeepSpeed ZeRO-3

It keeps bfloat16 weights and fp32 ones beside them. `pip install "imagine-opd[deepspeed]"` brings it; it compiles its
operators when it starts, which takes a C++ compiler.

```bash
accelerate launch --config_file configs/accelerate/deepspeed_zero3.yaml --num_processes 8 \\
    -m imagine_opd train CONFIG.yaml
```

Shown on a CPU, with DeepSpeed 0.19 and two processes over gloo: all weights of the tiny model, split while they are
loaded, with a frozen copy as teacher, the teacher's start-up checks, and bad rows on one process; two steps end at the
weights of one process within 1e-5, in a checkpoint that any Hugging Face tool loads, and so does a run that goes on
from its first step's checkpoint. Not shown under ZeRO-3: GPUs, bfloat16, LoRA, a moving teacher, offload. Where
DeepSpeed is not installed, and no other extra brings it, the test run leaves these tests out and says so.

## Several nodes

The same command on every node, with the number of machines, the processes of all, the rank of this machine, and the
address of the first:

```bash
# on the first node
accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_machines 2 --num_processes 16 --machine_rank 0 \\
    --main_process_ip ADDRESS --main_process_port 29500 -m imagine_opd train CONFIG.yaml
# on the second node
accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_machines 2 --num_processes 16 --machine_rank 1 \\
    --main_process_ip ADDRESS --main_process_port 29500 -m imagine_opd train CONFIG.yaml
```

Model, rows and `output_dir` must be readable under the same paths everywhere; checkpoints are written to `output_dir`.

{several_nodes}
Each of 16 cards on two nodes, FSDP2 over all of them. What is divided halves against one node; what is gathered, and
what the rows need, stays. Every gather crosses the slower network between nodes, so more nodes pay with more rows a
card or more accumulation, not with fewer.
"""


def build_shape(name: str) -> ModelShape:
    """The shapes of a published size."""
    hidden, layers, heads, intermediate, tied, depth, vision_hidden, vision_intermediate, deepstack = SIZES[name]
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": intermediate,
            "vocab_size": 151936,
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision_hidden,
            "num_heads": 16,
            "intermediate_size": vision_intermediate,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "deepstack_visual_indexes": list(deepstack),
            "out_hidden_size": hidden,
        },
        tie_word_embeddings=tied,
    )
    return read_model_shape(config)


def make_ways(shape: ModelShape) -> dict[str, MemorySettings]:
    """The columns of a table."""
    full = MemorySettings(
        student_view=estimate_view(shape, [GLOBAL_PIXELS], STUDENT_TEXT),
        teacher_view=estimate_view(shape, [GLOBAL_PIXELS, *[CROP_PIXELS] * CROPS], TEACHER_TEXT),
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
        max_completion_length=NEW_TOKENS,
        compute_dtype="bfloat16",
        teacher_dtype="bfloat16",
        activation_checkpointing=True,
    )
    return {
        "LoRA r=16": replace(full, lora_r=16, freeze_vision=True, model_dtype="bfloat16", teacher_dtype=None),
        "all weights, teacher's copy": replace(full, teacher_placement="copy"),
        "all weights, teacher on the CPU": replace(full, teacher_placement="cpu"),
    }


def make_table(shapes: dict[str, ModelShape], num_processes: int) -> str:
    """One row a model, one column a way to train it, in GiB on each card."""
    ways = list(make_ways(next(iter(shapes.values()))))
    lines = [
        f"| GiB on each of {num_processes} | parameters | {' | '.join(ways)} | a row's cache |",
        f"|---|{'---:|' * (len(ways) + 2)}",
    ]
    if num_processes == 1:
        lines[0] = lines[0].replace("GiB on each of 1", "GiB")
    for name, shape in shapes.items():
        cells = []
        for settings in make_ways(shape).values():
            if num_processes > 1:
                settings = replace(settings, parallelism="fsdp2", num_processes=num_processes)
            cells.append(f"{plan_memory(shape, settings).device_bytes / GIB:.1f}")
        load = ForwardLoad(settings.student_view, 1, NEW_TOKENS)
        precision = StepMemory(shape, make_ways(shape)["LoRA r=16"], None).precision
        cache = count_cache_bytes(shape, load, precision) / GIB
        lines.append(f"| {name} | {shape.numel / 1e9:.2f} B | {' | '.join(cells)} | {cache:.2f} |")
    return "\n".join(lines) + "\n"


def render_page() -> str:
    """The whole page."""
    shapes = {name: build_shape(name) for name in SIZES}
    shape = shapes[SHAPE_OF_EXAMPLE]
    settings = make_ways(shape)["all weights, teacher's copy"]
    plan = plan_memory(shape, settings)
    choice = choose_teacher_placement(shape, settings, CARD_BYTES)
    return PAGE.format(
        rows=ROWS,
        crops=CROPS,
        new_tokens=NEW_TOKENS,
        student_tokens=settings.student_view.tokens + NEW_TOKENS,
        teacher_tokens=settings.teacher_view.tokens + NEW_TOKENS,
        example=SHAPE_OF_EXAMPLE,
        one_card=make_table(shapes, 1),
        one_node=make_table(shapes, 8),
        several_nodes=make_table(shapes, 16),
        advice="\n".join(advise_memory(plan)),
        plan=plan.describe(),
        card=CARD_BYTES // GIB,
        placement=choice.placement,
        reason=choice.reason,
    )


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "scaling.md").write_text(render_page(), encoding="utf-8")
