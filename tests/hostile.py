"""Small image files for hostile tests and as seeds of the fuzzer: sound ones of every kind, damaged ones, and bombs."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from pictures import draw_image, encode, jpeg_of_scans, png_adam7, png_chunk, png_rgb16, riff
from PIL import Image

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
BOMB_PX = 60_000
"""Side of the bombs: 3.6 billion pixels."""


def make_sound() -> dict[str, bytes]:
    """Files that must be decoded, a few kilobytes each."""
    picture, grey = draw_image(37, 29), draw_image(37, 29, mode="L")
    alpha = draw_image(21, 18, mode="RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [draw_image(20, 16, seed) for seed in range(2)]
    square = draw_image(64, 64)
    return {
        "baseline.jpg": encode(picture, "JPEG"),
        "progressive.jpg": encode(picture, "JPEG", progressive=True),
        "444.jpg": encode(picture, "JPEG", subsampling=0),
        "422.jpg": encode(picture, "JPEG", subsampling=1),
        "440.jpg": sample_otherwise(encode(square, "JPEG", subsampling=1, quality=30), 0x12),
        "411.jpg": sample_otherwise(encode(square, "JPEG", subsampling=2, quality=30), 0x41),
        "tall.jpg": sample_otherwise(encode(square, "JPEG", subsampling=2, quality=30), 0x14),
        "unfinished.jpg": drop_scans(encode(square, "JPEG", progressive=True, quality=30), 4),
        "grey.jpg": encode(grey, "JPEG"),
        "cmyk.jpg": encode(draw_image(19, 17, mode="CMYK"), "JPEG"),
        "restart.jpg": encode(picture, "JPEG", restart_marker_blocks=2),
        "rotated.jpg": encode(picture, "JPEG", exif=exif, quality=50),
        "rgb.png": encode(draw_image(13, 11)),
        "palette.png": encode(draw_image(13, 11, mode="P"), transparency=3),
        "bilevel.png": encode(draw_image(13, 11, mode="1")),
        "grey.png": encode(draw_image(13, 11, mode="L"), transparency=9),
        "grey_alpha.png": encode(draw_image(13, 11, mode="LA")),
        "rgba.png": encode(alpha),
        "rotated.png": encode(draw_image(13, 11), exif=exif),
        "interlaced.png": png_adam7(np.asarray(draw_image(13, 11))),
        "deep.png": png_rgb16(np.arange(99, dtype=np.uint16).reshape(3, 11, 3) * 601),
        "apng.png": encode(frames[0], save_all=True, append_images=frames[1:]),
        "lossy.webp": encode(picture, "WEBP", quality=60),
        "lossless.webp": encode(draw_image(13, 11), "WEBP", lossless=True),
        "alpha.webp": encode(alpha, "WEBP", quality=60),
        "rotated.webp": encode(picture, "WEBP", quality=60, exif=exif),
        "animated.webp": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], quality=50),
        "still.gif": encode(draw_image(13, 11), "GIF", interlace=0),
        "interlaced.gif": encode(draw_image(13, 11), "GIF", interlace=1),
        "animated.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "transparent.gif": encode(draw_image(13, 11, mode="P"), "GIF", transparency=7),
        "offset.gif": gif((30, 20), (5, 3, 13, 11)),
    }


def make_damaged() -> dict[str, bytes]:
    """Files cut or changed in one place."""
    sound = make_sound()
    damaged = {}
    for name in (
        "baseline.jpg",
        "progressive.jpg",
        "rgb.png",
        "interlaced.png",
        "lossy.webp",
        "lossless.webp",
        "still.gif",
    ):
        stem, kind = name.split(".")
        data = sound[name]
        damaged[f"{stem}_cut.{kind}"] = data[: len(data) * 2 // 3]
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 0x55
        damaged[f"{stem}_flipped.{kind}"] = bytes(flipped)
    damaged["short_segment.jpg"] = b"\xff\xd8\xff\xe0\x00\x01" + sound["baseline.jpg"][2:]
    damaged["lying_chunk.webp"] = sound["lossy.webp"][:16] + b"\xff\xff\xff\xff" + sound["lossy.webp"][20:]
    canvas = (b"VP8X", bytes(4) + sides(BOMB_PX, BOMB_PX))
    damaged["lying_canvas.webp"] = riff(canvas, (b"VP8 ", sound["lossy.webp"][20:]))
    damaged["outside.gif"] = gif((8, 8), (60_000, 60_000, 13, 11))
    damaged["small_frame.png"] = apng_of_frame((13, 11), (5, 4))
    return damaged


def make_hostile() -> dict[str, bytes]:
    """Small files that ask for much memory or time, in the limits or out of them."""
    sound = make_sound()
    rotated = sound["rotated.jpg"]
    # The directory of the EXIF block is made its own next one; and one of all the entries that 64 KiB hold.
    loop = struct.pack("<2sHIHHHIIII", b"II", 42, 8, 1, 0x8769, 4, 1, 8, 8, 0)
    entries = b"II" + struct.pack("<HIH", 42, 8, 5000) + struct.pack("<HHII", 0x9286, 7, 60_000, 8) * 5000
    # A small frame of an animation on a large canvas.
    frame = bytes(6) + sides(37, 29) + bytes(4) + sound["lossy.webp"][12:]
    animated = (b"VP8X", bytes([2, 0, 0, 0]) + sides(BOMB_PX, BOMB_PX))
    return {
        "bomb.png": png_bomb(BOMB_PX, BOMB_PX),
        "bomb.jpg": jpeg_of_size(sound["baseline.jpg"], BOMB_PX),
        "bomb.gif": gif((BOMB_PX, BOMB_PX), (0, 0, 13, 11)),
        "bomb_frame.gif": gif((13, 11), (0, 0, BOMB_PX, BOMB_PX)),
        "bomb.webp": riff(animated, (b"ANIM", bytes(6)), (b"ANMF", frame)),
        "bomb_lossless.webp": riff((b"VP8L", b"\x2f" + b"\xff\xff\xff\x0f" + bytes(20))),
        "zip.png": png_bomb(400, 300, surplus=1 << 20),
        "profile.png": png_bomb(13, 11, chunk=(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 23), 9))),
        "text.png": png_bomb(13, 11, chunk=(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 23), 9))),
        "scans.jpg": jpeg_of_scans(1032, 504)[: 1 << 20],
        "loop.jpg": with_exif(rotated, loop),
        "entries.jpg": with_exif(rotated, entries),
    }


def gif(canvas: tuple[int, int], frame: tuple[int, int, int, int]) -> bytes:
    """A GIF whose only frame (left, top, width, height) has the data of 13x11 pixels."""
    head = b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x80, 1, 0) + bytes([250, 30, 20, 1, 2, 3])
    # Clear, one code of 3 bits for each pixel; cleared before the codes would grow.
    codes = [4]
    for pixel in range(143):
        codes += [pixel % 2] + ([4] if pixel % 2 else [])
    bits = sum(code << (3 * place) for place, code in enumerate([*codes, 5]))
    data = bits.to_bytes((3 * len(codes) + 10) // 8, "little")
    return head + b"," + struct.pack("<HHHHB", *frame, 0) + b"\2" + bytes([len(data)]) + data + b"\0;"


def sides(width: int, height: int) -> bytes:
    return (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


def png_bomb(width: int, height: int, surplus: int = 0, chunk: tuple[bytes, bytes] | None = None) -> bytes:
    """A grey PNG of zeros, as far as a few megabytes of them go, with `surplus` bytes after the last pixel."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = zlib.compress(bytes(min((width + 1) * height, 1 << 22) + surplus), 9)
    extra = b"" if chunk is None else png_chunk(*chunk)
    return PNG_MAGIC + head + extra + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def interlaced_bomb(width: int, height: int) -> bytes:
    """An interlaced PNG of so many RGB pixels, only the first of which are there."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1))
    return PNG_MAGIC + head + png_chunk(b"IDAT", zlib.compress(bytes(99))) + png_chunk(b"IEND", b"")


def apng_of_frame(size: tuple[int, int], frame: tuple[int, int]) -> bytes:
    """An animated PNG whose first frame, which is its still picture too, says it is smaller than that."""
    lines = b"".join(b"\0" + bytes([row] * 3 * size[0]) for row in range(size[1]))
    return PNG_MAGIC + b"".join(
        [
            png_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)),
            png_chunk(b"acTL", struct.pack(">II", 1, 0)),
            png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, *frame, 0, 0, 1, 10, 0, 0)),
            png_chunk(b"IDAT", zlib.compress(lines)),
            png_chunk(b"IEND", b""),
        ]
    )


def sample_otherwise(data: bytes, sampling: int) -> bytes:
    """The JPEG of 64x64 pixels with another sampling of as many blocks to a coded unit: in disorder, yet sound."""
    at = data.index(b"\xff\xc0") + 11
    return data[:at] + bytes([sampling]) + data[at + 1 :]


def drop_scans(data: bytes, kept: int) -> bytes:
    """The progressive JPEG with its first scans only, which libjpeg then smooths."""
    return b"\xff\xda".join(data.split(b"\xff\xda")[: kept + 1]).rpartition(b"\xff\xc4")[0] + b"\xff\xd9"


def jpeg_of_size(data: bytes, side: int) -> bytes:
    """The JPEG with another size in its frame header."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", side, side) + data[at + 4 :]


def with_exif(data: bytes, tiff: bytes) -> bytes:
    """The JPEG with another EXIF block."""
    at = data.index(b"\xff\xe1")
    (length,) = struct.unpack(">H", data[at + 2 : at + 4])
    body = b"Exif\0\0" + tiff
    return data[: at + 2] + struct.pack(">H", len(body) + 2) + body + data[at + 2 + length :]
