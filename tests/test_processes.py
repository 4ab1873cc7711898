"""Two processes against one: DDP, FSDP2 and ZeRO-3 end at the weights of one, whatever rows a process gets."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import find_free_port, run_commands, run_in_processes

from imagine_opd.config import build_config
from imagine_opd.demo import base_model_path, make_scenes, scenes_to_rows
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.models.access import load_model
from imagine_opd.parallel.sharding import gather_parameters, is_fsdp2
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
    "leak_phrases": ["left"],
    "use_cpu": True,
}
CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"
CHECKS = {"teacher_checks": True, "teacher_check_rows": 2, "teacher_check_steps": 2, "probe_rows": 2, "probe_steps": 2}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {
        "distillation_mode": "sampled_token",
        "whiten_advantages": True,
        "num_generations": 2,
        "max_steps": 2,
    },
    "contrast": {"contrast": "mean", "contrast_beta": 2.0, "contrast_token_weight": True, "max_steps": 2},
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("plain", {}),
    "ddp accumulation": ("plain", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    "ddp sampled": ("sampled", {}),
    # Less than two sequences: each completion alone, and spare forwards where bad rows leave a process fewer.
    "ddp budget": ("plain", {"max_tokens_per_forward": 60}),
    "ddp sampled budget": ("sampled", {"max_tokens_per_forward": 130, "gradient_accumulation_steps": 1}),
    "fsdp2": ("plain", {**CHECKS, "fsdp": True, "save_strategy": "steps", "save_steps": 2}),
    "fsdp2 accumulation": (
        "plain",
        {
            "fsdp": True,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "generation_batch_size": 1,  # bad rows leave the second process one call, then none, beside two
        },
    ),
    "fsdp2 packed budget": ("plain", {"fsdp": True, "padding_free": True, "max_tokens_per_forward": 60}),
    "fsdp2 contrast": ("contrast", {"fsdp": True}),
}
# Of their own moment or machine, or of each micro-batch by itself.
NOT_COMPARED = ("time/", "step_time", "rollout_drift", "kl/top5_share", "vision/shared", "gap/", "teacher/")


def make_rows() -> list[Any]:
    rows = list(scenes_to_rows(make_scenes(ROWS, 77, "small"), "right"))
    for place in BAD:
        rows[place] = dataclasses.replace(rows[place], images=(rows[place].images[0][:200],))
    return rows


def pay_by_letters(rows: list[Any], texts: list[str]) -> list[float]:
    """A reward that differs between completions, and is the same wherever they are written."""
    return [float(sum(map(ord, text)) % 5) for text in texts]


def train(
    folder: Path, objective: str, fields: dict[str, Any], resume: str | None = None, spoil: Any = None
) -> dict[str, Any]:
    args = build_config(folder, {**RUN, **OBJECTIVES[objective], **fields})
    rewards = pay_by_letters if objective == "sampled" else None
    trainer = ImagineOPDTrainer(str(base_model_path()), args, make_rows(), reward_funcs=rewards)
    if spoil is not None:
        spoil(trainer)
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


def spoil_second_process(trainer: ImagineOPDTrainer) -> None:
    """Its loss of the first step is NaN."""
    exact = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        is_bad = trainer.args.process_index == 1 and trainer.state.global_step == 0
        return exact(*args, **kwargs) * (float("nan") if is_bad else 1.0)

    trainer.compute_loss = compute_loss


def train_all(folder: Path) -> dict[str, Any]:
    # FSDP last: what it sets in the environment stays for the process.
    found = {"spoiled": train(folder / "spoiled", "plain", {"max_steps": 2}, spoil=spoil_second_process)}
    found |= {name: train(folder / name, *kind) for name, kind in KINDS.items()}
    found["resumed"] = train(folder / "fsdp2", *KINDS["fsdp2"], str(folder / "fsdp2" / "checkpoint-2"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    whole = {"per_device_train_batch_size": 4}
    return {
        name: train(folder / "one" / name, name, {**whole, **(CHECKS if name == "plain" else {})})
        for name in OBJECTIVES
    }


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return run_in_processes(train_all, folder, timeout_s=300)


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_at_the_weights_of_one(kind: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    start = dict(load_model(base_model_path()).named_parameters())
    expected = one[KINDS[kind][0]]["weights"]
    assert largest_difference(expected, {name: p.detach() for name, p in start.items()}) > 1e-4
    for rank in range(2):
        assert largest_difference(two[rank][kind]["weights"], expected) < 1e-5
    for name in ("sharded", "teacher sharded"):
        assert two[0][kind][name] == kind.startswith("fsdp2")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_log_the_figures_of_one(kind: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    alone, together = one[KINDS[kind][0]]["steps"], two[0][kind]["steps"]
    assert len(alone) == len(together) == (3 if KINDS[kind][0] == "plain" else 2)
    for mine, expected in zip(together, alone, strict=True):
        names = {name for name in expected if not name.startswith(NOT_COMPARED)}
        assert {name for name in mine if not name.startswith(NOT_COMPARED)} == names
        assert {"completions/min_length", "kl/answer", "kl/quarter_4", "leak_rate", "loss_tokens", "num_tokens"} < names
        # `loss` itself is rounded by some versions of the Trainer.
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-4)
        for name in sorted(names - {"loss"}):
            assert mine[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
        assert mine["rollout_drift"] < 1e-4
    dropped = {name: value for step in alone for name, value in step.items() if name.startswith("rows_dropped")}
    assert sum(dropped.values()) > 0
    assert 0 < sum(step["leak_rate"] for step in alone) < len(alone)


def test_checks_of_split_weights_find_what_one_process_finds(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    alone, split, resumed = one["plain"]["steps"], two[0]["fsdp2"]["steps"], two[0]["resumed"]["steps"]
    names = {"gap/views", "gap/answer", "gap/both", "gap/student", "teacher/privilege_gap", "teacher/teacher_entropy"}
    assert names <= split[0].keys()
    assert {"gap/student", "teacher/change"} <= split[1].keys()
    for mine, expected in zip(split, alone, strict=True):
        compared = {name for name in expected if name.startswith(("gap/", "teacher/"))}
        assert compared == {name for name in mine if name.startswith(("gap/", "teacher/"))}
        for name in compared:
            assert mine[name] == pytest.approx(expected[name], abs=2e-5), name
    # Made again after a resume, with the weights of the checkpoint and not those of step 0.
    assert names <= resumed[2].keys()
    assert abs(split[1]["gap/student"]) > 1e-4
    assert resumed[2]["gap/student"] == pytest.approx(split[1]["gap/student"], abs=2e-5)


def test_step_that_one_process_spoils_counts_once(two: list[dict[str, Any]]) -> None:
    assert [step["nonfinite_steps"] for step in two[0]["spoiled"]["steps"]] == [1.0, 0.0]
    assert largest_difference(two[0]["spoiled"]["weights"], two[1]["spoiled"]["weights"]) == 0.0


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


def read_launches() -> dict[str, list[str]]:
    """The commands of docs/scaling.md by config file; with `N machines` where there is one for each of several."""
    page = Path(__file__).parents[1].joinpath("docs", "scaling.md").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for line in re.findall(r"^accelerate launch .*$", page.replace("\\\n", " "), re.MULTILINE):
        machines = re.search(r"--num_machines (\d+)", line)
        name = re.search(r"configs/accelerate/(\w+)\.yaml", line)[1]
        found.setdefault(f"{name}, {machines[1]} machines" if machines else name, []).append(line)
    return found


LAUNCHES = read_launches()


def test_each_shipped_launch_config_has_its_command_in_the_docs() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {name for name in LAUNCHES if "machines" not in name}
    assert len(LAUNCHES["fsdp2, 2 machines"]) == 2


def launch(name: str, folder: Path, *options: str) -> dict[str, torch.Tensor]:
    """The trained weights, written to `folder/run`. DeepSpeed's launch is skipped where it is not installed.

    The docs' own words: only recipe, address, port and the number of processes, here two in all, are put in.
    """
    if name.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    port = str(find_free_port())
    recipe = shlex.join([str(write_call(folder)), "--output_dir", str(folder / "run"), *options])
    commands = []
    for line in LAUNCHES[name]:
        line = re.sub(r"--num_processes \d+", "--num_processes 2", line).replace("ADDRESS", "127.0.0.1")
        line = line.replace("29500", port).replace("configs/accelerate", str(CONFIGS)).replace("CONFIG.yaml", recipe)
        words = shlex.split(line)[2:]
        ports = [] if port in words else ["--main_process_port", port]
        commands.append(["-m", "accelerate.commands.launch", *ports, *words])
    printed = run_commands(commands, timeout_s=240, env={"ACCELERATE_USE_CPU": "false"})
    assert f"trained 2 steps; the model is in {folder / 'run'}" in printed[0]
    return {key: p.detach() for key, p in load_model(folder / "run").named_parameters()}


@pytest.mark.parametrize("name", LAUNCHES)
def test_documented_launch_trains_as_one_process(
    name: str, called_alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
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


def test_deepspeed_goes_on_from_its_checkpoint(called_alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    launch("deepspeed_zero3", tmp_path, "--save_strategy", "steps", "--save_steps", "1")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "model.safetensors").unlink()
    again = launch("deepspeed_zero3", tmp_path, "--resume_from_checkpoint", "auto")
    logged = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in logged if "loss" in line] == [1, 2]
    assert largest_difference(again, called_alone) < 1e-5
