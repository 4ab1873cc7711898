"""As a program, one training run of the tiny model with a real vLLM: `MODE FOLDER [URL]`; prints what it found as JSON.

A process of its own: vLLM changes the threads, the logging and the process groups of the one it lives in.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from imagine_opd.config import build_config
from imagine_opd.demo import base_model_path, make_scenes, scenes_to_rows
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.models.access import load_model, load_processor
from imagine_opd.rollout import HFEngine, SamplingConfig
from imagine_opd.trainer import ImagineOPDTrainer

FIELDS = {
    **TINY_RECIPE,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_generations": 2,
    "max_steps": 3,
    "learning_rate": 3e-3,  # large: old weights would be told from new ones
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "use_vllm": True,
}
MODES = {
    "colocate": {"vllm_mode": "colocate", "vllm_max_model_length": 256},
    "lora": {
        "vllm_mode": "colocate",
        "use_peft": True,
        "lora_r": 8,
        "learning_rate": 3e-2,
    },
    "tempered": {"vllm_mode": "colocate", "distillation_mode": "sampled_token", "temperature": 0.8},
    "server": {"vllm_mode": "server"},
}


def compare_greedy(trainer: ImagineOPDTrainer, step: int) -> dict[str, list]:
    """Greedy completions of both engines with the weights as they are now, and the largest log-prob difference."""
    rows = [trainer.train_dataset[i] for i in range(4)]
    prompts = [pair.student for pair in trainer.builder.build_pairs(rows) if pair is not None]
    greedy = SamplingConfig(18, temperature=0.0)
    model = trainer.model
    with trainer.engine.opened(model, step):
        theirs = trainer.engine.generate(model, prompts, greedy)
    ours = HFEngine(trainer.token_ids).generate(model, prompts, greedy)
    found = {
        name: part.completion_ids_BT[part.completion_mask_BT].tolist()
        for name, part in (("vllm", theirs), ("hf", ours))
    }
    if found["vllm"] == found["hf"]:
        gap = (theirs.sampling_logprobs_BT - ours.sampling_logprobs_BT).abs().max()
        found["largest_difference"] = [float(gap)]
    return found


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    fields = {**FIELDS, **MODES[mode]}
    if len(sys.argv) > 3:
        fields["vllm_server_base_url"] = sys.argv[3]
    torch.set_num_threads(1)
    rows = list(scenes_to_rows(make_scenes(16, 77, "small"), "right"))
    args = build_config(folder, fields)
    model, processor = load_model(base_model_path()), load_processor(None, base_model_path())
    trainer = ImagineOPDTrainer(model, args, rows, processor=processor)
    torch.manual_seed(4)
    before = compare_greedy(trainer, 0)
    state = torch.rand(2).tolist()
    torch.manual_seed(4)
    same = torch.rand(2).tolist() == state
    trainer.train()
    after = compare_greedy(trainer, trainer.state.global_step)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = {
        "before": before,
        "after": after,
        "syncs": trainer.engine.syncs,
        "keeps_random_state": same,
        "is_clip": args.distillation_is_clip,
        "steps": [line for line in lines if "loss" in line],
    }
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
