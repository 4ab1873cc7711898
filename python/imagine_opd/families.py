"""A loaded transformers image processor to the `ViewConfig` under which views equal it, or why there is none.

The processor's kind is known by the names of its classes: transformers is not imported here.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import PIL

from imagine_opd.errors import ConfigError
from imagine_opd.types import Tiling, ViewConfig
from imagine_opd.view_checks import MAX_TILES, check_view_config, is_finite, is_whole

__all__ = ["view_config_from"]

_MAX_FRAME_PX = 4096
_MAX_PX = 2**31 - 1
# By number as in PIL.Image.Resampling, by word as in torchvision's InterpolationMode.
_FILTERS: dict[object, str] = {
    1: "lanczos", 2: "bilinear", 3: "bicubic", "lanczos": "lanczos", "bilinear": "bilinear", "bicubic": "bicubic",
}  # fmt: skip
_SIZE_KEYS = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width", "min_pixels", "max_pixels")
# Methods that no pixel goes through.
_HARMLESS = ("to_dict", "get_number_of_image_patches")


def view_config_from(image_processor: Any, *, split: bool | None = None, **overrides: Any) -> ViewConfig:
    """Read the `ViewConfig` under which views equal those of a transformers image processor.

    Known are the processors of the Qwen-VL families, InternVL (`GotOcr2`), LLaVA-NeXT, LLaVA-OneVision, Idefics3,
    SmolVLM and Gemma 3, their `Pil` twins (equal under the installed Pillow), and subclasses that change no step.

    `split` stands for what the model's processor says at each call: InternVL's always asks for `crop_to_patches`,
    Gemma 3's leaves `do_pan_and_scan` off. `None`: as the image processor itself says. `overrides` are further
    fields of `ViewConfig` (crop budget, margins, limits, threads).

    Raises:
        ConfigError: the processor is of another kind, or does something that views do not.
    """
    known, base = _find_kind(image_processor)
    reader = _Reader(image_processor, type(image_processor).__name__)
    fields: dict[str, Any] = reader.read_pixels(known.endswith("Pil"), overrides)
    fields |= _FAMILIES[base](reader, split)
    unknown = sorted(overrides.keys() - {field.name for field in dataclasses.fields(ViewConfig)})
    if unknown:
        raise ConfigError(f"ViewConfig has no field {unknown[0]!r}; see imagine_opd.types.ViewConfig")
    return check_view_config(ViewConfig(**{**fields, **overrides}))


def _find_kind(image_processor: Any) -> tuple[str, str]:
    """The name of the nearest known class, and its family's; the drop-in processors are named `Rust…`."""
    name = type(image_processor).__name__
    above: list[type] = []
    for cls in type(image_processor).__mro__:
        base = cls.__name__.removeprefix("Rust").removesuffix("Pil")
        if base in _FAMILIES:
            break
        above.append(cls)
    else:
        kinds = ", ".join(sorted(_FAMILIES))
        raise ConfigError(f"{name} is no image processor that views can equal; expected one of {kinds}")
    for other in above:
        changed = [
            method
            for method, value in vars(other).items()
            if inspect.isroutine(value)
            and hasattr(cls, method)
            and method not in _HARMLESS
            and (method == "__call__" or not method.startswith("__"))
        ]
        if changed:
            text = f"views do what {cls.__name__} does; use that class, or this processor itself"
            raise ConfigError(f"{name} has its own {changed[0]} (in {other.__name__}); {text}")
    return cls.__name__, base


@dataclasses.dataclass(frozen=True, slots=True)
class _Reader:
    """Reads fields of one processor; a fault names the processor, the field, and what was found."""

    processor: Any
    kind: str

    def read(self, name: str) -> Any:
        value = getattr(self.processor, name, None)
        if value is None:
            raise ConfigError(f"{self.kind} has no {name}; expected a loaded image processor that sets it")
        return value

    def fault(self, name: str, expected: str) -> ConfigError:
        return ConfigError(f"{self.kind}.{name} is {getattr(self.processor, name, None)!r}; expected {expected}")

    def read_whole(self, name: str, low: int, high: int) -> int:
        value = self.read(name)
        if not is_whole(value) or not low <= value <= high:
            raise self.fault(name, f"a whole number from {low} to {high}")
        return int(value)

    def read_size(self, name: str, *forms: tuple[str, ...], unit: str = "pixels") -> tuple[int, ...]:
        """The values of the one form of `forms` that a size has."""
        size = self.read(name)
        get: Callable[[str], Any] = size.get if isinstance(size, Mapping) else lambda key: getattr(size, key, None)
        found = {key: get(key) for key in _SIZE_KEYS if get(key) is not None}
        for form in forms:
            if found.keys() == set(form) and all(is_whole(value) and value > 0 for value in found.values()):
                return tuple(int(found[key]) for key in form)
        raise self.fault(name, f"{' or '.join(' and '.join(form) for form in forms)}, in {unit}")

    def read_square(self, name: str, *forms: tuple[str, ...]) -> int:
        """The side of a size that is a square."""
        sides = self.read_size(name, *forms)
        if len(set(sides)) != 1:
            raise self.fault(name, "height equal to width: frames are square")
        if sides[0] > _MAX_FRAME_PX:
            raise self.fault(name, f"at most {_MAX_FRAME_PX} pixels")
        return sides[0]

    def read_pixels(self, pil: bool, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """What every family says: the filter and the normalisation."""
        reasons = {
            "do_resize": "views are resized",
            "do_rescale": "views are normalised",
            "do_normalize": "views are normalised",
            "do_convert_rgb": "views are RGB",
        }
        for name, reason in reasons.items():
            if getattr(self.processor, name, None) is not True:
                raise self.fault(name, f"True: {reason}")
        fields: dict[str, Any] = {"parity": _name_pillow() if pil else "torchvision"}
        fields["resample"] = overrides.get("resample") or self.read_filter(pil)
        for name in ("image_mean", "image_std"):
            values = self.read(name)
            if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(map(is_finite, values)):
                raise self.fault(name, "three finite numbers, one a channel")
            fields[name] = tuple(float(value) for value in values)
        if not all(value > 0 for value in fields["image_std"]):
            raise self.fault("image_std", "numbers above 0")
        factor = self.read("rescale_factor")
        if not is_finite(factor) or factor <= 0:
            raise self.fault("rescale_factor", "a finite number above 0, such as 1/255")
        fields["rescale_factor"] = float(factor)
        return fields

    def read_filter(self, pil: bool) -> str:
        resample = getattr(self.processor, "resample", None)
        key = getattr(resample, "value", resample)  # of an enum of PIL's or torchvision's
        found = None if isinstance(key, bool) or not isinstance(key, (int, str)) else _FILTERS.get(key)
        if found is None:
            raise self.fault("resample", "1 (Lanczos), 2 (bilinear) or 3 (bicubic)")
        if found == "lanczos" and not pil and _torchvision_lacks_lanczos():
            text = "that torchvision before 0.27 replaces by bicubic; install torchvision>=0.27 or pass resample"
            raise ConfigError(f"{self.kind}.resample is {resample!r}, Lanczos, {text}='bicubic'")
        return found

    def read_split(self, name: str, split: bool | None) -> bool:
        value = getattr(self.processor, name, None) if split is None else split
        if value is not None and not isinstance(value, bool):
            raise self.fault(name, "True or False") if split is None else _fault_split(split, "True or False")
        return bool(value)


def _read_qwen(reader: _Reader, split: bool | None) -> dict[str, Any]:
    if split:
        raise _fault_split(split, f"nothing: a {reader.kind} does not tile")
    fields: dict[str, Any] = {name: reader.read(name) for name in ("patch_size", "merge_size", "temporal_patch_size")}
    edges = reader.read_size("size", ("shortest_edge", "longest_edge"), unit="square pixels")
    fields["min_pixels"], fields["max_pixels"] = edges
    return fields


def _read_internvl(reader: _Reader, split: bool | None) -> dict[str, Any]:
    tiling = Tiling(
        family="internvl",
        frame_px=reader.read_square("size", ("height", "width")),
        split=reader.read_split("crop_to_patches", split),
        min_tiles=max(1, reader.read_whole("min_patches", 0, MAX_TILES)),
        max_tiles=reader.read_whole("max_patches", 1, MAX_TILES),
    )
    return {"tiling": tiling}


def _read_llava(reader: _Reader, split: bool | None, family: str) -> dict[str, Any]:
    if split not in (None, True):
        raise _fault_split(split, f"True or nothing: a {reader.kind} always tiles")
    frame_px = reader.read_square("size", ("height", "width"), ("shortest_edge",))
    # The side of a tile, even where nothing is cropped.
    crops = getattr(reader.processor, "do_center_crop", None) or getattr(reader.processor, "crop_size", None)
    if crops and reader.read_square("crop_size", ("height", "width")) != frame_px:
        raise reader.fault("crop_size", f"the {frame_px} pixels of size: frames are not cropped")
    pinpoints = reader.read("image_grid_pinpoints")
    if not isinstance(pinpoints, (list, tuple)) or not pinpoints:
        raise reader.fault("image_grid_pinpoints", "at least one (height, width) in pixels")
    pairs = []
    for pair in pinpoints:
        height, width = pair if isinstance(pair, (list, tuple)) and len(pair) == 2 else (0, 0)
        name = f"{reader.kind}.image_grid_pinpoints has {pair!r}"
        if not all(is_whole(side) and side > 0 and side % frame_px == 0 for side in (height, width)):
            raise ConfigError(f"{name}; expected (height, width), multiples of the {frame_px} pixels of a frame")
        if height * width > MAX_TILES * frame_px**2:
            raise ConfigError(f"{name}; expected at most {MAX_TILES} frames of {frame_px} pixels")
        pairs.append((height, width))
    return {"tiling": Tiling(family=family, frame_px=frame_px, pinpoints=tuple(pairs))}


def _read_llava_next(reader: _Reader, split: bool | None) -> dict[str, Any]:
    return _read_llava(reader, split, "llava_next")


def _read_llava_onevision(reader: _Reader, split: bool | None) -> dict[str, Any]:
    fields = _read_llava(reader, split, "llava_onevision")
    if not all(0 <= mean <= 1 for mean in reader.read("image_mean")):
        raise reader.fault("image_mean", "numbers from 0 to 1: images padded to a square are filled with them")
    return fields


def _read_idefics3(reader: _Reader, split: bool | None) -> dict[str, Any]:
    tiling = Tiling(
        family="idefics3",
        frame_px=reader.read_square("max_image_size", ("longest_edge",)),
        split=reader.read_split("do_image_splitting", split),
        longest_edge_px=reader.read_size("size", ("longest_edge",))[0],
    )
    return {"tiling": tiling}


def _read_gemma3(reader: _Reader, split: bool | None) -> dict[str, Any]:
    # Checkpoints leave the rule to the model's processor, whose values are Tiling's defaults.
    rule: dict[str, Any] = {}
    if getattr(reader.processor, "pan_and_scan_min_crop_size", None) is not None:
        rule["min_crop_px"] = reader.read_whole("pan_and_scan_min_crop_size", 1, _MAX_PX)
    if getattr(reader.processor, "pan_and_scan_max_num_crops", None) is not None:
        rule["max_crops"] = reader.read_whole("pan_and_scan_max_num_crops", 1, MAX_TILES)
    ratio = getattr(reader.processor, "pan_and_scan_min_ratio_to_activate", None)
    if ratio is not None:
        if not is_finite(ratio) or ratio < 0:
            raise reader.fault("pan_and_scan_min_ratio_to_activate", "a finite number of at least 0")
        rule["min_ratio"] = float(ratio)
    frame_px = reader.read_square("size", ("height", "width"))
    tiling = Tiling("gemma3", frame_px, split=reader.read_split("do_pan_and_scan", split), **rule)
    return {"tiling": tiling}


_FAMILIES: dict[str, Callable[[_Reader, bool | None], dict[str, Any]]] = {
    "Qwen2VLImageProcessor": _read_qwen,
    "GotOcr2ImageProcessor": _read_internvl,
    "LlavaNextImageProcessor": _read_llava_next,
    "LlavaOnevisionImageProcessor": _read_llava_onevision,
    "Idefics3ImageProcessor": _read_idefics3,
    "SmolVLMImageProcessor": _read_idefics3,
    "Gemma3ImageProcessor": _read_gemma3,
}


def _fault_split(split: object, expected: str) -> ConfigError:
    return ConfigError(f"split is {split!r}; expected {expected}")


def _name_pillow() -> str:
    """The parity of the installed Pillow; from 13.0 on it chooses the order of its two passes."""
    return "pillow" if int(PIL.__version__.partition(".")[0]) >= 13 else "pillow12"


def _torchvision_lacks_lanczos() -> bool:
    try:
        numbers = version("torchvision").split(".")
    except PackageNotFoundError:
        return False
    return tuple(int(number) for number in numbers[:2]) < (0, 27)
