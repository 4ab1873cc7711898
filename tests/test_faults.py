"""Runs that end early or cannot write: what is left is whole, and the run that goes on is the same run."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import Act, Rows, make_toy, names_in, run_program, take_weights

from imagine_opd import outputs
from imagine_opd.callbacks import append_line
from imagine_opd.checkpoints import saving
from imagine_opd.checkpoints.files import find_fault, list_checkpoints
from imagine_opd.errors import ConfigError, ImagineError, OutputError
from imagine_opd.outputs import guard_writing

TESTS = Path(__file__).parent


def test_going_on_takes_no_row_of_the_part_that_is_done(tmp_path):
    make_toy(tmp_path, max_steps=4).train()
    resumed = make_toy(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    rows: Rows = resumed.train_dataset
    assert len(rows.taken) == 4  # steps 5 and 6, two rows each
    whole = make_toy(tmp_path / "whole")
    whole.train()
    assert rows.taken == whole.train_dataset.taken[-4:]
    assert torch.equal(take_weights(resumed), take_weights(whole))


def test_a_finished_run_that_is_started_again_takes_no_further_step(tmp_path):
    """As after a kill in the final save; step 4 lies within an epoch of 6."""
    first = make_toy(tmp_path, max_steps=4)
    first.train()
    again = make_toy(tmp_path, max_steps=4)
    assert again.train(resume_from_checkpoint="auto").global_step == 4
    assert again.train_dataset.taken == []
    assert torch.equal(take_weights(again), take_weights(first))


# what is kept


def test_a_torn_checkpoint_is_passed_over_and_the_run_goes_on_from_the_one_before(tmp_path, capsys):
    whole = make_toy(tmp_path / "whole")
    whole.train()
    make_toy(tmp_path / "torn", max_steps=4).train()
    weights = tmp_path / "torn" / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    resumed = make_toy(tmp_path / "torn")
    resumed.train(resume_from_checkpoint="auto")
    assert "checkpoint-4 is passed over: model.safetensors has" in capsys.readouterr().out
    assert torch.equal(take_weights(resumed), take_weights(whole))
    assert names_in(tmp_path / "torn" / "earlier.1") == ["checkpoint-4"]
    assert [find_fault(path) for path in list_checkpoints(tmp_path / "torn")] == [None] * 6


def test_a_fresh_run_sets_an_earlier_ones_checkpoints_aside(tmp_path, capsys):
    make_toy(tmp_path).train()
    make_toy(tmp_path, max_steps=2, save_total_limit=1).train()
    assert names_in(tmp_path, "checkpoint") == ["checkpoint-2"]
    assert len(names_in(tmp_path / "earlier.1")) == 6
    assert "earlier.1: holds the checkpoints of an earlier run after step 0" in capsys.readouterr().out


def test_the_best_checkpoint_and_the_last_outlive_rotation_and_the_end_of_the_run(tmp_path):
    scores = [0.1, 0.9, 0.3, 0.2, 0.1, 0.0]
    fields = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "score", "greater_is_better": True}
    trainer = make_toy(tmp_path, save_total_limit=1, load_best_model_at_end=True, **fields)
    trainer.evaluate = lambda **kwargs: {"eval_score": scores[trainer.state.global_step - 1]}
    trainer.train()
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-6"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert torch.equal(
        take_weights(trainer), load_file(tmp_path / "checkpoint-2" / "model.safetensors")["layer.weight"]
    )
    for step in (2, 6):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")


def test_a_run_killed_between_saving_and_rotating_rotates_when_it_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(saving, "rotate_checkpoints", lambda *args: None)
        make_toy(tmp_path, max_steps=3).train()
    make_toy(tmp_path, max_steps=3, save_total_limit=2).train(resume_from_checkpoint=True)
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_state_of_other_parts_is_in_the_checkpoint_and_loaded_before_training(tmp_path):
    class Part:
        def __init__(self) -> None:
            self.value = 0

        def save(self, folder: Path) -> None:
            (folder / "part.json").write_text(str(self.value))

        def load(self, folder: Path) -> None:
            self.value = int((folder / "part.json").read_text())

    part = Part()
    trainer = make_toy(tmp_path, [Act(2, lambda: setattr(part, "value", 7))], max_steps=2)
    trainer.saved_parts.append(part)
    trainer.train()
    assert "part.json" in json.loads((tmp_path / "checkpoint-2" / "complete.json").read_text())["files"]
    for step, value in ((1, 0), (2, 7)):
        resumed = make_toy(tmp_path)
        part.value = 5
        resumed.saved_parts.append(part)
        assert resumed.open_checkpoint(tmp_path / f"checkpoint-{step}") is not None
        assert part.value == value


def test_uploads_begin_when_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(saving.Trainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(saving.Trainer, "_finish_current_push", lambda self: None)
    monkeypatch.setattr(
        saving.Trainer, "_push_from_checkpoint", lambda self, path: seen.append((path, find_fault(Path(path))))
    )
    make_toy(tmp_path, max_steps=1, push_to_hub=True).train()
    assert seen == [(str(tmp_path / "checkpoint-1"), None)]


# writes that fail


@pytest.mark.parametrize(
    ("limit_bytes", "cause"),
    [(100_000, "SafetensorError"), (250_000, "RuntimeError"), (2_000, "SafetensorError")],
)
def test_a_file_limit_in_a_checkpoint_is_named_and_the_last_good_one_stays(tmp_path, limit_bytes, cause):
    """Real failed writes: the kernel refuses to let a file grow. Weights are 160 kB, the optimizer's state 320 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = make_toy(
        tmp_path, [Act(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard)))], width=200
    )
    try:
        with pytest.raises(OutputError) as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = str(caught.value)
    assert type(caught.value.__cause__).__name__ == cause
    assert text.startswith(f"{str(tmp_path)!r}: checkpoint-3 could not be written (")
    assert "MiB are free there, checkpoint-3 needs about 0.5 MiB" in text
    assert text.endswith(f"the last complete checkpoint is {tmp_path}/checkpoint-2")
    if cause == "SafetensorError":
        assert caught.value.errno == errno.EFBIG
        assert "File too large" in text
        assert "ulimit -f" in text
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    whole, resumed = make_toy(tmp_path / "whole", width=200), make_toy(tmp_path, width=200)
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(take_weights(resumed), take_weights(whole))


def test_a_full_disk_and_a_read_only_one_are_named_and_the_last_good_checkpoint_stays(tmp_path):
    """A file system of 2 MiB of its own, then one that turns read-only; needs the right to mount in a namespace."""
    unshare = shutil.which("unshare")
    probe = f"mount -t tmpfs -o size=2m tmpfs {tmp_path}"
    if unshare is None or subprocess.run([unshare, "-m", "sh", "-c", probe], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    code = f"""
import json, shutil, subprocess
from pathlib import Path
from imagine_opd.errors import OutputError
from toy_runs import Act, make_toy
folder, found = Path({str(tmp_path)!r}), []
subprocess.run({probe!r}.split(), check=True)
for callbacks in ([], [Act(2, lambda: subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True))]):
    try:
        make_toy(folder, callbacks, width=200).train()
    except OutputError as error:
        found.append([str(error), error.errno, sorted(path.name for path in folder.iterdir())])
    shutil.rmtree(folder, ignore_errors=True)
print(json.dumps(found))
"""
    done = run_program("-c", code, prefix=(unshare, "-m"))
    assert done.returncode == 0, done.stderr
    full, read_only = json.loads(done.stdout.splitlines()[-1])
    assert full[1] == errno.ENOSPC, full
    assert "checkpoint-4 could not be written (No space left on device); 0." in full[0]
    assert "MiB are free there, checkpoint-4 needs about 0.5 MiB; free some space, lower save_total_limit" in full[0]
    assert full[0].endswith(f"the last complete checkpoint is {tmp_path}/checkpoint-3")
    assert full[2] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert read_only[1] == errno.EROFS
    assert "checkpoint-2 could not be written (Read-only file system)" in read_only[0]
    assert "the file system is mounted read-only; choose another output_dir" in read_only[0]
    assert read_only[2] == ["checkpoint-1"]


def test_a_first_checkpoint_that_fails_says_that_none_is_there(tmp_path):
    (tmp_path / "tmp-checkpoint-1").write_text("a file where the folder must go")
    with pytest.raises(OutputError, match="checkpoint-1 could not be written .*; no checkpoint was saved before"):
        make_toy(tmp_path).train()


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (PermissionError(errno.EACCES, "Permission denied"), errno.EACCES),
        (Exception("No space left on device (os error 28)"), errno.ENOSPC),
        (RuntimeError("open file failed with strerror: Read-only file system, inline_container.cc:746"), errno.EROFS),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), None),
        (RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"), None),
    ],
)
def test_every_way_libraries_say_that_a_write_failed_becomes_one_error(tmp_path, error, number):
    with pytest.raises(OutputError) as caught, guard_writing(tmp_path / "new", "a thing", lambda: 3 << 20):
        raise error
    assert caught.value.__cause__ is error
    assert caught.value.errno == number
    assert f"{str(tmp_path / 'new')!r}: a thing could not be written (" in str(caught.value)
    assert "MiB are free there, a thing needs about 3.0 MiB; " in str(caught.value)


def test_a_write_that_lost_its_reason_on_a_full_disk_is_called_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "measure_free_bytes", lambda path: 1000)
    with pytest.raises(OutputError) as caught, guard_writing(tmp_path, "a thing", lambda: 2000):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    assert "No space left on device" in str(caught.value)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("error", [ValueError("bad"), RuntimeError("CUDA error"), ConnectionResetError(104, "peer")])
def test_errors_that_are_not_of_writing_travel_on(tmp_path, error):
    with pytest.raises(type(error)) as caught, guard_writing(tmp_path, "a thing"):
        raise error
    assert caught.value is error
    assert not isinstance(caught.value, ImagineError)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="has no device that is always full")
def test_a_log_line_on_a_full_device_is_an_output_error(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="a line of the log could not be written .No space left on device"):
        append_line(tmp_path / "metrics.jsonl", {"step": 1})


def test_a_final_model_that_cannot_be_written_is_an_output_error(tmp_path):
    trainer = make_toy(tmp_path / "run", max_steps=1)
    trainer.train()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="the model could not be written .Not a directory.*needs about 0.0 MiB"):
        trainer.save_model(str(tmp_path / "file" / "model"))


def test_a_checkpoint_of_more_rows_is_refused_before_the_run_touches_the_folder(tmp_path):
    make_toy(tmp_path, max_steps=2).train()
    before = names_in(tmp_path)
    with pytest.raises(ConfigError, match=r"made with rows=12 \(now 14\)"):
        make_toy(tmp_path, count=14).train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert names_in(tmp_path) == before
