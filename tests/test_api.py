"""`imagine_opd.train` as a user calls it: files on disk in, a model out; bad input named before anything is written."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

import imagine_opd
from imagine_opd.demo import base_model_path
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import ConfigError, ImageError, ImagineError, OutputError, RowError, TeacherError

QUICK = {
    **TINY_RECIPE,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "teacher_check_rows": 2,
}


@pytest.fixture
def dataset(tmp_path, make_rows) -> Path:
    """A JSONL of eight scenes with real JPEG files beside it."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    lines = []
    for index, row in enumerate(make_rows(8)):
        name = f"images/{index}.jpg"
        Image.open(io.BytesIO(row.images[0])).save(folder / name, quality=95)
        boxes = [[box.x0, box.y0, box.x1, box.y1] for box in row.boxes]
        lines.append({"image": name, "question": row.question, "boxes": boxes, "answer": row.answer})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def change_row(path: Path, index: int, **change) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[index] |= change
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_training_on_jpeg_files_from_a_folder_model(dataset, tmp_path):
    result = imagine_opd.train(base_model_path(), str(dataset), output_dir=tmp_path / "run", eval_data=dataset, **QUICK)
    assert result.global_step == 2
    assert "eval_accuracy" in result.metrics
    reply = imagine_opd.ask(result.output_dir, dataset.parent / "images/0.jpg", "what digit is on the red circle ?")
    assert reply.text
    scores = imagine_opd.evaluate(result.output_dir, dataset, modes=("imagine", "teacher"))
    assert scores["teacher"].rows == 8


def test_training_on_real_photographs(tmp_path):
    """scikit-learn ships two photographs as JPEG; the question's answer does not matter here, the pixels do."""
    import shutil

    import sklearn.datasets

    source = Path(sklearn.datasets.__file__).parent / "images"
    rows = []
    for name in ("china.jpg", "flower.jpg"):
        shutil.copy(source / name, tmp_path / name)
        for box in ([10, 20, 200, 180], [300.5, 100, 639, 426]):
            rows.append({"image": name, "question": "what digit is on the red circle ?", "boxes": [box]})
    path = tmp_path / "photos.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = imagine_opd.train(base_model_path(), path, output_dir=tmp_path / "run", **QUICK)
    assert result.global_step == 2


@pytest.mark.parametrize("damage", ["missing", "truncated", "outside", "reversed", "empty", "no question", "too large"])
def test_bad_row_stops_the_run_before_anything_is_written(dataset, tmp_path, damage):
    image = dataset.parent / "images/3.jpg"
    fields = dict(QUICK)
    if damage == "missing":
        image.unlink()
        expected = "rows.jsonl:4: image"
    elif damage == "truncated":
        image.write_bytes(image.read_bytes()[:-900])
        expected = "truncated"
    elif damage == "outside":
        change_row(dataset, 3, boxes=[[10, 10, 400, 60]])
        expected = "144"
    elif damage == "reversed":
        change_row(dataset, 3, boxes=[[60, 10, 40, 60]])
        expected = "reversed; expected x0 < x1"
    elif damage == "empty":
        change_row(dataset, 3, boxes=[[60, 10, 60, 60]])
        expected = "has no width"
    elif damage == "no question":
        change_row(dataset, 3, question=None)
        expected = "has no question"
    else:
        Image.new("RGB", (300, 200)).save(image)
        fields["max_image_pixels"] = 50_000
        change_row(dataset, 3, boxes=[[10, 10, 40, 60]])
        expected = "50000"
    with pytest.raises(RowError) as caught:
        imagine_opd.train(base_model_path(), dataset, output_dir=tmp_path / "run", **fields)
    text = str(caught.value)
    assert "rows.jsonl:4" in text
    assert expected in text.replace("_", "").replace(",", "") or expected in text
    assert not (tmp_path / "run").exists()


def test_bad_rows_can_be_left_out_and_are_counted(dataset, tmp_path, capsys):
    (dataset.parent / "images/3.jpg").unlink()
    change_row(dataset, 5, question="")
    fields = {**QUICK, "max_steps": 1, "bad_rows": "skip"}
    result = imagine_opd.train(base_model_path(), dataset, output_dir=tmp_path / "run", **fields)
    assert result.global_step == 1
    assert "2 of 8 rows left out: 1 malformed, 1 missing" in capsys.readouterr().out


def test_every_fault_is_named_when_no_row_is_sound(tmp_path, make_rows):
    rows = [{"picture": row.images[0], "question": row.question} for row in make_rows(3)]
    with pytest.raises(RowError) as caught:
        imagine_opd.train(base_model_path(), rows, output_dir=tmp_path / "run", **QUICK)
    assert "3 of 3 rows cannot be used" in str(caught.value)
    assert "row 0: has no image" in str(caught.value)


def test_rows_without_boxes_are_counted(tmp_path, make_rows, capsys):
    rows = [{"image": row.images[0], "question": row.question, "bboxes": row.boxes} for row in make_rows(3)]
    imagine_opd.train(base_model_path(), rows, output_dir=tmp_path / "run", **QUICK)
    assert "3 of 3 rows have no 'boxes'" in capsys.readouterr().out


def test_text_that_cannot_be_asked_is_refused_before_the_run(dataset, tmp_path):
    change_row(dataset, 3, question="what <|image_pad|> ?")
    with pytest.raises(RowError, match="rows.jsonl:4: the text contains the image placeholder"):
        imagine_opd.train(base_model_path(), dataset, output_dir=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


def test_eval_rows_without_answers_are_refused_before_the_run(dataset, tmp_path, make_rows):
    rows = [{"image": row.images[0], "question": row.question} for row in make_rows(2)]
    with pytest.raises(RowError, match="none of the 2 rows of eval_data has an answer"):
        imagine_opd.train(base_model_path(), dataset, output_dir=tmp_path / "run", eval_data=rows, **QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume", [True, "nowhere/checkpoint-1"])
def test_resume_without_a_checkpoint_is_refused(dataset, tmp_path, resume):
    with pytest.raises(ConfigError, match="resume_from_checkpoint"):
        imagine_opd.train(
            base_model_path(), dataset, output_dir=tmp_path / "run", resume_from_checkpoint=resume, **QUICK
        )
    assert not (tmp_path / "run").exists()


def test_resume_true_goes_on_from_the_last_checkpoint(dataset, tmp_path):
    fields = {**QUICK, "save_strategy": "steps", "save_steps": 1}
    whole = imagine_opd.train(base_model_path(), dataset, output_dir=tmp_path / "a", **{**fields, "max_steps": 3})
    imagine_opd.train(base_model_path(), dataset, output_dir=tmp_path / "b", **{**fields, "max_steps": 3})
    for name in ("checkpoint-3", "checkpoint-2"):
        import shutil

        shutil.rmtree(tmp_path / "b" / name)
    resumed = imagine_opd.train(
        base_model_path(), dataset, output_dir=tmp_path / "b", resume_from_checkpoint=True, **{**fields, "max_steps": 3}
    )
    assert resumed.global_step == 3
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_trained_pixel_budget_travels_in_the_processor(dataset, tmp_path):
    from transformers import AutoProcessor

    fields = {**QUICK, "min_pixels": 96 * 96, "max_pixels": 96 * 96, "max_steps": 1}
    imagine_opd.train(base_model_path(), dataset, output_dir=tmp_path / "run", **fields)
    size = AutoProcessor.from_pretrained(tmp_path / "run").image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (96 * 96, 96 * 96)


def test_damaged_weights_are_named(tmp_path, dataset):
    import shutil

    shutil.copytree(base_model_path(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        imagine_opd.train(tmp_path / "model", dataset, output_dir=tmp_path / "run", **QUICK)


def test_unknown_field_is_refused(dataset, tmp_path):
    with pytest.raises(ConfigError, match="unknown config field 'temprature'; did you mean 'temperature'"):
        imagine_opd.train(base_model_path(), dataset, output_dir=tmp_path / "run", temprature=1.0)
    assert not (tmp_path / "run").exists()


def test_output_dir_that_cannot_be_written_is_refused(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; choose another folder"):
        imagine_opd.train(base_model_path(), dataset, output_dir=tmp_path / "file" / "run", **QUICK)
    with pytest.raises(OutputError, match="not writable"):
        imagine_opd.train(base_model_path(), dataset, output_dir="/proc/self/run", **QUICK)


def test_teacher_with_another_vocabulary_is_refused_before_anything_is_written(dataset, tiny, tmp_path):
    from transformers import AutoModelForImageTextToText

    config = copy.deepcopy(tiny.model.config)
    config.text_config.vocab_size += 8
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "teacher")
    tiny.processor.save_pretrained(tmp_path / "teacher")
    with pytest.raises(TeacherError, match="the teacher's vocabulary has"):
        imagine_opd.train(
            base_model_path(), dataset, output_dir=tmp_path / "run", teacher=tmp_path / "teacher", **QUICK
        )
    assert not (tmp_path / "run").exists()


def test_model_that_is_not_there_is_named(dataset, tmp_path):
    with pytest.raises(ImagineError, match="nowhere"):
        imagine_opd.train(str(tmp_path / "nowhere"), dataset, output_dir=tmp_path / "run", **QUICK)


def test_ask_takes_path_bytes_and_pil_alike_and_turns_exif(tiny, make_rows, tmp_path):
    row = make_rows(1)[0]
    picture = Image.open(io.BytesIO(row.images[0]))
    path = tmp_path / "scene.png"
    path.write_bytes(row.images[0])
    replies = [imagine_opd.ask(base_model_path(), image, row.question) for image in (path, row.images[0], picture)]
    assert replies[0] == replies[1] == replies[2]
    turned = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    assert ImageOps.exif_transpose(Image.open(turned)).tobytes() == picture.tobytes()
    assert imagine_opd.ask(base_model_path(), turned, row.question) == replies[0]
    with pytest.raises(ImageError, match="none.png"):
        imagine_opd.ask(base_model_path(), tmp_path / "none.png", "what ?")


def test_import_is_quick_and_quiet():
    import subprocess
    import sys

    code = "import sys, imagine_opd; print([m for m in ('torch', 'transformers', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
