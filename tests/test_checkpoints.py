"""Checkpoint folders: whole or absent at every moment, incomplete ones named and passed over, rotation that is safe."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from imagine_opd.checkpoints import files as checkpoints
from imagine_opd.checkpoints.files import (
    DataOrder,
    clear_leftovers,
    find_checkpoint,
    find_fault,
    find_staging,
    finish_renames,
    list_checkpoints,
    read_order,
    refuse_other_order,
    remove_checkpoint,
    rotate_checkpoints,
    seal_checkpoint,
    set_aside_later,
)
from imagine_opd.errors import ConfigError

ORDER = DataOrder(24, 8, 2, 42, None, "random", False)


def write_files(folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    save_file({"weight": torch.full((64,), float(step))}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": step, "values": torch.zeros(64)}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def stage(folder: Path, step: int) -> None:
    write_files(find_staging(folder, step) / f"checkpoint-{step}", step)


def make_checkpoint(folder: Path, step: int, manifest: bool = True) -> Path:
    if not manifest:
        write_files(folder / f"checkpoint-{step}", step)
        return folder / f"checkpoint-{step}"
    stage(folder, step)
    return seal_checkpoint(folder, step, ORDER)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


class KilledError(BaseException):
    """Stands for a SIGKILL: nothing below may run on after it."""


class KillAt:
    """Stops before the `number`-th operation of checkpoints.py on the disk, and at every one after it."""

    def __init__(self, number: int, monkeypatch) -> None:
        self.left = number
        for name in ("rename", "fsync", "mkdir", "rmdir", "unlink"):
            monkeypatch.setattr(os, name, self.watch(getattr(os, name)))

    def watch(self, call):
        def watched(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                raise KilledError
            return call(*args, **kwargs)

        return watched


def test_a_kill_at_any_operation_leaves_the_old_or_the_new_checkpoint_whole(tmp_path):
    """Step 2 is there, step 4 is sealed, step 2 rotated away: stopped before each operation in turn."""
    ends = []
    for number in range(200):
        folder = tmp_path / str(number)
        make_checkpoint(folder, 2)
        stage(folder, 4)
        with pytest.MonkeyPatch.context() as patch:
            KillAt(number, patch)
            try:
                seal_checkpoint(folder, 4, ORDER)
                rotate_checkpoints(folder, 1, 4)
            except KilledError:
                pass
            else:
                break
        for path in list_checkpoints(folder):
            assert find_fault(path) is None, (number, path)
        found = find_checkpoint(True, folder)
        clear_leftovers(folder)
        assert find_checkpoint(True, folder) == found
        assert all(name.startswith("checkpoint-") for name in names_in(folder)), number
        ends.append(Path(found).name)
    assert ends == sorted(ends)
    assert ends.count("checkpoint-2") == 5  # the files to flush; then the manifest is there
    assert ends.count("checkpoint-4") > 5
    assert names_in(folder) == ["checkpoint-4"]


def test_a_kill_while_a_step_is_saved_again_loses_neither_name_nor_files(tmp_path):
    for number in range(200):
        folder = tmp_path / str(number)
        make_checkpoint(folder, 4)
        stage(folder, 4)
        with pytest.MonkeyPatch.context() as patch:
            KillAt(number, patch)
            try:
                seal_checkpoint(folder, 4, ORDER)
            except KilledError:
                pass
            else:
                break
        assert find_checkpoint(True, folder) == str(folder / "checkpoint-4"), number
    assert number > 15
    assert names_in(folder) == ["checkpoint-4"]


def test_last_complete_checkpoint_is_taken_and_the_others_named(tmp_path, capsys):
    for step in (2, 4, 10, 12):
        make_checkpoint(tmp_path, step)
    cut(tmp_path / "checkpoint-12" / "optimizer.pt", 100)
    (tmp_path / "checkpoint-10" / "rng_state.pth").unlink()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-99")
    size = (tmp_path / "checkpoint-4" / "optimizer.pt").stat().st_size
    for resume in (True, "auto"):
        assert find_checkpoint(resume, tmp_path) == str(tmp_path / "checkpoint-4")
        said = capsys.readouterr().out.splitlines()
        assert said == [
            f"{tmp_path}/checkpoint-99 is passed over: is a copy of another step's",
            f"{tmp_path}/checkpoint-12 is passed over: optimizer.pt has 100 of {size:,} bytes",
            f"{tmp_path}/checkpoint-10 is passed over: has no rng_state.pth, which its complete.json names",
        ]


def test_auto_begins_afresh_where_true_refuses(tmp_path):
    for folder in (tmp_path / "new", tmp_path):
        assert find_checkpoint("auto", folder) is None
        with pytest.raises(ConfigError, match="holds no complete checkpoint to resume from"):
            find_checkpoint(True, folder)
    assert find_checkpoint(None, tmp_path) is None
    assert find_checkpoint(False, tmp_path) is None


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("model.safetensors", None, "has no model.safetensors"),
        ("model.safetensors", 120, "model.safetensors "),
        ("model.safetensors", 20, "model.safetensors "),
        ("optimizer.pt", None, "has no optimizer.pt"),
        ("optimizer.pt", 300, "optimizer.pt "),
        ("scheduler.pt", None, "has no scheduler.pt"),
        ("rng_state.pth", 10, "rng_state.pth "),
        ("trainer_state.json", None, "has no trainer_state.json"),
        ("trainer_state.json", 5, "trainer_state.json "),
    ],
)
def test_a_named_checkpoint_with_a_missing_or_short_file_is_refused(tmp_path, manifest, name, size, message):
    path = make_checkpoint(tmp_path, 3, manifest)
    assert find_checkpoint(str(path), tmp_path) == str(path)
    if size is None:
        (path / name).unlink()
    else:
        cut(path / name, size)
    with pytest.raises(ConfigError) as caught:
        find_checkpoint(path, tmp_path)
    assert str(caught.value).startswith(f"resume_from_checkpoint={str(path)!r}: {message}")


def test_checkpoints_without_a_manifest_need_all_shards_of_their_index(tmp_path):
    path = make_checkpoint(tmp_path, 3, manifest=False)
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_fault(path) == "has no model-00002-of-00002.safetensors, which model.safetensors.index.json names"
    shutil.copy(path / "model-00001-of-00002.safetensors", path / "model-00002-of-00002.safetensors")
    assert find_fault(path) is None


@pytest.mark.parametrize("text", ["", "[]", '{"step": 3}', '{"files": {"a": "b"}}', '{"files": []}'])
def test_a_manifest_that_says_nothing_is_no_manifest_of_a_whole_checkpoint(tmp_path, text):
    path = make_checkpoint(tmp_path, 3)
    (path / "complete.json").write_text(text)
    assert "its complete.json is not readable" in find_fault(path)


def test_weights_alone_cannot_be_gone_on_from_exactly(tmp_path):
    stage(tmp_path, 3)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (find_staging(tmp_path, 3) / "checkpoint-3" / name).unlink()
    path = seal_checkpoint(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"has no optimizer.pt \(save_only_model=True writes none\)"):
        find_checkpoint(path, tmp_path)


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [2, 4, 6, 8]),
        (0, None, [2, 4, 6, 8]),
        (1, None, [8]),
        (2, None, [6, 8]),
        (1, 4, [4, 8]),
        (2, 4, [4, 8]),
        (3, 4, [4, 6, 8]),
        (9, 4, [2, 4, 6, 8]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, best, kept):
    for step in (2, 4, 6, 8):
        make_checkpoint(tmp_path, step)
    rotate_checkpoints(tmp_path, limit, 8, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert names_in(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_rotation_and_clearing_touch_no_folder_of_others(tmp_path):
    foreign = [
        "checkpoint-best",
        "checkpoint-1",
        "tmp-checkpoint-x",
        "tmp-checkpoint-3",
        "tmp-results",
        "my-checkpoint-2",
    ]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    make_checkpoint(tmp_path, 2)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-3")
    (tmp_path / "outside").mkdir()
    (tmp_path / "checkpoint-0").symlink_to(tmp_path / "outside")
    make_checkpoint(tmp_path, 4)
    before = names_in(tmp_path)
    rotate_checkpoints(tmp_path, 1, 4)
    clear_leftovers(tmp_path)
    assert names_in(tmp_path) == sorted(set(before) - {"checkpoint-2"})
    assert all((tmp_path / name / "notes.txt").is_file() for name in foreign)


def test_leftovers_of_a_killed_run_are_cleared_and_named(tmp_path):
    make_checkpoint(tmp_path, 2)
    stage(tmp_path, 4)
    (tmp_path / "tmp-removed-checkpoint-1" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "tmp-checkpoint-6").mkdir()
    assert clear_leftovers(tmp_path) == ["tmp-checkpoint-4", "tmp-checkpoint-6", "tmp-removed-checkpoint-1"]
    assert names_in(tmp_path) == ["checkpoint-2"]


def test_a_sealed_checkpoint_gets_its_name_at_the_next_start_and_a_short_one_does_not(tmp_path, monkeypatch):
    for step in (2, 4):
        stage(tmp_path, step)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "is_own", lambda path: 1 / 0)  # the last thing before the renames
            with pytest.raises(ZeroDivisionError):
                seal_checkpoint(tmp_path, step)
    cut(find_staging(tmp_path, 4) / "checkpoint-4" / "model.safetensors", 100)
    finish_renames(tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_a_folder_in_the_way_is_moved_not_removed(tmp_path):
    (tmp_path / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "checkpoint-4" / "notes.txt").write_text("mine")
    make_checkpoint(tmp_path, 4)
    assert find_fault(tmp_path / "checkpoint-4") is None
    assert (tmp_path / "earlier.1" / "checkpoint-4" / "notes.txt").read_text() == "mine"


def test_checkpoints_after_the_start_are_set_aside(tmp_path):
    for step in (2, 4, 6):
        make_checkpoint(tmp_path, step)
    assert set_aside_later(tmp_path, 6) is None
    assert set_aside_later(tmp_path, 2) == tmp_path / "earlier.1"
    assert set_aside_later(tmp_path, 0) == tmp_path / "earlier.2"
    assert names_in(tmp_path / "earlier.1") == ["checkpoint-4", "checkpoint-6"]
    assert names_in(tmp_path / "earlier.2") == ["checkpoint-2"]


def test_removing_needs_no_second_try_after_a_kill(tmp_path):
    path = make_checkpoint(tmp_path, 2)
    (tmp_path / "tmp-removed-checkpoint-2" / "checkpoint-2").mkdir(parents=True)
    remove_checkpoint(path)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 25}, r"made with rows=24 \(now 25\): rows would be left out or taken twice"),
        ({"seed": 1}, r"seed=42 \(now 1\)"),
        ({"data_seed": 7}, r"data_seed=None \(now 7\)"),
        ({"train_sampling_strategy": "sequential"}, r"train_sampling_strategy=random \(now sequential\)"),
        (
            {"rows_per_step": 4, "world_size": 1},
            r"rows_per_step=8 \(now 4\).* so that their product with the number of processes \(1\) is 8",
        ),
    ],
)
def test_another_order_of_rows_is_refused_unless_asked_for(tmp_path, capsys, change, message):
    path = make_checkpoint(tmp_path, 2)
    assert read_order(path) == ORDER
    refuse_other_order(path, ORDER, allow=False)
    now = dataclasses.replace(ORDER, **change)
    with pytest.raises(ConfigError, match=message):
        refuse_other_order(path, now, allow=False)
    assert capsys.readouterr().out == ""
    refuse_other_order(path, now, allow=True)
    assert "so an epoch begins anew" in capsys.readouterr().out


def test_other_processes_with_as_many_rows_a_step_may_go_on_and_are_told(tmp_path, capsys):
    path = make_checkpoint(tmp_path, 2)
    refuse_other_order(path, dataclasses.replace(ORDER, world_size=4), allow=False)
    assert "was made by 2 processes, this run has 4: each step takes the same rows" in capsys.readouterr().out
    refuse_other_order(make_checkpoint(tmp_path, 4, manifest=False), ORDER, allow=False)
    assert capsys.readouterr().out == ""
