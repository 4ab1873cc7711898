"""Explanations as text and as a page: hostile texts are shown and never obeyed, pictures arrive as they were given."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from imagine_opd.errors import OutputError
from imagine_opd.explanation import Explanation, Original, RunSize, Setting, ShownImage, SideFacts, TokenFacts
from imagine_opd.pictures import Picture
from imagine_opd.report import format_page, format_text, write_page
from imagine_opd.report.page import draw_boxes, encode_picture
from imagine_opd.report.text import make_printable
from imagine_opd.types import Box

HOSTILE = '<script>alert("1")</script>\x1b[2J\u202e</pre></style><img src=http://evil/ onerror=x> &amp; \'"'
VOID = {"meta", "img", "br"}


def draw_noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_side(text="what is it ?", pixels=None):
    picture = Picture("whole", draw_noise(48, 32) if pixels is None else pixels)
    return SideFacts(text, (ShownImage(1, 144, 96, 6, (picture,)),), 10, 6, 16, (12, 12, 12))


def make_explanation(text="what is it ?", **changes) -> Explanation:
    token = TokenFacts(text, 7, 0.5, -0.25, -0.75, 0.125, 1.0)
    found = Explanation(
        row_index=3,
        source=text,
        id=text,
        question=text,
        options=(text, "two"),
        boxes=(Box(10, 20, 30, 40),),
        answer=text,
        originals=(Original(draw_noise(144, 96), 144, 96, (Box(10, 20, 30, 40),), (Box(8, 18, 32, 42),)),),
        student=make_side(text),
        teacher=make_side(text),
        neutral=make_side(text),
        teacher_kind=text,
        privilege=(text,),
        tokens=(token, dataclasses.replace(token, text="cold", reverse_kl=0.0)),
        dropped=text,
        teacher_checks=((text, 0.5),),
        teacher_fault=text,
        memory=(text,),
        settings=(Setting("student_prompt_template", text, text),),
        size=RunSize(8, 4, 2, 8, 16.0, 16.0, 18, 832.0),
    )
    return dataclasses.replace(found, **changes)


class Page(HTMLParser):
    """Elements, texts and pictures of a page; every element must be closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def pictures(self):
        found = []
        for tag, attributes in self.tags:
            if tag == "img":
                kind, data = attributes["src"].split(";base64,")
                assert kind in ("data:image/png", "data:image/jpeg")
                found.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
        return found


def test_hostile_texts_are_shown_and_open_no_element():
    page = format_page(make_explanation(HOSTILE))
    parsed, plain = Page(page), Page(format_page(make_explanation("x")))
    assert parsed.open == []
    # The same elements and attributes as of a harmless text: nothing of it became markup.
    assert [(tag, sorted(attributes)) for tag, attributes in parsed.tags] == [
        (tag, sorted(attributes)) for tag, attributes in plain.tags
    ]
    shown = make_printable(HOSTILE)
    assert "".join(parsed.texts).count(shown) >= 12
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_page_needs_nothing_from_outside():
    parsed = Page(format_page(make_explanation()))
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert "link" not in {tag for tag, _ in parsed.tags}
    assert all(attributes["src"].startswith("data:image/") for tag, attributes in parsed.tags if tag == "img")
    policy = [a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    style = "".join(parsed.texts)
    assert "url(" not in style
    assert "@import" not in style


def test_long_words_wrap_and_nothing_is_wider_than_a_phone():
    word = "w" * 5000
    page = format_page(make_explanation(word))
    assert page.count(word) >= 5
    assert "overflow-wrap: anywhere" in page
    parsed = Page(page)
    assert not [a for _, a in parsed.tags if "min-width" in (a.get("style") or "")]
    for tag, attributes in parsed.tags:
        if tag == "img":
            assert int(attributes["width"]) <= 720
    assert "img { display: block; max-width: 100%; height: auto;" in page
    assert "prefers-color-scheme: dark" in page


def test_small_pictures_arrive_pixel_for_pixel():
    pixels = draw_noise(48, 32, seed=9)
    found = make_explanation(student=make_side(pixels=pixels))
    pictures = Page(format_page(found)).pictures()
    assert len(pictures) == 4
    np.testing.assert_array_equal(np.asarray(pictures[1]), pixels)


def test_large_pictures_are_shrunk_to_the_page():
    pixels = np.zeros((900, 1800, 3), dtype=np.uint8)
    pixels[:, 900:] = (200, 100, 50)
    kind, data = encode_picture(pixels).split(";base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (kind, picture.size) == ("data:image/jpeg", (720, 360))
    assert np.abs(np.asarray(picture)[180, 700].astype(int) - (200, 100, 50)).max() <= 3


def test_boxes_are_drawn_where_they_lie_on_a_shrunk_original():
    grey = np.full((50, 100, 3), 128, dtype=np.uint8)
    drawn = draw_boxes(Original(grey, 200, 100, (Box(20, 10, 60, 40),), (Box(10, 4, 70, 50),)))
    assert drawn.shape == (200, 400, 3)  # twice the original's size
    assert (drawn[30:70, 40] == (255, 0, 170)).all()
    assert (drawn[30:70, 119] == (255, 0, 170)).all()
    assert (drawn[20:90, 20] == (0, 200, 255)).all()
    assert (drawn[50, 24:38] == 128).all()
    assert (drawn[50, 44:116] == 128).all()


def test_tokens_are_shaded_by_their_share_of_the_largest_kl():
    tokens = tuple(TokenFacts(f"t{kl}", 1, kl, -0.1, -0.2, 0.3, 1.0) for kl in (0.0, 1.0, 4.0, math.nan))
    parsed = Page(format_page(make_explanation(tokens=tokens)))
    spans = [a for tag, a in parsed.tags if tag == "span" and "--kl" in (a.get("style") or "")]
    assert [span["style"] for span in spans] == ["--kl:0.000", "--kl:0.250", "--kl:1.000", "--kl:0.000"]
    assert spans[2]["title"] == "KL 4.0000, student -0.1000, teacher -0.2000, entropy 0.3000"
    assert "4.0000 nats" in parsed.texts


def test_a_row_without_tokens_says_why():
    found = make_explanation(tokens=(), dropped="vision_token")
    assert "rollout    no token (vision_token): this row would not train" in format_text(found)
    assert "No token (vision_token): this row would not train." in format_page(found)


def test_weights_are_shown_where_a_token_is_left_out():
    found = make_explanation()
    assert "weight" not in format_text(found)
    found = dataclasses.replace(found, tokens=(dataclasses.replace(found.tokens[0], weight=0.0), found.tokens[1]))
    assert "weight" in format_text(found)
    assert '<th scope="col">weight</th>' in format_page(found)


@pytest.mark.parametrize("colour", [False, True])
def test_text_sends_no_code_of_a_row_to_the_terminal(colour):
    text = format_text(make_explanation(HOSTILE), colour=colour)
    assert "\u202e" not in text
    assert "\x1b[2J" not in text
    assert ("\x1b[30;48;5;" in text) == colour
    assert r"\x1b[2J\u202e" in text


def test_printable_text_keeps_letters_of_every_script():
    kept = "naïve 你好 नमस्ते 👩‍🔬 می‌روم\n\t\u00a0"
    assert make_printable(kept) == kept
    assert make_printable("a\x00\x07\u2066b\ud800") == r"a\x00\x07\u2066b\ud800"


def test_page_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_page(make_explanation(), tmp_path / "file" / "page.html")
    write_page(make_explanation(), tmp_path / "new" / "page.html")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
