"""Rows from every source; each malformed row named with its place, its value and the fix."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from imagine_opd.data import load_rows
from imagine_opd.errors import RowError
from imagine_opd.types import Box


def encode_picture(width=64, height=48, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (10, 200, 30)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_bytes(encode_picture())
    (tmp_path / "outside.jpg").write_bytes(encode_picture())
    return tmp_path / "data"


def write_jsonl(folder, *items) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))
    return str(path)


GOOD = {"image": "a.jpg", "question": "what?", "boxes": [[1, 2, 30, 40]], "answer": "green", "id": 7}


def test_jsonl_row_becomes_a_row_with_its_place(folder):
    row = load_rows(write_jsonl(folder, GOOD, "", {**GOOD, "options": ["red", "green"]})).rows
    assert row[0].images == (folder / "a.jpg",)
    assert (row[0].question, row[0].answer, row[0].id, row[0].source) == ("what?", "green", "7", "rows.jsonl:1")
    assert row[0].boxes == (Box(1, 2, 30, 40),)
    assert row[1].source == "rows.jsonl:3"
    assert row[1].options == ("red", "green")


def test_list_dataset_json_and_parquet_give_the_same_rows(folder):
    datasets = pytest.importorskip("datasets")
    picture = (folder / "a.jpg").read_bytes()
    items = [{"image": picture, "question": f"q{i}", "boxes": [[1.0, 2.0, 30.0, 40.0]]} for i in range(3)]
    from_list = load_rows(items).rows
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "boxes": datasets.Sequence(datasets.Sequence(datasets.Value("float64"))),
        }
    )
    columns = [{**item, "image": {"bytes": picture, "path": None}} for item in items]
    dataset = datasets.Dataset.from_list(columns, features=features)
    from_dataset = load_rows(dataset).rows
    dataset.to_parquet(str(folder / "rows.parquet"))
    from_parquet = load_rows(folder / "rows.parquet").rows
    (folder / "rows.json").write_text(json.dumps([{**item, "image": "a.jpg"} for item in items]))
    from_json = load_rows(folder / "rows.json").rows
    for rows in (from_dataset, from_parquet):
        assert [(r.images, r.question, r.boxes) for r in rows] == [(r.images, r.question, r.boxes) for r in from_list]
    assert [(r.question, r.boxes) for r in from_json] == [(r.question, r.boxes) for r in from_list]


def test_messages_hold_the_question(folder):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many?"}]}]
    assert load_rows([{"image": folder / "a.jpg", "messages": messages}]).rows[0].question == "how many?"
    assert (
        load_rows([{"image": folder / "a.jpg", "messages": [{"role": "user", "content": "<image>why?"}]}])
        .rows[0]
        .question
        == "why?"
    )
    with pytest.raises(RowError, match="2 user turns"):
        load_rows([{"image": folder / "a.jpg", "messages": messages * 2}])


@pytest.mark.parametrize(
    ("box_format", "box", "expected"),
    [
        ("xyxy", [1, 2, 30, 40], Box(1, 2, 30, 40)),
        ("xywh", [1, 2, 30, 40], Box(1, 2, 31, 42)),
        ("xyxy_1000", [0, 500, 500, 1000], Box(0, 24, 32, 48)),
    ],
)
def test_box_formats(folder, box_format, box, expected):
    row = load_rows(write_jsonl(folder, {**GOOD, "boxes": [box], "box_format": box_format})).rows[0]
    assert row.boxes == (expected,)


@pytest.mark.parametrize("xyxy_1000", [False, True])
def test_boxes_lie_on_the_images_that_box_images_names(folder, xyxy_1000):
    (folder / "b.jpg").write_bytes(encode_picture(200, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "turned.jpg").write_bytes(encode_picture(200, 100, exif=exif))
    row = {"images": ["a.jpg", "b.jpg", "turned.jpg"], "question": "?", "boxes": [[0, 0, 20, 40]] * 3}
    row |= {"box_images": [2, 0, 1]}
    if xyxy_1000:
        row |= {"boxes": [[0, 0, 500, 250]] * 3, "box_format": "xyxy_1000"}
        expected = (Box(0, 0, 50, 50, image=2), Box(0, 0, 32, 12, image=0), Box(0, 0, 100, 25, image=1))
    else:
        expected = tuple(Box(0, 0, 20, 40, image=image) for image in (2, 0, 1))
    assert load_rows(write_jsonl(folder, row)).rows[0].boxes == expected


def test_size_is_read_once_per_image(folder, monkeypatch):
    from imagine_opd.data import rows

    seen = []
    monkeypatch.setattr(rows, "read_size", lambda image: seen.append(image) or (64, 48))
    item = {**GOOD, "boxes": [[0, 0, 500, 500]] * 9, "box_format": "xyxy_1000"}
    assert len(load_rows(write_jsonl(folder, item)).rows[0].boxes) == 9
    assert seen == [folder / "a.jpg"]


@pytest.mark.parametrize(
    ("answer", "options", "expected"),
    [
        ("B", ["red", "green"], "B"),
        ("b", ["red", "green"], "B"),
        (" (b) ", ["red", "green"], "B"),
        ("B.", ["red", "green"], "B"),
        ("b)", ["red", "green"], "B"),
        ("green", ["red", "green"], "B"),
        (7, [3, 7], "B"),
        ("A", ["A", "B"], "A"),
        ("(A)", ["B", "A"], "A"),
        ("Z", [str(index) for index in range(26)], "Z"),
        (None, ["red", "green"], None),
        ("(b)", [], "(b)"),
    ],
)
def test_answer_of_options_becomes_its_letter(folder, answer, options, expected):
    item = {**GOOD, "options": options, "answer": answer}
    assert load_rows(write_jsonl(folder, item)).rows[0].answer == expected


@pytest.mark.parametrize("name", ["~nouser/x.jpg", "~"])
def test_tilde_in_a_data_file_is_a_plain_name(folder, name):
    assert load_rows(write_jsonl(folder, {**GOOD, "image": name})).rows[0].images == (folder / name,)


def test_tilde_of_a_list_is_expanded_where_it_can_be():
    item = {"image": "~nouser/x.jpg", "question": "?"}
    assert load_rows([item]).rows[0].images == (Path("~nouser/x.jpg"),)
    assert load_rows([{**item, "image": "~/x.jpg"}]).rows[0].images == (Path("~/x.jpg").expanduser(),)


def test_unforeseen_fault_of_a_row_names_its_place():
    class Odd(dict):
        def get(self, name, default=None):
            raise LookupError("odd")

    with pytest.raises(RowError, match=r"row 0: cannot be read as a row \(LookupError: odd\)"):
        load_rows([Odd()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "rows.jsonl:2: has no question"),
        ({"question": "  "}, "rows.jsonl:2: question is empty"),
        ({"question": 3}, "rows.jsonl:2: question is int; expected text"),
        ({"image": None}, "rows.jsonl:2: has no image"),
        ({"images": ["a.jpg"]}, "rows.jsonl:2: has both 'image' and 'images'"),
        ({"image": 5}, "rows.jsonl:2: image is int"),
        ({"image": "../outside.jpg"}, "rows.jsonl:2: image '../outside.jpg' lies outside the data folder"),
        ({"image": "/etc/passwd"}, "rows.jsonl:2: image '/etc/passwd' lies outside the data folder"),
        ({"image": "https://x.org/a.jpg"}, "is a URL; nothing is downloaded"),
        ({"boxes": [[10, 4, 9, 20]]}, "rows.jsonl:2: box (10, 4, 9, 20) (xyxy) is reversed; expected x0 < x1"),
        ({"boxes": [[10, 4, 10, 20]]}, "rows.jsonl:2: box (10, 4, 10, 20) (xyxy) has no width"),
        ({"boxes": [[10, 4, 12, 4]]}, "has no height"),
        ({"boxes": [[10, 4, 12]]}, "has 3 numbers; expected 4"),
        ({"boxes": [[10, 4, 12, "x"]]}, "expected 4 numbers"),
        ({"boxes": [[10, 4, 12, float("inf")]]}, "is not finite"),
        ({"boxes": "1 2 3 4"}, "boxes is str; expected a list"),
        ({"box_format": "cxcywh"}, "box_format 'cxcywh'"),
        ({"options": "A or B"}, "options is str; expected a list"),
        ({"answer": ["x"]}, "answer is list; expected text"),
        ({"boxes": [[10, 4, 10**400, 20]]}, "expected 4 numbers that a float holds"),
        ({"image": {"bytes": "abc"}}, "rows.jsonl:2: image bytes are str; expected encoded bytes"),
        ({"image": {"bytes": 10**12}}, "rows.jsonl:2: image bytes are int; expected encoded bytes"),
        ({"image": {"bytes": [1, 2]}}, "rows.jsonl:2: image bytes are list; expected encoded bytes"),
        ({"image": "\ud800.png"}, "rows.jsonl:2: image path '\\ud800.png' is not a path"),
        ({"image": "loop.png"}, "rows.jsonl:2: image 'loop.png'"),
        ({"question": None, "messages": 5}, "rows.jsonl:2: messages is int; expected a list"),
        ({"question": None, "messages": [{"role": "user", "content": 7}]}, "content is int; expected text or a list"),
        (
            {"question": None, "messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "rows.jsonl:2: a text part of messages is NoneType; expected text",
        ),
        ({"question": "what\ud800?"}, "rows.jsonl:2: question holds '\\ud800', half a character"),
        ({"answer": "\ud800"}, "rows.jsonl:2: answer holds '\\ud800', half a character"),
        ({"options": ["red", "\ud800"]}, "rows.jsonl:2: options holds '\\ud800', half a character"),
        ({"options": ["red", None]}, "rows.jsonl:2: option B is NoneType; expected text"),
        ({"options": [str(i) for i in range(27)]}, "rows.jsonl:2: 27 options; expected at most 26"),
        ({"options": ["red", "blue"]}, "rows.jsonl:2: answer 'green' is none of the 2 options; expected A to B or"),
        ({"options": ["red", "blue"], "answer": "C"}, "answer 'C' is none of the 2 options"),
        ({"options": ["B", "A"], "answer": "A"}, "answer 'A' may mean option A or option B; write '(A)'"),
        ({"options": ["green", "green"]}, "answer 'green' may mean option A or option B"),
        ({"image": None, "images": ["a.jpg", "a.jpg"]}, "2 images and no box_images; expected the index"),
        ({"box_images": [1]}, "box_images [1]; expected whole numbers from 0 to 0"),
        ({"box_images": [True]}, "box_images [True]; expected whole numbers"),
        ({"box_images": [0, 0]}, "1 boxes, but box_images has 2"),
        ({"box_images": 0}, "box_images is int; expected a list"),
        ({"image": "pipe.png", "box_format": "xyxy_1000"}, "pipe.png cannot be read (it is not a regular file)"),
        ({"image": "bad.png", "box_format": "xyxy_1000"}, "bad.png is truncated"),
    ],
)
def test_malformed_row_is_named_with_place_value_and_fix(folder, change, message):
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    os.mkfifo(folder / "pipe.png")  # must not wait for a writer
    path = write_jsonl(folder, GOOD, {**GOOD, **change})
    with pytest.raises(RowError) as caught:
        load_rows(path)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)
    loaded = load_rows(path, bad_rows="skip")
    assert len(loaded.rows) == 1
    assert message in loaded.bad[0].message


def test_a_link_out_of_the_data_folder_is_refused(folder):
    (folder / "link.jpg").symlink_to(folder.parent / "outside.jpg")
    with pytest.raises(RowError, match="outside the data folder"):
        load_rows(write_jsonl(folder, {**GOOD, "image": "link.jpg"}))
    path = write_jsonl(folder, {**GOOD, "image": "data/link.jpg"})
    assert load_rows(path, image_root=folder.parent).rows[0].images == (folder / "link.jpg",)


def test_broken_lines_are_counted_and_all_named_at_once(folder):
    path = write_jsonl(folder, GOOD, "{", "[1]", {**GOOD, "question": None})
    with pytest.raises(RowError) as caught:
        load_rows(path)
    text = str(caught.value)
    assert "3 of 4 rows cannot be used" in text
    assert "rows.jsonl:2: not valid JSON" in text
    assert "rows.jsonl:3: expected an object" in text
    assert "rows.jsonl:4: has no question" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("rows.csv", "a,b", "unknown kind of file '.csv'"),
        ("rows.json", "{}", "expected a list of rows"),
        ("rows.json", "[", "not valid JSON"),
        ("empty.jsonl", "", "holds no row"),
    ],
)
def test_unusable_file_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RowError) as caught:
        load_rows(tmp_path / name)
    assert message in str(caught.value)


def test_source_of_another_kind_is_refused():
    with pytest.raises(RowError, match="data is int"):
        load_rows(5)
