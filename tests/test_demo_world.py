"""The tiny world: its scenes, its model folder, and the gap between student and teacher the demonstration needs."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagine_opd.demo import SheetRow, base_model_path, draw_contact_sheet, make_scenes, scenes_to_rows
from imagine_opd.demo.base import PromptBook, Recipe, build_bank, build_inputs, cut_crop, main, train_base
from imagine_opd.demo.scenes import SCENE_PX, decode_scene
from imagine_opd.demo.tiny import TINY_VIEWS, build_processor
from imagine_opd.types import Box, ViewConfig


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(base_model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        base_model_path(), dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize(
    ("glyphs", "expected"),
    [("small", "173e512c7c0acde0"), ("large", "cc8f979ccb46ee60")],
)
def test_scenes_are_the_same_pixels_everywhere(glyphs: Any, expected: str) -> None:
    digest = hashlib.sha256()
    for scene in make_scenes(5, seed=11, glyphs=glyphs):
        digest.update(decode_scene(scene.image).tobytes())
        digest.update(f"{scene.question}|{scene.trace}|{scene.box}|{scene.wrong_box}|{scene.caption}".encode())
    assert digest.hexdigest()[:16] == expected


def test_longer_list_of_scenes_starts_with_shorter_one() -> None:
    assert make_scenes(7, seed=3)[:4] == make_scenes(4, seed=3)
    assert make_scenes(1, seed=3) != make_scenes(1, seed=4)


@pytest.mark.parametrize("glyphs", ["small", "large"])
def test_box_holds_the_digit_and_lies_inside_the_image(glyphs: Any) -> None:
    for scene in make_scenes(60, seed=5, glyphs=glyphs):
        picture = decode_scene(scene.image)
        for item in scene.objects:
            box = item.box
            assert 0 <= box.x0 < box.x1 <= SCENE_PX
            assert 0 <= box.y0 < box.y1 <= SCENE_PX
            patch = picture[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)].astype(int)
            ink = (patch.max(axis=2) < 40) | (patch.min(axis=2) > 248)
            # Ink reaches the top and bottom edge of a tight box, and fills a good part of it.
            assert ink[:4].any()
            assert ink[-4:].any()
            assert 0.1 < ink.mean() < 0.8


def test_question_names_one_object_and_wrong_box_is_another_with_another_digit() -> None:
    for scene in make_scenes(60, seed=6):
        asked = scene.objects[scene.target]
        assert scene.box == asked.box
        assert scene.answer == str(asked.digit)
        named = [item for item in scene.objects if f"the {item.color} {item.shape} ?" in scene.question]
        assert named == [asked]
        wrong = next(item for item in scene.objects if item.box == scene.wrong_box)
        assert wrong is not asked
        assert wrong.digit != asked.digit
        assert scene.trace.endswith(f"<answer> {scene.answer} </answer>")


def test_rows_point_the_teacher_at_the_right_or_the_wrong_digit() -> None:
    scenes = make_scenes(3, seed=7)
    for scene, right, wrong in zip(scenes, scenes_to_rows(scenes), scenes_to_rows(scenes, views="wrong"), strict=True):
        assert (right.boxes, wrong.boxes) == ((scene.box,), (scene.wrong_box,))
        assert (right.hint, wrong.hint) == (scene.hint, scene.wrong_hint)
        assert right.images == wrong.images == (scene.image,)
        assert right.answer == wrong.answer == scene.answer


def test_tight_box_grows_to_the_whole_crop_without_resampling() -> None:
    assert ViewConfig(**TINY_VIEWS).min_crop_px == 32
    for scene in make_scenes(200, seed=8):
        for item in scene.objects:
            box = item.box
            assert (box.x0 + box.x1) % 2 == (box.y0 + box.y1) % 2 == 0
            assert box.x1 - box.x0 <= 32
            assert cut_crop(decode_scene(scene.image), box).shape == (32, 32, 3)


def test_package_views_equal_the_pretrainings_pixels(processor: Any) -> None:
    views = pytest.importorskip("imagine_opd.views")
    scenes = make_scenes(8, seed=9)
    bank = build_bank(8, 9, "small", processor)
    made = views.make_views(scenes_to_rows(scenes), ViewConfig(**TINY_VIEWS))
    for index, (scene, entry) in enumerate(zip(scenes, made, strict=True)):
        expected = torch.cat([bank.global_SPF[index], bank.crop_SOPF[index, scene.target]]).numpy() / 127.5 - 1
        assert entry.teacher.image_grid_thw.tolist() == [[1, 6, 6], [1, 4, 4]]
        np.testing.assert_allclose(entry.teacher.pixel_values, expected, atol=1.1 / 127.5)
        np.testing.assert_array_equal(entry.teacher.pixel_values[:36], entry.student.pixel_values)


def test_tokenizer_reads_back_questions_and_traces(processor: Any) -> None:
    tokenizer = processor.tokenizer
    for scene in make_scenes(100, seed=10):
        for text in (scene.question, scene.trace, scene.caption, scene.hint):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
    typed = tokenizer("What digit is on the red circle?", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(typed) == "what digit is on the red circle ?"


def test_processor_survives_saving_and_places_one_placeholder_an_image(tmp_path: Path) -> None:
    from transformers import AutoProcessor, Qwen3VLProcessor

    build_processor().save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, Qwen3VLProcessor)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what is on the image ?"}]
    text = loaded.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == f"<|im_start|> user \n {pad} {pad} what is on the image ? <|im_end|> \n <|im_start|> assistant \n "
    picture = decode_scene(make_scenes(1, seed=0)[0].image)
    inputs = loaded(text=[text], images=[picture, picture], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 6], [1, 6, 6]]
    assert int((inputs["input_ids"] == loaded.image_token_id).sum()) == 18
    assert loaded.tokenizer.unk_token_id not in inputs["input_ids"]


def test_shipped_base_is_small_and_ends_where_its_tokenizer_does(model: Any, processor: Any) -> None:
    assert sum(path.stat().st_size for path in base_model_path().iterdir()) < 2_000_000
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("gets", "low", "high"), [("crop", 0.90, 1.0), ("hint", 0.90, 1.0), ("wrong hint", 0.0, 0.1), ("", 0.2, 0.45)]
)
def test_base_knows_small_digits_by_crop_or_hint_only(
    model: Any, processor: Any, gets: str, low: float, high: float
) -> None:
    bank = build_bank(100, 12345, "small", processor)
    targets = [scene.target for scene in bank.scenes]
    images = [bank.global_SPF] + ([bank.crop_SOPF[range(100), targets]] if gets == "crop" else [])
    hints = [{"hint": f" {scene.hint}", "wrong hint": f" {scene.wrong_hint}"}.get(gets, "") for scene in bank.scenes]
    book = PromptBook(processor)
    prompts = [
        book.prompt(scene.question + hint, (3, 2)[: len(images)])
        for scene, hint in zip(bank.scenes, hints, strict=True)
    ]
    inputs = build_inputs(model, prompts, [[]] * 100, images)
    del inputs["labels"], inputs["position_ids"]
    ids_BT = model.generate(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), do_sample=False)
    texts = processor.tokenizer.batch_decode(ids_BT[:, len(prompts[0]) :], skip_special_tokens=True)
    right = [f"<answer> {scene.answer} </answer>" in text for text, scene in zip(texts, bank.scenes, strict=True)]
    assert low <= sum(right) / 100 <= high


def test_pretraining_lowers_the_loss_and_repeats_itself() -> None:
    recipe = Recipe(large_scenes=24, small_scenes=12, align_steps=1, question_steps=6)
    first = train_base(recipe, seed=1, report=lambda _: None)[2]
    assert first[-1] < first[0]
    again = train_base(recipe, seed=1, report=lambda _: None)[2]
    assert again == pytest.approx(first, rel=1e-5)


def test_pretraining_command_writes_a_folder_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    sizes = ["--large-scenes", "16", "--small-scenes", "8", "--align-steps", "1", "--question-steps", "2"]
    assert main(["--output", str(tmp_path / "base"), *sizes]) == 0
    assert "questions 2/2: loss" in capsys.readouterr().out
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "base").dtype == torch.bfloat16
    assert AutoProcessor.from_pretrained(tmp_path / "base").image_processor.patch_size == 8


def test_importing_the_demo_loads_no_torch() -> None:
    code = (
        "import sys, imagine_opd.demo as d; d.base_model_path(); d.make_scenes(1, 0); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_contact_sheet_shows_a_hint_in_words(tmp_path: Path) -> None:
    student = np.full((48, 48, 3), (10, 200, 30), dtype=np.uint8)
    scene = make_scenes(1, seed=2)[0]
    ink = []
    for name, words in (("hint", scene.hint), ("none", "")):
        row = SheetRow(scene.image, scene.box, student, words, "q", scene.answer, "see 3", "see 7", False, True, "hint")
        draw_contact_sheet([row], tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as sheet:
            colors = {color: count for count, color in sheet.convert("RGB").getcolors(maxcolors=1 << 20) or []}
        ink.append(colors[(28, 32, 38)])
    assert ink[0] > ink[1] + 300


def test_contact_sheet_shows_pixels_of_both_sides_and_marks_by_shape(tmp_path: Path) -> None:
    student = np.full((48, 48, 3), (10, 200, 30), dtype=np.uint8)
    crop = np.full((32, 32, 3), (200, 10, 90), dtype=np.uint8)
    scene = make_scenes(1, seed=2)[0]
    row = SheetRow(scene.image, scene.box, student, crop, scene.question, scene.answer, "see 3", "see 7", False, True)
    path = tmp_path / "sheet.png"
    draw_contact_sheet([row, row, row], path, subtitle="28 % before")
    with Image.open(path) as sheet:
        colors = {color: count for count, color in sheet.convert("RGB").getcolors(maxcolors=1 << 20) or []}
    assert colors[(10, 200, 30)] == colors[(200, 10, 90)] == 3 * 192 * 192
    assert all(color in colors for color in [(20, 116, 58), (190, 38, 46), (255, 0, 170)])


def test_sheet_cuts_a_long_response_instead_of_running_over(tmp_path: Path) -> None:
    scene = make_scenes(1, seed=2)[0]
    view = np.zeros((48, 48, 3), dtype=np.uint8)
    row = SheetRow(scene.image, Box(0, 0, 9, 9), view, view, "q " * 200, "1", "word " * 200, "", False, False)
    draw_contact_sheet([row], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        margin = np.asarray(sheet)[120:, -20:]
    assert (margin == margin[0, 0]).all()
