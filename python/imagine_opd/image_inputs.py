"""What a caller hands an image processor: files stay undecoded for Rust, pixels become rows of RGB bytes.

`DeferredImage` stands for an encoded image wherever transformers expects a loaded one. `read_source` gives what
`views.process_images` takes, by transformers' own rules for that kind of input: EXIF applied and alpha dropped for
paths, URLs and base64; EXIF left alone and alpha laid on white for PIL objects and arrays.
"""

from __future__ import annotations

import base64
import inspect
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, JpegImagePlugin
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import (
    ChannelDimension,
    infer_channel_dimension_format,
    load_image,
    load_image_as_tensor,
)

from imagine_opd import _rust
from imagine_opd.errors import ImageError
from imagine_opd.types import ImageRef

__all__ = ["DeferredImage", "UnsupportedError", "defer", "read_source"]

_ORIENTATION = 0x0112
_OTHER_EXIF = ("xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # in Pillow's `info`
_PIECE_BYTES = 1 << 20
# Older transformers leave an image as stored where it is loaded as a tensor.
_TENSORS_ARE_UPRIGHT = "exif_orientation" in inspect.getsource(load_image_as_tensor)
# Newer transformers ask for it; older ones do not know it, and give an image, which NumPy takes as well.
_AS_ARRAY = {"return_numpy": True} if "return_numpy" in inspect.signature(convert_to_rgb).parameters else {}
_HEAD_BYTES = 26  # of a PNG: up to the depth and the kind of its samples


class UnsupportedError(Exception):
    """Rust does not make these pixels; the text names the option or the kind of input in a few words."""


class DeferredImage(Image.Image):
    """An encoded image not decoded yet, upright and RGB; the first use of its pixels loads it as transformers does.

    `source` is what Rust reads, `reference` the text transformers was given (a path or base64).
    """

    def __init__(self, source: ImageRef, reference: str, size: tuple[int, int]) -> None:
        super().__init__()
        self.source = source
        self.reference = reference
        self._mode = "RGB"
        self._size = size

    @property
    def is_loaded(self) -> bool:
        return self._im is not None

    def load(self) -> Any:
        if not self.is_loaded:
            self.im = load_image(self.reference).im
            self._mode, self._size = self.im.mode, self.im.size
        return super().load()

    def __reduce__(self) -> Any:
        if self.is_loaded:  # its pixels may have been changed
            return Image.Image.copy, (self.copy(),)
        return type(self), (self.source, self.reference, self.size)


def defer(reference: str, backend: str) -> DeferredImage | None:
    """The image of a local path or base64 text, from its header alone; `None` if transformers has to fetch it.

    It fetches URLs, and files of which its loader makes something else than Rust does.

    Raises:
        ImageError: Rust cannot read it.
    """
    if reference.startswith(("http://", "https://")):
        return None
    source: ImageRef
    if os.path.isfile(reference):  # noqa: PTH113 - base64 of any length is asked too, and Path.is_file may raise
        source = Path(reference)
    else:
        data = reference.split(",", 1)[-1] if reference.startswith("data:image/") else reference
        try:
            source = base64.decodebytes(data.encode())
        except ValueError:
            source = b""
    if _is_loaded_otherwise(source, backend):
        return None
    try:
        return DeferredImage(source, reference, _rust.read_size(source))
    except ValueError as error:
        if isinstance(source, bytes):
            # A path ends in its name.
            shown = reference if len(reference) <= 120 else f"{reference[:20]}...{reference[-80:]}"
            text = f"{shown!r} is neither an image file, a URL nor base64 of an image ({error})"
        else:
            text = f"{reference}: {error}"
        raise ImageError(text) from error


def _is_loaded_otherwise(source: ImageRef, backend: str) -> bool:
    try:
        if isinstance(source, bytes):
            head = source[:_HEAD_BYTES]
        else:
            with source.open("rb") as file:
                head = file.read(_HEAD_BYTES)
        if head.startswith(b"\x89PNG") and head[24:25] == b"\x10":  # 16 bits: Pillow clips, torchvision keeps them
            return True
        if backend == "torchvision" and (_TENSORS_ARE_UPRIGHT or head.startswith(b"GIF8")):
            return head.startswith(b"GIF8")  # every frame of one is an image
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if backend == "torchvision":
                return bool(image.getexif().get(_ORIENTATION, 1) != 1)
            # Pillow's conversion of a path to RGB keeps one transparent colour, which is then laid on white.
            if not isinstance(image.info.get("transparency"), (bytes, type(None))):
                return True
            # It also takes the orientation from where Rust, as torchvision, does not look.
            return any(name in image.info for name in _OTHER_EXIF) and image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # Pillow's plugins raise what they like; Rust reads the file next, and says why it cannot
        return False


def read_source(image: Any, processor: Any, kwargs: dict[str, Any]) -> ImageRef | np.ndarray[Any, Any]:
    """What Rust takes for `image`: a path, encoded bytes, or rows `[height, width, 3]` uint8.

    Raises:
        UnsupportedError: the image is of a kind that transformers has to process itself.
    """
    if isinstance(image, Image.Image):
        return _read_pil(image, kwargs)
    if isinstance(image, torch.Tensor) and image.device.type != "cpu":
        raise UnsupportedError(f"images on {image.device.type}")
    if image.dtype not in (np.uint8, torch.uint8):
        raise UnsupportedError(f"images of {str(image.dtype).removeprefix('torch.')}")
    if image.ndim == 3:
        layout = kwargs.get("input_data_format") or infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        if layout == ChannelDimension.LAST and image.shape[2] == 3:
            return np.ascontiguousarray(image)
        if layout == ChannelDimension.FIRST and image.shape[0] == 3:
            return _interleave(np.asarray(image))
        kwargs = {**kwargs, "input_data_format": layout}
    # Grey and RGBA arrays: transformers' own conversion, whose rounding differs between its two backends.
    given = ("do_convert_rgb", "input_data_format")
    planes = np.asarray(processor.process_image(image, **{name: kwargs.get(name) for name in given}))
    if planes.ndim != 3 or planes.shape[0] != 3:
        raise UnsupportedError("images that are not RGB")
    return _interleave(planes)


def _interleave(planes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Three planes as rows of RGB. Plane by plane: twice as fast as copying the transposed view."""
    rows = np.empty((*planes.shape[1:], 3), dtype=np.uint8)
    for channel, plane in enumerate(planes):
        rows[:, :, channel] = plane
    return rows


def _read_pil(image: Image.Image, kwargs: dict[str, Any]) -> ImageRef | np.ndarray[Any, Any]:
    if isinstance(image, DeferredImage) and not image.is_loaded:
        return image.source
    if type(image) is JpegImagePlugin.JpegImageFile and (encoded := _read_jpeg(image)) is not None:
        if image.mode == "L" and not kwargs.get("do_convert_rgb"):
            raise UnsupportedError("images that are not RGB")
        return encoded
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return _copy_rows(image)
    if not kwargs.get("do_convert_rgb"):
        raise UnsupportedError("images that are not RGB")
    return np.ascontiguousarray(convert_to_rgb(image, **_AS_ARRAY))


def _copy_rows(image: Image.Image) -> np.ndarray[Any, Any]:
    """The bytes of an RGB image. As `np.asarray`, whose `tobytes` joins small pieces: more than twice as fast."""
    image.load()
    width, height = image.size
    rows = np.empty((height, width, 3), dtype=np.uint8)
    encoder = Image._getencoder("RGB", "raw", ("RGB",))
    encoder.setimage(image.im, (0, 0, width, height))
    out = rows.reshape(-1).data
    place = status = 0
    while place < len(out) and not status:
        _, status, piece = encoder.encode(max(_PIECE_BYTES, width * 4))
        out[place : place + len(piece)] = piece
        place += len(piece)
    if place != len(out) or status < 0:
        raise ImageError(f"a {width}x{height} PIL image cannot be copied (Pillow's encoder says {status})")
    return rows


def _read_jpeg(image: JpegImagePlugin.JpegImageFile) -> bytes | None:
    """The file behind an image that was opened but not loaded, if decoding it in Rust gives what loading would.

    Both decoders are libjpeg-turbo with the same settings. Not taken: an orientation (Rust would apply it), CMYK,
    a `draft` (other pixels), and Pillow's leniency towards truncated files.
    """
    channels = {"RGB": 3, "L": 1}.get(image.mode)
    if image._im is not None or channels != image.layers or ImageFile.LOAD_TRUNCATED_IMAGES or not image.fp:
        return None
    if "exif" in image.info and image.getexif().get(_ORIENTATION, 1) != 1:
        return None
    place = image.fp.tell()
    image.fp.seek(0)
    encoded = image.fp.read()
    image.fp.seek(place)
    try:
        if _rust.read_size(encoded) != image.size:
            return None
    except ValueError:
        return None
    if image._exclusive_fp:  # loading would have closed the file; the image keeps its bytes instead
        image.fp.close()
        image.fp = io.BytesIO(encoded)
    return encoded
