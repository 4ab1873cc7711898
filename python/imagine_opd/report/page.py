"""An `Explanation` as one HTML page that needs nothing else: pictures are data URIs, there is no script.

Texts of rows and models are hostile until shown otherwise: each goes through `show`, which escapes it.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from imagine_opd.errors import OutputError
from imagine_opd.explanation import Explanation, Original, ShownImage, SideFacts, TokenFacts
from imagine_opd.pictures import Pixels
from imagine_opd.report.style import STYLE
from imagine_opd.report.text import (
    describe_absence,
    describe_box,
    describe_means,
    describe_privilege,
    describe_size,
    describe_tokens,
    make_printable,
)

_LARGEST_PX = 720  # of a picture on the page
_LOSSLESS_AREA = 256 * 256
_SMALL_PX = 160  # pictures below are blown up by whole numbers, so that their pixels can be seen
_DRAWN_PX = 480  # an original is blown up to about this before its boxes are drawn
_BOX, _CROP = (255, 0, 170), (0, 200, 255)
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_page(found: Explanation, path: Path) -> None:
    """Write the page, whole or not at all. Raises `OutputError`."""
    part = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(format_page(found), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OutputError(
            f"{path}: cannot be written ({os.strerror(error.errno or 0)}); choose another file"
        ) from error


def format_page(found: Explanation) -> str:
    """The page's HTML."""
    sections = [
        _section("Row", _show_row(found)),
        '<div class="sides">',
        _section("Student", _show_side(found.student)),
        _section("Teacher", _show_teacher(found)),
        "</div>",
        _section("One rollout", _show_rollout(found)),
        _section("Run", _show_run(found)),
    ]
    title = f"Row {found.row_index} (of {found.size.rows}, from 0) explained"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f'<header><h1>{title}</h1><p class="soft">{_show_summary(found)}</p></header>',
            "<main>",
            *sections,
            "</main>\n</body>\n</html>\n",
        ]
    )


def show(text: str) -> str:
    """Text of any origin as HTML text or attribute value."""
    return html.escape(make_printable(text), quote=True)


def _section(title: str, parts: Iterable[str]) -> str:
    return f"<section><h2>{title}</h2>\n" + "\n".join(parts) + "\n</section>"


def _show_summary(found: Explanation) -> str:
    extra = found.teacher.tokens - found.student.tokens
    return (
        f"The student is given {found.student.tokens} tokens, the teacher {found.teacher.tokens} ({extra:+d}): "
        f"{show(describe_privilege(found))}."
    )


def _show_row(found: Explanation) -> Iterator[str]:
    items = [("question", show(found.question))]
    if found.options:
        letters = zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", found.options, strict=False)
        items.append(("options", "<br>".join(f"{letter}. {show(option)}" for letter, option in letters)))
    items.append(("answer", show(found.answer) if found.answer is not None else "(none)"))
    boxes = "<br>".join(show(describe_box(box, len(found.originals))) for box in found.boxes)
    items.append(("boxes", boxes or "(none)"))
    items += [(name, show(value)) for name, value in (("id", found.id), ("source", found.source)) if value]
    yield _list(items)
    if found.originals:
        yield '<div class="pictures">'
        for number, original in enumerate(found.originals, 1):
            caption = f"original {number}: {original.width_px}x{original.height_px} px"
            if original.boxes:
                caption += "; <i class=box></i> box"
            if original.crops:
                caption += ", <i class=crop></i> crop"
            yield _figure(draw_boxes(original), f"original image {number}", caption)
        yield "</div>"


def _show_side(side: SideFacts) -> Iterator[str]:
    yield f"<p>{show(describe_tokens(side))}</p>"
    yield from _show_images(side)
    yield f'<h3>Prompt</h3>\n<pre dir="auto">{show(side.text)}</pre>'


def _show_images(side: SideFacts) -> Iterator[str]:
    yield '<div class="pictures">'
    for image in side.images:
        for picture in image.pictures:
            yield _figure(picture.pixels_HWC, f"image {image.number}, {picture.kind}", _caption(image, picture.kind))
    yield "</div>"


def _caption(image: ShownImage, kind: str) -> str:
    size = f"{image.describe_size()} of {image.source_width_px}x{image.source_height_px}, {image.tokens} tokens"
    return f"image {image.number}: {size}" if kind == "whole" else f"image {image.number}: its tiles"


def _show_teacher(found: Explanation) -> Iterator[str]:
    yield _list([("weights", show(found.teacher_kind)), ("privilege", show(describe_privilege(found)))])
    yield from _show_side(found.teacher)
    if found.neutral is not None:
        yield "<h3>Contrast: the same prompt, its evidence made neutral</h3>"
        yield from _show_images(found.neutral)


def _show_rollout(found: Explanation) -> Iterator[str]:
    if not found.tokens:
        yield f'<p class="fault">No token ({show(describe_absence(found))}): this row would not train.</p>'
        return
    highest = max((token.reverse_kl for token in found.tokens if math.isfinite(token.reverse_kl)), default=0.0)
    yield f"<p>{show(describe_means(found.tokens))}</p>"
    yield (
        '<p class="legend">KL(student || teacher): <span>0</span><b aria-hidden="true"></b>'
        f"<span>{highest:.4f} nats</span>; the darker a token's ground, the larger. Numbers stand in the table.</p>"
    )
    yield '<p class="tokens" dir="auto">' + "".join(_paint(token, highest) for token in found.tokens) + "</p>"
    weighted = any(token.weight != 1.0 for token in found.tokens)
    heads = ("token", "KL", "student log p", "teacher log p", "entropy", *(("weight",) if weighted else ()))
    yield '<div class="wide"><table>\n<thead><tr>' + "".join(f'<th scope="col">{head}</th>' for head in heads)
    yield "</tr></thead>\n<tbody>"
    for token in found.tokens:
        numbers = [token.reverse_kl, token.student_logprob, token.teacher_logprob, token.entropy]
        cells = "".join(f"<td>{number:.4f}</td>" for number in numbers)
        cells += f"<td>{token.weight:.3g}</td>" if weighted else ""
        yield f'<tr><th scope="row"><code>{_show_token(token)}</code></th>{cells}</tr>'
    yield "</tbody></table></div>"


def _paint(token: TokenFacts, highest: float) -> str:
    share = token.reverse_kl / highest if highest > 0 and math.isfinite(token.reverse_kl) else 0.0
    title = (
        f"KL {token.reverse_kl:.4f}, student {token.student_logprob:.4f}, teacher {token.teacher_logprob:.4f}, "
        f"entropy {token.entropy:.4f}"
    )
    return f'<span style="--kl:{min(max(share, 0.0), 1.0):.3f}" title="{title}">{show(token.text)}</span>'


def _show_token(token: TokenFacts) -> str:
    return show(token.text).replace("\n", "\\n").replace("\t", "\\t").replace(" ", "␣")


def _show_run(found: Explanation) -> Iterator[str]:
    if found.teacher_fault:
        yield f'<p class="fault">The teacher failed its start-up check: {show(found.teacher_fault)}</p>'
    yield "<p>" + "<br>".join(show(line) for line in describe_size(found.size)) + "</p>"
    if found.memory:
        yield "<h3>Memory</h3>\n<pre>" + show("\n".join(found.memory)) + "</pre>"
    if found.teacher_checks:
        yield "<h3>Teacher checks before step 0</h3>"
        yield _list([(show(name), f"{value:.6g}") for name, value in found.teacher_checks])
    if found.settings:
        yield "<h3>Settings that are not at their defaults</h3>"
        yield _list(
            [
                (show(item.name), f'{show(item.value)} <span class="soft">default: {show(item.default)}</span>')
                for item in found.settings
            ]
        )


def _list(items: Iterable[tuple[str, str]]) -> str:
    """A definition list of names and values that are HTML already."""
    return '<dl dir="auto">' + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in items) + "</dl>"


def _figure(pixels_HWC: Pixels, name: str, caption: str) -> str:
    height, width, _ = pixels_HWC.shape
    scale = max(1, _SMALL_PX // max(height, width))
    shrink = min(1.0, _LARGEST_PX / max(height, width))
    shown = [max(1, round(side * scale * shrink)) for side in (width, height)]
    kind = ' class="exact"' if scale > 1 else ""
    return (
        f'<figure style="max-width:{max(shown[0], _SMALL_PX)}px"><img{kind} src="{encode_picture(pixels_HWC)}" '
        f'width="{shown[0]}" height="{shown[1]}" alt="{name}"><figcaption>{caption}</figcaption></figure>'
    )


def encode_picture(pixels_HWC: Pixels) -> str:
    """A data URI: PNG, pixel for pixel, of a small picture; JPEG, shrunk to the page, of a large one."""
    picture = Image.fromarray(pixels_HWC)
    buffer = io.BytesIO()
    if picture.width * picture.height <= _LOSSLESS_AREA and max(picture.size) <= _LARGEST_PX:
        kind = "png"
        picture.save(buffer, format="PNG", optimize=True)
    else:
        kind = "jpeg"
        picture.thumbnail((_LARGEST_PX, _LARGEST_PX), Image.Resampling.BICUBIC)
        picture.save(buffer, format="JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def draw_boxes(original: Original) -> Pixels:
    """The original with its boxes and, around them, the regions that were cut; a small one blown up by a whole number,
    so that the lines do not cover what they surround."""
    picture = Image.fromarray(original.pixels_HWC)
    factor = max(1, _DRAWN_PX // max(picture.size))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    scale = (picture.width / original.width_px, picture.height / original.height_px)
    width = max(2, max(picture.size) // 240)
    for boxes, colour in ((original.crops, _CROP), (original.boxes, _BOX)):
        for box in boxes:
            left, top = math.floor(box.x0 * scale[0]), math.floor(box.y0 * scale[1])
            right, bottom = math.ceil(box.x1 * scale[0]) - 1, math.ceil(box.y1 * scale[1]) - 1
            edges = (left, top, max(left, right), max(top, bottom))
            # White around it: one of the two stands out on any ground.
            around = (edges[0] - 1, edges[1] - 1, edges[2] + 1, edges[3] + 1)
            draw.rectangle(around, outline=(255, 255, 255), width=width + 2)
            draw.rectangle(edges, outline=colour, width=width)
    return np.asarray(picture)
