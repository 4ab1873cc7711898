"""One mapping to one `Row`: names, images, question and boxes checked, the first fault raised with its place."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imagine_opd._rust import read_size
from imagine_opd.errors import RowError
from imagine_opd.types import Box, ImageRef, Row

BOX_FORMATS = ("xyxy", "xywh", "xyxy_1000")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
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
    """The `Row` of a mapping with `image` or `images`, `question` or `messages`, and optional `boxes`, `box_format`,
    `box_images`, `answer`, `options`, `id`, `teacher_images`, `hint` (or `privileged_context`). Of a row with options,
    `answer` becomes the letter.

    Raises:
        RowError: names the place, the value and the fix.
    """
    place = context.source
    if not isinstance(item, Mapping):
        raise RowError(f"{place}: expected an object with image and question, found {type(item).__name__}")
    try:
        return _parse_fields(item, context)
    except RowError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        # One odd row among thousands: it is named, and those who skip bad rows skip it.
        raise RowError(f"{place}: cannot be read as a row ({type(error).__name__}: {error})") from error


def _parse_fields(item: Mapping[str, Any], context: RowContext) -> Row:
    place = context.source
    images = _parse_images(item, context)
    options = _parse_options(item, place)
    return Row(
        images=images,
        question=_parse_question(item, place),
        boxes=_parse_boxes(item, context, images),
        answer=_parse_answer(item, options, place),
        options=options,
        id=str(item["id"]) if item.get("id") is not None else "",
        source=place,
        teacher_images=_parse_teacher_images(item, context),
        hint=_parse_text(item, "hint", place) or _parse_text(item, "privileged_context", place) or "",
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


def _parse_teacher_images(item: Mapping[str, Any], context: RowContext) -> tuple[ImageRef, ...]:
    found = item.get("teacher_images")
    if found is None:
        return ()
    if isinstance(found, (str, bytes, Path)) or not isinstance(found, Sequence):
        found = [found]
    return tuple(_parse_image(image, context) for image in found)


def _parse_image(image: Any, context: RowContext) -> ImageRef:
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, Mapping):  # the undecoded form of `datasets.Image`
        data = image.get("bytes")
        if isinstance(data, (bytes, bytearray, memoryview)):
            return bytes(data)
        if data is not None:
            raise RowError(f"{context.source}: image bytes are {type(data).__name__}; expected encoded bytes")
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
    """A PIL image as PNG bytes of what `flatten_image` makes of it. Raises `OSError` or `ValueError` for a lazy image
    whose file cannot be read."""
    from PIL import Image

    kept = image.mode in _PNG_MODES and "transparency" not in image.info
    buffer = io.BytesIO()
    # Level 1: these bytes live in memory and are decoded again at once, so speed matters more than size.
    image = image if kept else Image.fromarray(flatten_image(image))
    image.save(buffer, format="PNG", compress_level=1, exif=b"")
    return buffer.getvalue()


def flatten_image(image: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A PIL image as RGB8 `[height, width, 3]`, alpha blended on white as recent transformers do with one. Its EXIF is
    not applied: a PIL image is taken as it stands. Raises `OSError` or `ValueError` for a lazy image whose file cannot
    be read."""
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        from PIL import Image

        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    elif image.mode.startswith("I;16"):  # the high byte, as of a file with 16 bits
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def _resolve_path(image: str | Path, context: RowContext) -> Path:
    text = str(image)
    if "://" in text:
        raise RowError(f"{context.source}: image {text!r} is a URL; nothing is downloaded, give a local file")
    if "\0" in text or not text or not _can_encode(text):
        raise RowError(f"{context.source}: image path {text!r} is not a path")
    if context.root is None:
        try:
            return context.folder / Path(text).expanduser()
        except RuntimeError:  # no such user: a plain name that begins with a tilde
            return context.folder / text
    path = context.folder / text
    root = context.root.resolve()
    try:
        inside = path.resolve().is_relative_to(root)
    except (OSError, RuntimeError) as error:
        raise RowError(f"{context.source}: image {text!r} cannot be found ({error})") from error
    if not inside:
        raise RowError(
            f"{context.source}: image {text!r} lies outside the data folder {str(root)!r}; "
            "move it there or set image_root"
        )
    return path


def _can_encode(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeError:
        return False
    return True


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
    return _check_text(question, "question", place)


def _check_text(text: str, name: str, place: str) -> str:
    """The text, when it is text: JSON may hold half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start : error.end]
        raise RowError(f"{place}: {name} holds {half!r}, half a character; expected text that UTF-8 holds") from None
    return text


def _question_of_messages(messages: Any, place: str) -> str:
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise RowError(f"{place}: messages is {type(messages).__name__}; expected a list of turns")
    turns = [turn for turn in messages if isinstance(turn, Mapping) and turn.get("role") == "user"]
    if len(turns) != 1:
        raise RowError(f"{place}: messages hold {len(turns)} user turns; expected exactly one")
    content = turns[0].get("content")
    if isinstance(content, str):
        return content.replace("<image>", "").strip()
    if content is not None and not isinstance(content, Sequence):
        raise RowError(f"{place}: content is {type(content).__name__}; expected text or a list of parts")
    texts = [part.get("text", "") for part in content or [] if isinstance(part, Mapping) and part.get("type") == "text"]
    for text in texts:
        if not isinstance(text, str):
            raise RowError(f"{place}: a text part of messages is {type(text).__name__}; expected text")
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
    try:
        places = place_boxes(boxes, item.get("box_images"), len(images))
    except RowError as error:
        raise RowError(f"{context.source}: {error}") from None
    sizes: dict[int, tuple[int, int]] = {}
    if box_format == "xyxy_1000":
        sizes = {index: _size_of_image(images[index], index, context.source) for index in sorted(set(places))}
    return tuple(
        _parse_box(box, box_format, context.source, index, sizes.get(index))
        for box, index in zip(boxes, places, strict=True)
    )


def place_boxes(boxes: Sequence[Any], box_images: Any, image_count: int) -> list[int]:
    """The index of the image on which each box lies; a `Box` says it itself, a plain one by `box_images`.

    Raises:
        RowError: what is wrong with `box_images`, or that it is missing where there are several images.
    """
    if box_images is None:
        if image_count > 1 and not all(isinstance(box, Box) for box in boxes):
            raise RowError(
                f"the row has {image_count} images and no box_images; expected the index of the image of each box"
            )
        return [box.image if isinstance(box, Box) else 0 for box in boxes]
    if isinstance(box_images, (str, bytes)) or not isinstance(box_images, Sequence):
        raise RowError(f"box_images is {type(box_images).__name__}; expected a list of image indices")
    if len(box_images) != len(boxes):
        raise RowError(f"the row has {len(boxes)} boxes, but box_images has {len(box_images)}; expected one each")
    for index in box_images:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < image_count:
            shown = list(box_images)
            raise RowError(f"box_images {shown!r}; expected whole numbers from 0 to {image_count - 1}")
    return [box.image if isinstance(box, Box) else index for box, index in zip(boxes, box_images, strict=True)]


def _is_one_box(boxes: Any) -> bool:
    return isinstance(boxes, Sequence) and len(boxes) == 4 and all(isinstance(value, (int, float)) for value in boxes)


def _parse_box(box: Any, box_format: str, place: str, image: int, size: tuple[int, int] | None) -> Box:
    if isinstance(box, Box):
        return box
    try:
        values = [float(value) for value in box]
    except OverflowError:
        raise RowError(
            f"{place}: a box has a side of hundreds of digits; expected 4 numbers that a float holds"
        ) from None
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
    if size is not None:
        width, height = size
        x0, x1, y0, y1 = x0 * width / 1000, x1 * width / 1000, y0 * height / 1000, y1 * height / 1000
    return Box(x0, y0, x1, y1, image=image)


def _size_of_image(image: ImageRef, index: int, place: str) -> tuple[int, int]:
    """(width, height) after EXIF, by the reader that also makes the views: boxes and pixels share one frame."""
    try:
        return read_size(image)
    except ValueError as error:
        raise RowError(f"{place}: image {index if isinstance(image, bytes) else image} {error}") from error


def _parse_text(item: Mapping[str, Any], name: str, place: str) -> str | None:
    value = item.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RowError(f"{place}: {name} is {type(value).__name__}; expected text")
    return _check_text(str(value), name, place)


def _parse_answer(item: Mapping[str, Any], options: tuple[str, ...], place: str) -> str | None:
    """The answer's text; where there are options its letter, given as `B`, `b`, `(b)`, `B.` or the option's text."""
    answer = _parse_text(item, "answer", place)
    if answer is None or not options:
        return answer
    letters = LETTERS[: len(options)]
    found = {letter for letter, option in zip(letters, options, strict=True) if option.strip() == answer.strip()}
    match = re.fullmatch(r"(\()?\s*([A-Za-z])\s*[).:]?", answer.strip())
    if match and match.group(2).upper() in letters:
        found.add(match.group(2).upper())
    if len(found) == 1:
        return found.pop()
    if found:
        one, other = sorted(found)[:2]
        raise RowError(
            f"{place}: answer {answer!r} may mean option {one} or option {other}; write '({one})' or '({other})'"
        )
    raise RowError(
        f"{place}: answer {answer!r} is none of the {len(options)} options; "
        f"expected A to {letters[-1]} or the text of an option"
    )


def _parse_options(item: Mapping[str, Any], place: str) -> tuple[str, ...]:
    options = item.get("options")
    if options is None:
        return ()
    if isinstance(options, str) or not isinstance(options, Sequence):
        raise RowError(f"{place}: options is {type(options).__name__}; expected a list of texts")
    if len(options) > len(LETTERS):
        raise RowError(f"{place}: {len(options)} options; expected at most {len(LETTERS)}, one per letter")
    for letter, option in zip(LETTERS, options, strict=False):
        if not isinstance(option, (str, int, float)):
            raise RowError(f"{place}: option {letter} is {type(option).__name__}; expected text")
    return tuple(_check_text(str(option), "options", place) for option in options)
