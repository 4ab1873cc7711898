"""The tiny world's pictures: (seed, index) in; a drawn scene, its question, answer, trace and evidence box out.

A scene is 144x144 pixels, nine cells of 48. Five cells hold a coloured shape, and every shape bears a digit, so that
the question ("what digit is on the red circle ?") is answered only by finding the shape it names. `small` digits are
16 to 20 pixels high: plain to see in the scene, 5 to 7 pixels in what the student sees (48x48). `large` ones are 26
to 34 pixels high and stay readable there.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from imagine_opd.types import Box, Row

# H height, W width, C channels
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Glyphs = Literal["small", "large"]

SCENE_PX = 144
CELL_PX = 48
OBJECTS_PER_SCENE = 5

# One word a cell: a place is then found in one step of attention, not by combining two words first.
PLACES = (
    *("top-left", "top", "top-right"),
    *("left", "center", "right"),
    *("bottom-left", "bottom", "bottom-right"),
)
SHAPES = ("circle", "square", "diamond")
COLORS = {
    "red": (206, 44, 48),
    "green": (34, 142, 62),
    "blue": (38, 74, 214),
    "yellow": (246, 214, 50),
    "purple": (134, 44, 172),
    "cyan": (60, 208, 222),
    "orange": (250, 146, 38),
    "white": (240, 240, 236),
}
CAPTION_QUESTION = "what is on the image ?"
LISTING_QUESTION = "look at the image ."

# Glyph heights in scene pixels. All even: a box of even sides around a whole-pixel centre grows to exactly 32x32.
_GLYPH_HEIGHTS_PX: dict[Glyphs, tuple[int, ...]] = {"small": (16, 18, 20), "large": (26, 28, 30, 32, 34)}
_GLYPH_STREAM: dict[Glyphs, int] = {"small": 0, "large": 1}

_DIGITS = (
    "01110 10001 10001 10001 10001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
_BITMAPS = tuple(np.array([[int(bit) for bit in line] for line in digit.split()], dtype=np.int64) for digit in _DIGITS)


@dataclass(frozen=True, slots=True)
class SceneObject:
    """A shape and the digit on it. `row` and `column` name its cell; `box` is tight around the digit."""

    color: str
    shape: str
    digit: int
    row: int
    column: int
    box: Box

    @property
    def place(self) -> str:
        """The cell in a word, as traces and captions say it."""
        return PLACES[3 * self.row + self.column]

    @property
    def caption(self) -> str:
        """Where it is, what it is and which digit it bears: `bottom-right red circle 7 .`"""
        return f"{self.place} {self.color} {self.shape} {self.digit} ."


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture (PNG bytes) with one question about it.

    `box` is tight around the digit asked for, `wrong_box` around another object's, whose digit differs.
    `hint` says the same of the object asked for in words, `wrong_hint` of that other one.
    `trace` is the reference response; `objects` are in raster order and `target` is the index asked for.
    """

    image: bytes
    question: str
    answer: str
    trace: str
    box: Box
    wrong_box: Box
    objects: tuple[SceneObject, ...]
    target: int
    id: str

    @property
    def hint(self) -> str:
        """The object asked for in words."""
        return self.objects[self.target].caption

    @property
    def wrong_hint(self) -> str:
        """The object of `wrong_box` in words."""
        return next(item.caption for item in self.objects if item.box == self.wrong_box)

    @property
    def caption(self) -> str:
        """Every object in raster order: the response to `CAPTION_QUESTION`."""
        return " ".join(item.caption for item in self.objects)

    def list_objects(self, order: list[int]) -> str:
        """The objects in this order, name before place: the response to `LISTING_QUESTION`."""
        items = [self.objects[index] for index in order]
        return " . ".join(f"{item.color} {item.shape} {item.place} {item.digit}" for item in items) + " ."


def make_scenes(count: int, seed: int, glyphs: Glyphs = "small") -> list[Scene]:
    """Draw `count` scenes. Scene `i` depends on (seed, i, glyphs) alone, so a longer list starts with a shorter one."""
    return [_make_scene(seed, index, glyphs) for index in range(count)]


def scenes_to_rows(scenes: list[Scene], views: Literal["right", "wrong"] = "right") -> list[Row]:
    """Rows of the package for these scenes; `wrong` views, box and hint, point the teacher at another object's digit.

    The answer is in the row for evaluation; training does not read it unless told to.
    """
    return [
        Row(
            images=(scene.image,),
            question=scene.question,
            boxes=(scene.box if views == "right" else scene.wrong_box,),
            answer=scene.answer,
            id=scene.id,
            source=f"tiny world {scene.id}",
            hint=scene.hint if views == "right" else scene.wrong_hint,
        )
        for scene in scenes
    ]


def decode_scene(image: bytes) -> Pixels:
    """The pixels `[H, W, 3]` of an encoded scene."""
    with Image.open(io.BytesIO(image)) as picture:
        return np.array(picture.convert("RGB"))


def _make_scene(seed: int, index: int, glyphs: Glyphs) -> Scene:
    # RandomState: its stream is frozen by numpy's policy, where Generator's may change between versions.
    rng = np.random.RandomState([seed, index, _GLYPH_STREAM[glyphs]])
    cells = np.sort(rng.permutation(9)[:OBJECTS_PER_SCENE])
    colors = rng.permutation(len(COLORS))[:OBJECTS_PER_SCENE]
    digits = rng.permutation(10)[:OBJECTS_PER_SCENE]
    canvas_HWC = _draw_background(rng)
    objects = []
    for cell, color_index, digit in zip(cells.tolist(), colors.tolist(), digits.tolist(), strict=True):
        color = tuple(COLORS)[color_index]
        shape = SHAPES[rng.randint(len(SHAPES))]
        row, column = divmod(cell, 3)
        center_y = row * CELL_PX + CELL_PX // 2 + rng.randint(-2, 3)
        center_x = column * CELL_PX + CELL_PX // 2 + rng.randint(-2, 3)
        _draw_shape(canvas_HWC, shape, color, center_x, center_y, radius_px=int(rng.randint(20, 24)))
        heights = _GLYPH_HEIGHTS_PX[glyphs]
        box = _draw_digit(
            canvas_HWC,
            digit,
            color,
            center_x=center_x + rng.randint(-2, 3),
            center_y=center_y + rng.randint(-2, 3),
            height_px=heights[rng.randint(len(heights))],
        )
        objects.append(SceneObject(color, shape, digit, row, column, box))
    target = int(rng.randint(OBJECTS_PER_SCENE))
    wrong = (target + int(rng.randint(1, OBJECTS_PER_SCENE))) % OBJECTS_PER_SCENE
    asked = objects[target]
    return Scene(
        image=_encode_png(np.rint(canvas_HWC).astype(np.uint8)),
        question=f"what digit is on the {asked.color} {asked.shape} ?",
        answer=str(asked.digit),
        trace=f"look at {asked.place} . zoom . i see {asked.digit} . <answer> {asked.digit} </answer>",
        box=asked.box,
        wrong_box=objects[wrong].box,
        objects=tuple(objects),
        target=target,
        id=f"{glyphs}-{seed}-{index}",
    )


def _draw_background(rng: np.random.RandomState) -> Floats:
    """A soft field of six by six greyish colours with a little grain, in 3x3 blocks.

    The student sees one block as one pixel; drawing a ninth of the pixels keeps scenes cheap and their PNG small.
    """
    blocks = SCENE_PX // 3
    knots = rng.randint(70, 131, size=(6, 6, 3)).astype(np.float64)
    place = (np.arange(blocks) + 0.5) * 5 / blocks
    low = place.astype(np.int64)
    part = place - low
    rows = knots[low] * (1 - part)[:, None, None] + knots[low + 1] * part[:, None, None]
    field_HWC = rows[:, low] * (1 - part)[None, :, None] + rows[:, low + 1] * part[None, :, None]
    field_HWC = np.rint(field_HWC) + rng.randint(-6, 7, size=(blocks, blocks, 1))
    tiled_HWC: Floats = field_HWC.repeat(3, axis=0).repeat(3, axis=1)
    return tiled_HWC


def _draw_shape(canvas_HWC: Floats, shape: str, color: str, center_x: int, center_y: int, *, radius_px: int) -> None:
    # Only the window the shape can reach is touched: a diamond reaches 1.2 radii and a soft edge.
    rows = np.arange(max(0, center_y - 30), min(SCENE_PX, center_y + 30))
    columns = np.arange(max(0, center_x - 30), min(SCENE_PX, center_x + 30))
    dy = np.abs(rows - center_y + 0.5)[:, None]
    dx = np.abs(columns - center_x + 0.5)[None, :]
    if shape == "circle":
        inside_px = radius_px - np.sqrt(dx * dx + dy * dy)
    elif shape == "square":
        inside_px = radius_px * 0.9 - np.maximum(dx, dy)
    else:
        inside_px = (radius_px * 1.2 - dx - dy) * 0.75
    cover = np.clip(inside_px + 0.5, 0.0, 1.0)[:, :, None]
    window_HWC = canvas_HWC[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    window_HWC += cover * (np.array(COLORS[color], dtype=np.float64) - window_HWC)


def _draw_digit(canvas_HWC: Floats, digit: int, color: str, *, center_x: int, center_y: int, height_px: int) -> Box:
    """Draw in black or white, whichever stands out, and return the tight box."""
    width_px = 2 * round(height_px * 5 / 14)
    x0, y0 = center_x - width_px // 2, center_y - height_px // 2
    cover = _resize_bitmap(_BITMAPS[digit], height_px, width_px)[:, :, None]
    red, green, blue = COLORS[color]
    ink = 0.0 if 299 * red + 587 * green + 114 * blue > 128_000 else 255.0
    patch = canvas_HWC[y0 : y0 + height_px, x0 : x0 + width_px]
    patch += cover * (ink - patch)
    columns = np.flatnonzero(cover[:, :, 0].any(axis=0))
    # A narrow digit (1) fills the middle of its frame; both sides shrink alike, so the box keeps its centre and parity.
    inset = int(min(columns[0], width_px - 1 - columns[-1]))
    return Box(x0 + inset, y0, x0 + width_px - inset, y0 + height_px)


def _resize_bitmap(bitmap: np.ndarray[Any, np.dtype[np.int64]], height: int, width: int) -> Floats:
    """Box-filter resize in whole numbers: the share of ink under each output pixel."""
    ink = _overlaps(bitmap.shape[0], height) @ bitmap @ _overlaps(bitmap.shape[1], width).T
    share: Floats = ink / (bitmap.shape[0] * bitmap.shape[1])
    return share


def _overlaps(source: int, target: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How much of each of `source` cells lies under each of `target` cells, in units of 1/(source*target)."""
    out = np.arange(target)[:, None] * source
    cell = np.arange(source)[None, :] * target
    lengths: np.ndarray[Any, np.dtype[np.int64]] = np.minimum(out + source, cell + target) - np.maximum(out, cell)
    return lengths.clip(min=0)


def _encode_png(pixels_HWC: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
