"""One mapping to one `Row`: names, images, question and boxes checked, the first fault raised with its place."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagine_opd.errors import RowError
from imagine_opd.types import Box, ImageRef, Row

BOX_FORMATS = ("xyxy", "xywh", "xyxy_1000")
_ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "La", "RGBa"})
# Modes that PNG keeps as they are, so that files and PIL images meet the same colour rules.
_PNG_MODES = frozenset({"1", "L", "P", "RGB", "I;16"})


@dataclass(frozen=True, slots=True)
class RowContext:
    """Where a row comes from: its place for messages, the folder of relative paths, and the folder it may not leave."""

    source: str
    folder: Path
    root: Path | None
    box_format: str = "xyxy"


def parse_row(item: Mapping[str, Any], context: RowContext) -> Row:
    """The `Row` of a mapping with `image` or `images`, `question` or `messages`, and optional
    `boxes`, `box_format`, `answer`, `options`, `id`. Raises `RowError` naming the place, the value and the fix."""
    place = context.source
    if not isinstance(item, Mapping):
        raise RowError(f"{place}: expected an object with image and question, found {type(item).__name__}")
    images = _parse_images(item, context)
    return Row(
        images=images,
        question=_parse_question(item, place),
        boxes=_parse_boxes(item, context, images),
        answer=_parse_text(item, "answer", place),
        options=_parse_options(item, place),
        id=str(item["id"]) if item.get("id") is not None else "",
        source=place,
    )


def _parse_images(item: Mapping[str, Any], context: RowContext) -> tuple[ImageRef, ...]:
    if item.get("image") is not None and item.get("images") is not None:
        raise RowError(f"{context.source}: has both 'image' and 'images'; keep one")
    found = item.get("images")
    if found is None:
        found = [item["image"]] if item.get("image") is not None else []
    if isinstance(found, (str, bytes, Path)) or not isinstance(found, Sequence):
        found = [found]
    if len(found) == 0:
        raise RowError(f"{context.source}: has no image; expected 'image' or 'images'")
    return tuple(_parse_image(image, context) for image in found)


def _parse_image(image: Any, context: RowContext) -> ImageRef:
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, Mapping):  # the undecoded form of `datasets.Image`
        if image.get("bytes") is not None:
            return bytes(image["bytes"])
        image = image.get("path")
    if isinstance(image, (str, Path)):
        return _resolve_path(image, context)
    if hasattr(image, "save") and hasattr(image, "size"):  # a PIL image: lossless, its pixels as they stand
        try:
            return encode_image(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise RowError(f"{context.source}: the PIL image cannot be read ({error})") from error
    raise RowError(f"{context.source}: image is {type(image).__name__}; expected a path, encoded bytes or a PIL image")


def encode_image(image: Any) -> bytes:
    """A PIL image as PNG bytes, alpha blended on white as transformers does with one. Its EXIF is not applied: a PIL
    image is taken as it stands. Raises `OSError` or `ValueError` for a lazy image whose file cannot be read."""
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        from PIL import Image

        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    elif image.mode not in _PNG_MODES:
        image = image.convert("RGB")
    buffer = io.BytesIO()
    # Level 1: these bytes live in memory and are decoded again at once, so speed matters more than size.
    image.save(buffer, format="PNG", compress_level=1, exif=b"")
    return buffer.getvalue()


def _resolve_path(image: str | Path, context: RowContext) -> Path:
    text = str(image)
    if "://" in text:
        raise RowError(f"{context.source}: image {text!r} is a URL; nothing is downloaded, give a local file")
    if "\0" in text or not text:
        raise RowError(f"{context.source}: image path {text!r} is not a path")
    path = context.folder / Path(text).expanduser() if context.root is None else context.folder / text
    if context.root is not None:
        root = context.root.resolve()
        if not path.resolve().is_relative_to(root):
            raise RowError(
                f"{context.source}: image {text!r} lies outside the data folder {str(root)!r}; "
                "move it there or set image_root"
            )
    return path


def _parse_question(item: Mapping[str, Any], place: str) -> str:
    question = item.get("question")
    if question is None and item.get("messages") is not None:
        question = _question_of_messages(item["messages"], place)
    if question is None:
        raise RowError(f"{place}: has no question; expected 'question' or 'messages'")
    if not isinstance(question, str):
        raise RowError(f"{place}: question is {type(question).__name__}; expected text")
    if not question.strip():
        raise RowError(f"{place}: question is empty")
    return question


def _question_of_messages(messages: Any, place: str) -> str:
    turns = [turn for turn in messages if isinstance(turn, Mapping) and turn.get("role") == "user"]
    if len(turns) != 1:
        raise RowError(f"{place}: messages hold {len(turns)} user turns; expected exactly one")
    content = turns[0].get("content")
    if isinstance(content, str):
        return content.replace("<image>", "").strip()
    texts = [part.get("text", "") for part in content or [] if isinstance(part, Mapping) and part.get("type") == "text"]
    return "\n".join(texts).strip()


def _parse_boxes(item: Mapping[str, Any], context: RowContext, images: tuple[ImageRef, ...]) -> tuple[Box, ...]:
    boxes = item.get("boxes")
    if boxes is None:
        return ()
    box_format = item.get("box_format") or context.box_format
    if box_format not in BOX_FORMATS:
        raise RowError(f"{context.source}: box_format {box_format!r}; expected one of {', '.join(BOX_FORMATS)}")
    if _is_one_box(boxes):
        boxes = [boxes]
    if isinstance(boxes, (str, bytes)) or not isinstance(boxes, Sequence):
        raise RowError(f"{context.source}: boxes is {type(boxes).__name__}; expected a list of 4-number lists")
    return tuple(_parse_box(box, box_format, context, images) for box in boxes)


def _is_one_box(boxes: Any) -> bool:
    return isinstance(boxes, Sequence) and len(boxes) == 4 and all(isinstance(value, (int, float)) for value in boxes)


def _parse_box(box: Any, box_format: str, context: RowContext, images: tuple[ImageRef, ...]) -> Box:
    if isinstance(box, Box):
        return box
    place = context.source
    try:
        values = [float(value) for value in box]
    except (TypeError, ValueError):
        raise RowError(f"{place}: box {box!r}; expected 4 numbers") from None
    shown = f"({', '.join(f'{value:g}' for value in values)})"
    if len(values) != 4:
        raise RowError(f"{place}: box {shown} has {len(values)} numbers; expected 4")
    if not all(math.isfinite(value) for value in values):
        raise RowError(f"{place}: box {shown} is not finite; expected pixels")
    x0, y0, x1, y1 = values
    if box_format == "xywh":
        x1, y1 = x0 + x1, y0 + y1
    if x0 > x1 or y0 > y1:
        raise RowError(f"{place}: box {shown} ({box_format}) is reversed; expected x0 < x1 and y0 < y1")
    if x0 == x1 or y0 == y1:
        side = "width" if x0 == x1 else "height"
        raise RowError(f"{place}: box {shown} ({box_format}) has no {side}; expected x0 < x1 and y0 < y1")
    if box_format == "xyxy_1000":
        width, height = _size_of_image(images[0], place)
        x0, x1, y0, y1 = x0 * width / 1000, x1 * width / 1000, y0 * height / 1000, y1 * height / 1000
    return Box(x0, y0, x1, y1)


def _size_of_image(image: ImageRef, place: str) -> tuple[int, int]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            orientation = opened.getexif().get(0x0112, 1)
            width, height = opened.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise RowError(f"{place}: the image's size cannot be read ({error})") from error
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def _parse_text(item: Mapping[str, Any], name: str, place: str) -> str | None:
    value = item.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RowError(f"{place}: {name} is {type(value).__name__}; expected text")
    return str(value)


def _parse_options(item: Mapping[str, Any], place: str) -> tuple[str, ...]:
    options = item.get("options")
    if options is None:
        return ()
    if isinstance(options, str) or not isinstance(options, Sequence):
        raise RowError(f"{place}: options is {type(options).__name__}; expected a list of texts")
    return tuple(str(option) for option in options)
