"""The contact sheet: a few scenes with what each side sees and what the student said before and after, as one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from imagine_opd.demo.scenes import Pixels
from imagine_opd.types import Box

_Color = tuple[int, int, int]

# 192 px: a whole multiple of the student's 48 and the crop's 32, so that NEAREST shows their true pixels.
_TILE_PX = 192
_GAP_PX = 14
_PAD_PX = 20
_MARGIN_PX = 32
_COLUMNS = 2
_LINE_PX = 32
_CARD_W = 2 * _PAD_PX + 3 * _TILE_PX + 2 * _GAP_PX
_CARD_H = 2 * _PAD_PX + 38 + 22 + _TILE_PX + 18 + 2 * _LINE_PX - 14

_PAGE: _Color = (238, 240, 243)
_CARD: _Color = (255, 255, 255)
_EDGE: _Color = (208, 213, 220)
_INK: _Color = (28, 32, 38)
_SOFT: _Color = (98, 106, 117)
_RIGHT: _Color = (20, 116, 58)
_WRONG: _Color = (190, 38, 46)
_OUTLINE: _Color = (255, 0, 170)


@dataclass(frozen=True, slots=True)
class SheetRow:
    """One scene of the sheet. image: encoded scene; box: the evidence on it; student_view: `[H, W, 3]` uint8 as the
    student sees it; evidence: what the teacher sees beside or instead, or the words it is told, under
    `evidence_label`; gold: the right answer; *_text: the student's responses; *_ok: were they right."""

    image: bytes
    box: Box
    student_view: Pixels
    evidence: Pixels | str
    question: str
    gold: str
    before_text: str
    after_text: str
    before_ok: bool
    after_ok: bool
    evidence_label: str = "evidence crop, teacher only"


def draw_contact_sheet(
    rows: Sequence[SheetRow], path: Path, title: str = "What the student learned to see", subtitle: str = ""
) -> None:
    """Write the sheet: two cards a line, and the title above. `subtitle` is one line of figures."""
    lines = -(-len(rows) // _COLUMNS)
    header_px = _MARGIN_PX + 44 + (32 if subtitle else 0) + 12
    width = 2 * _MARGIN_PX + _COLUMNS * _CARD_W + (_COLUMNS - 1) * _GAP_PX
    height = header_px + lines * (_CARD_H + _GAP_PX) - _GAP_PX + _MARGIN_PX
    page = Image.new("RGB", (width, height), _PAGE)
    draw = ImageDraw.Draw(page)
    _write(draw, (_MARGIN_PX, _MARGIN_PX), title, 32, _INK, width - 2 * _MARGIN_PX, bold=True)
    if subtitle:
        _write(draw, (_MARGIN_PX, _MARGIN_PX + 46), subtitle, 19, _SOFT, width - 2 * _MARGIN_PX)
    for index, row in enumerate(rows):
        line, column = divmod(index, _COLUMNS)
        corner = (_MARGIN_PX + column * (_CARD_W + _GAP_PX), header_px + line * (_CARD_H + _GAP_PX))
        _draw_card(page, draw, row, corner)
    page.save(path, format="PNG", optimize=True)


def _draw_card(page: Image.Image, draw: ImageDraw.ImageDraw, row: SheetRow, corner: tuple[int, int]) -> None:
    left, top = corner
    frame = (left, top, left + _CARD_W - 1, top + _CARD_H - 1)
    draw.rounded_rectangle(frame, radius=10, fill=_CARD, outline=_EDGE)
    x, y = left + _PAD_PX, top + _PAD_PX - 4
    inner = _CARD_W - 2 * _PAD_PX
    _write(draw, (x, y), row.question, 21, _INK, inner - 90, bold=True)
    draw.text((x + inner, y + 2), f"answer {row.gold}", font=_font(19), fill=_SOFT, anchor="ra")
    y += 38
    scene_px = Image.open(io.BytesIO(row.image)).width
    tiles = (
        (f"scene, {scene_px} px", _tile_scene(row)),
        (f"student sees, {row.student_view.shape[1]} px", _tile_pixels(row.student_view)),
        (row.evidence_label, _tile_evidence(row.evidence)),
    )
    for index, (label, tile) in enumerate(tiles):
        tile_x = x + index * (_TILE_PX + _GAP_PX)
        _write(draw, (tile_x, y), label, 15, _SOFT, _TILE_PX)
        page.paste(tile, (tile_x, y + 22))
        draw.rectangle((tile_x - 1, y + 21, tile_x + _TILE_PX, y + 22 + _TILE_PX), outline=_EDGE)
    y += 22 + _TILE_PX + 18
    for name, text, correct in (("before", row.before_text, row.before_ok), ("after", row.after_text, row.after_ok)):
        color = _RIGHT if correct else _WRONG
        _draw_mark(draw, (x, y), correct, color)
        _write(draw, (x + 32, y), name, 18, _SOFT, 60)
        _write(draw, (x + 98, y), text, 18, color, inner - 98)
        y += _LINE_PX


def _tile_scene(row: SheetRow) -> Image.Image:
    with Image.open(io.BytesIO(row.image)) as picture:
        scale = _TILE_PX / picture.width
        tile: Image.Image = picture.convert("RGB").resize((_TILE_PX, _TILE_PX), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(tile)
    edges = (row.box.x0 * scale, row.box.y0 * scale, row.box.x1 * scale, row.box.y1 * scale)
    x0, y0, x1, y1 = (round(edge) for edge in edges)
    # White under magenta: one of the two stands out on every colour of shape.
    draw.rectangle((x0 - 5, y0 - 5, x1 + 4, y1 + 4), outline=(255, 255, 255), width=5)
    draw.rectangle((x0 - 4, y0 - 4, x1 + 3, y1 + 3), outline=_OUTLINE, width=3)
    return tile


def _tile_evidence(evidence: Pixels | str) -> Image.Image:
    if not isinstance(evidence, str):
        return _tile_pixels(evidence)
    tile = Image.new("RGB", (_TILE_PX, _TILE_PX), _PAGE)
    draw = ImageDraw.Draw(tile)
    for line, word in enumerate(evidence.split()):
        _write(draw, (_PAD_PX, _PAD_PX + line * _LINE_PX), word, 21, _INK, _TILE_PX - 2 * _PAD_PX)
    return tile


def _tile_pixels(pixels_HWC: Pixels) -> Image.Image:
    return Image.fromarray(pixels_HWC).resize((_TILE_PX, _TILE_PX), Image.Resampling.NEAREST)


def _draw_mark(draw: ImageDraw.ImageDraw, corner: tuple[int, int], correct: bool, color: _Color) -> None:
    """A tick in a disc or a cross in a square: told apart by shape too, not by colour alone."""
    x, y = corner
    if correct:
        draw.ellipse((x, y, x + 22, y + 22), fill=color)
        draw.line(((x + 6, y + 12), (x + 10, y + 16), (x + 17, y + 7)), fill=_CARD, width=3, joint="curve")
    else:
        draw.rectangle((x + 1, y + 1, x + 21, y + 21), fill=color)
        draw.line(((x + 6, y + 6), (x + 16, y + 16)), fill=_CARD, width=3)
        draw.line(((x + 16, y + 6), (x + 6, y + 16)), fill=_CARD, width=3)


def _write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    size: int,
    color: _Color,
    width_px: int,
    *,
    bold: bool = False,
) -> None:
    """One line of text, cut with dots where it would run over `width_px`."""
    font = _font(size)
    text = " ".join(text.split())
    if draw.textlength(text, font=font) > width_px:
        while text and draw.textlength(text + "...", font=font) > width_px:
            text = text[:-1]
        text += "..."
    # Pillow carries one weight of its font; a thin stroke of the same colour stands in for bold.
    draw.text(corner, text, font=font, fill=color, stroke_width=0.4 if bold else 0, stroke_fill=color)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
