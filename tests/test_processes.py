"""Two processes against one: DDP, FSDP2 and ZeRO-3 end at the weights of one, whatever rows a process gets."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import find_free_port, run_command, run_in_processes

from imagine_opd.config import build_config
from imagine_opd.demo import base_model_path, make_scenes, scenes_to_rows
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.models import load_model
from imagine_opd.sharding import gather_parameters, is_fsdp2
from imagine_opd.trainer import ImagineOPDTrainer

ROWS = 11  # in batches of 4: the last one is uneven
BAD = (2, 6, 7)  # of the second process: one row of its first batch, all of its second
RUN = {
    **TINY_RECIPE,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "train_sampling_strategy": "sequential",
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-2,  # Adam's first steps turn on the sign of a gradient, however near 0 it is
    "save_strategy": "no",
    "teacher_checks": False,
    "disable_tqdm": True,
    "report_to": [],
    "log_completions": False,
    "use_cpu": True,
}
CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"
KINDS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "fsdp2": {"fsdp": True, "save_strategy": "steps", "save_steps": 2},
    "fsdp2 accumulation": {
        "fsdp": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
}


def make_rows() -> list[Any]:
    rows = list(scenes_to_rows(make_scenes(ROWS, 77, "small"), "right"))
    for place in BAD:
        rows[place] = dataclasses.replace(rows[place], images=(rows[place].images[0][:200],))
    return rows


def train(folder: Path, fields: dict[str, Any], resume: str | None = None) -> dict[str, Any]:
    args = build_config(folder, {**RUN, **fields})
    trainer = ImagineOPDTrainer(str(base_model_path()), args, make_rows())
    trainer.train(resume_from_checkpoint=resume)
    with gather_parameters(trainer.model_wrapped) as model:
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    lines = Path(folder, "metrics.jsonl").read_text().splitlines() if args.should_save else []
    found = {
        "weights": weights,
        "steps": [line for line in map(json.loads, lines) if "loss" in line],
        "sharded": is_fsdp2(trainer.model_wrapped),
        "teacher sharded": is_fsdp2(trainer.teacher.module),
    }
    trainer.save_model()
    return found


def train_all(folder: Path, kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = {name: train(folder / name, fields) for name, fields in kinds.items()}
    if "fsdp2" in kinds:
        checkpoint = str(folder / "fsdp2" / "checkpoint-2")
        found["resumed"] = train(folder / "fsdp2", kinds["fsdp2"], checkpoint)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return train(folder / "one", {"per_device_train_batch_size": 4})


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return run_in_processes(train_all, folder, KINDS, timeout_s=300)


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_at_the_weights_of_one(kind: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    start = dict(load_model(base_model_path()).named_parameters())
    assert largest_difference(one["weights"], {name: p.detach() for name, p in start.items()}) > 1e-4
    for rank in range(2):
        assert largest_difference(two[rank][kind]["weights"], one["weights"]) < 1e-5
    for name in ("sharded", "teacher sharded"):
        assert two[0][kind][name] == kind.startswith("fsdp2")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_log_the_figures_of_one(kind: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert len(one["steps"]) == len(two[0][kind]["steps"]) == 3
    for mine, expected in zip(two[0][kind]["steps"], one["steps"], strict=True):
        for name in ("loss", "grad_norm", "reverse_kl", "entropy"):
            assert mine[name] == pytest.approx(expected[name], rel=1e-4), name
        dropped = {name: value for name, value in expected.items() if name.startswith("rows_dropped")}
        assert {name: value for name, value in mine.items() if name.startswith("rows_dropped")} == dropped
    assert sum(value for step in one["steps"] for name, value in step.items() if name.startswith("rows_dropped")) == 3


def test_sharded_run_goes_on_from_its_checkpoint(two: list[dict[str, Any]]) -> None:
    assert [step["step"] for step in two[0]["resumed"]["steps"]] == [1, 2, 3]
    assert largest_difference(two[0]["resumed"]["weights"], two[0]["fsdp2"]["weights"]) < 1e-7


def test_sharded_run_saves_whole_weights(folder: Path, two: list[dict[str, Any]]) -> None:
    saved = dict(load_model(folder / "fsdp2 accumulation").named_parameters())
    weights = two[0]["fsdp2 accumulation"]["weights"]
    assert largest_difference({name: p.detach() for name, p in saved.items()}, weights) == 0.0


def write_call(folder: Path) -> Path:
    """A recipe and its rows as files, for the command line."""
    lines = []
    for place, row in enumerate(make_rows()):
        (folder / f"{place}.jpg").write_bytes(row.images[0])
        box = row.boxes[0]
        lines.append({"image": f"{place}.jpg", "question": row.question, "boxes": [[box.x0, box.y0, box.x1, box.y1]]})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    fields = {**RUN, "model": str(base_model_path()), "data": str(folder / "rows.jsonl"), "check_rows": 0}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**fields, "bad_rows": "skip", "max_steps": 2, "teacher_checks": True}))
    return path


@pytest.fixture(scope="module")
def called_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    from imagine_opd.cli import main

    folder = tmp_path_factory.mktemp("alone")
    options = ["--per_device_train_batch_size", "4", "--output_dir", str(folder / "run")]
    assert main(["train", str(write_call(folder)), *options]) == 0
    return {name: p.detach() for name, p in load_model(folder / "run").named_parameters()}


def launch(name: str, folder: Path, *options: str) -> dict[str, torch.Tensor]:
    """The weights that two processes leave under the shipped configuration of that name."""
    if name.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    start = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
    ports = ["--main_process_port", str(find_free_port()), "--num_processes", "2"]
    call = ["-m", "imagine_opd", "train", str(write_call(folder)), "--output_dir", str(folder / "run"), *options]
    printed = run_command([*start, *ports, *call], timeout_s=240, env={"ACCELERATE_USE_CPU": "false"})
    assert f"trained 2 steps; the model is in {folder / 'run'}" in printed
    return {key: p.detach() for key, p in load_model(folder / "run").named_parameters()}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_shipped_launch_trains_as_one_process(name: str, called_alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert largest_difference(launch(name, tmp_path), called_alone) < 1e-5


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero3"])
def test_split_adapter_is_merged_whole(name: str, tmp_path: Path) -> None:
    merged = launch(name, tmp_path, "--use_peft", "true", "--lora_r", "4", "--merge_adapter", "true")
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    start = {key: p.detach() for key, p in load_model(base_model_path()).named_parameters()}
    assert merged.keys() == start.keys()
    moved = {key for key, value in merged.items() if not torch.equal(value, start[key])}
    layers = len({key.split(".")[3] for key in moved})
    assert layers > 0
    assert len(moved) == 7 * layers  # its attention and its feed-forward, and nothing else
    assert all(".language_model.layers." in key for key in moved)
