"""The cases of the views' benches: files in, steps of ours and of the peers out, with what each is held against.

A step starts from what its name says (a path, a decoded picture) and ends with pixels as the model takes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benches.measure import Step
from benches.table import OURS
from benches.view_files import Pictures, Size
from benches.view_peers import FAMILIES, READERS, make_processor, process, read_pil, read_tensor
from imagine_opd.types import ViewConfig
from imagine_opd.views import make_views, process_images, view_config_from

Box = tuple[int, int, int, int]

BEST, USUAL = "best", "usual"
"""Roles of peers: the fastest way that transformers has, whichever that is here, and the way that trainers go."""

ONE_THREAD = "ours, 1 thread"
PIL_PARITY = "ours, Pillow parity"

# Left, top, width, height as shares of the picture: 0.31, 0.15 and 0.80 of the pixels of 12 MP are in them.
SHARES = ((0.10, 0.15, 0.161, 0.155), (0.55, 0.50, 0.109, 0.114), (0.60, 0.45, 0.259, 0.255))


@dataclass(frozen=True)
class ViewPeer:
    """A step that ours is held against."""

    step: Step
    role: str = ""
    against: str = OURS
    """The name of the step of ours whose pixels are its own, and whose time is compared."""
    exact: bool = True
    """Whether the pixels must be equal; otherwise their difference is told."""


@dataclass(frozen=True)
class ViewCase:
    """What is timed, and by how much ours is to be faster, by the role or the name of the peer."""

    name: str
    ours: Mapping[str, Step]
    peers: Mapping[str, ViewPeer]
    targets: Mapping[str, float] = field(default_factory=dict)
    threads: int = 1
    expand: Callable[[Tensor], Tensor] = lambda pixels: pixels
    """Brings pixels of ours to the peer's form before they are compared; not timed."""
    memory_of: tuple[str, ...] = ()
    """Steps whose peak memory is measured, on the files below."""
    files: tuple[Path, ...] = ()


def make_config(processor: Any, threads: int = 1, **overrides: Any) -> ViewConfig:
    """What the processor does, on so many threads; boxes are cut as they are."""
    return view_config_from(processor, num_threads=threads, box_margin=0.0, min_crop_px=1, **overrides)


def run_ours(images: Sequence[Any], config: ViewConfig) -> dict[str, Tensor]:
    """Pixels of the images of one prompt."""
    return {"pixels": torch.from_numpy(process_images([images], config).pixel_values)}


def run_peer(processor: Any, read: Callable[[Any], Any], images: Sequence[Any], **options: Any) -> dict[str, Tensor]:
    """The same by a peer."""
    return {"pixels": process(processor, map(read, images), **options)}


def keep(image: Any) -> Any:
    """The reader of what is read already."""
    return image


def make_file_peers(processor: Any, paths: Sequence[Path], **options: Any) -> dict[str, ViewPeer]:
    """By path, by tensor and by PIL image."""
    return {
        name: ViewPeer(partial(run_peer, processor, read, paths, **options), USUAL if name == "PIL image" else BEST)
        for name, read in READERS.items()
    }


def make_file_case(name: str, path: Path, targets: Mapping[str, float]) -> ViewCase:
    """One file to Qwen3-VL's pixels, Pillow's backend included."""
    processor, pil = make_processor(), make_processor("Qwen2VLImageProcessorPil")
    ours = {
        OURS: partial(run_ours, [path], make_config(processor)),
        PIL_PARITY: partial(run_ours, [path], make_config(pil)),
    }
    peers = make_file_peers(processor, [path])
    peers["PIL backend"] = ViewPeer(partial(run_peer, pil, read_pil, [path]), against=PIL_PARITY)
    return ViewCase(name, ours, peers, targets)


def make_decoded_case(pictures: Pictures) -> ViewCase:
    """A picture that is decoded already: a PIL image, a tensor, an array."""
    size, processor = pictures.level.large, make_processor()
    path, config = pictures.write(size), make_config(processor)
    image, tensor = read_pil(path), read_tensor(path)
    array = np.asarray(image)

    def copy_and_run() -> dict[str, Tensor]:
        return run_ours([np.asarray(image)], config)

    from_image = "ours, from a PIL image"
    return ViewCase(
        f"{size.name} decoded before",
        {OURS: partial(run_ours, [array], config), from_image: copy_and_run},
        {
            "tensor": ViewPeer(partial(run_peer, processor, keep, [tensor]), BEST),
            "PIL image": ViewPeer(partial(run_peer, processor, keep, [image]), USUAL, against=from_image),
        },
    )


def place_boxes(size: Size) -> list[Box]:
    """Three crops, whose sides are no multiples of a patch."""
    boxes = []
    for x, y, w, h in SHARES:
        left, top = int(x * size.width), int(y * size.height)
        boxes.append((left, top, left + int(w * size.width) | 1, top + int(h * size.height) | 1))
    return boxes


def cut_tensor(tensor: Tensor, boxes: Sequence[Box]) -> list[Tensor]:
    """Views of the tensor."""
    return [tensor[:, y0:y1, x0:x1] for x0, y0, x1, y1 in boxes]


def cut_image(image: Image.Image, boxes: Sequence[Box]) -> list[Image.Image]:
    """Copies."""
    return [image.crop(box) for box in boxes]


def cut_array(array: np.ndarray[Any, Any], boxes: Sequence[Box]) -> list[np.ndarray[Any, Any]]:
    """Copies, as `process_images` takes them."""
    return [np.ascontiguousarray(array[y0:y1, x0:x1]) for x0, y0, x1, y1 in boxes]


def make_crops_case(pictures: Pictures, size: Size) -> ViewCase:
    """Three crops of a decoded picture; cutting is timed."""
    path, processor, boxes = pictures.write(size), make_processor(), place_boxes(size)
    config = make_config(processor)
    image, tensor = read_pil(path), read_tensor(path)
    array = np.asarray(image)
    return ViewCase(
        f"3 crops of {size.name} decoded before",
        {OURS: lambda: run_ours(cut_array(array, boxes), config)},
        {
            "tensor": ViewPeer(lambda: run_peer(processor, keep, cut_tensor(tensor, boxes)), BEST),
            "PIL image": ViewPeer(lambda: run_peer(processor, keep, cut_image(image, boxes)), USUAL),
        },
        {BEST: 2.5, USUAL: 2.9},
    )


def make_sample_case(pictures: Pictures, size: Size) -> ViewCase:
    """A distillation sample: the student's prompt has the picture, the teacher's has it and three crops.

    Trainers call the processor once for each prompt, and each prompt's pictures are decoded for it. "once" is kind to
    the peer: both calls get the same decoded picture.
    """
    path, processor, boxes = pictures.write(size), make_processor(), place_boxes(size)
    config = make_config(processor)

    def run_ours_on_sample() -> dict[str, Tensor]:
        (views,) = make_views([{"image": path, "boxes": boxes}], config)
        return {
            "student": torch.from_numpy(views.student.pixel_values),
            "teacher": torch.from_numpy(views.teacher.pixel_values),
        }

    def make_step(read: Callable[[Path], Any], cut: Callable[[Any, Sequence[Box]], list[Any]], twice: bool) -> Step:
        def step() -> dict[str, Tensor]:
            image = read(path)
            student = process(processor, [image])
            image = read(path) if twice else image
            return {"student": student, "teacher": process(processor, [image, *cut(image, boxes)])}

        return step

    peers = {}
    for name, role, read, cut in (
        ("tensor", BEST, read_tensor, cut_tensor),
        ("PIL image", USUAL, read_pil, cut_image),
    ):
        peers[f"{name}, decoded twice"] = ViewPeer(make_step(read, cut, twice=True), role)
        peers[f"{name}, decoded once"] = ViewPeer(make_step(read, cut, twice=False))
    return ViewCase(
        f"sample of {size.name}: global, global + 3 crops", {OURS: run_ours_on_sample}, peers, {BEST: 3.5, USUAL: 4.5}
    )


def make_regions_case(pictures: Pictures) -> ViewCase:
    """Crops alone from a file: ours decodes no more than their region."""
    size, processor = pictures.level.large, make_processor()
    path, boxes = pictures.write(size), place_boxes(size)
    config = make_config(processor, teacher_global=False)

    def run_ours_on_regions() -> dict[str, Tensor]:
        (views,) = make_views([{"image": path, "boxes": boxes}], config, sides=("teacher",))
        return {"pixels": torch.from_numpy(views.teacher.pixel_values)}

    return ViewCase(
        f"3 crops alone of a {size.name} JPEG",
        {OURS: run_ours_on_regions},
        {
            "tensor": ViewPeer(lambda: run_peer(processor, keep, cut_tensor(read_tensor(path), boxes)), BEST),
            "PIL image": ViewPeer(lambda: run_peer(processor, keep, cut_image(read_pil(path), boxes)), USUAL),
        },
    )


def make_batch_steps(paths: Sequence[Path], threads: int) -> dict[str, Step]:
    """One call for all files, by name."""
    processor = make_processor()
    steps = {name: peer.step for name, peer in make_file_peers(processor, paths).items()}
    steps[OURS] = partial(run_ours, paths, make_config(processor, threads))
    steps[ONE_THREAD] = partial(run_ours, paths, make_config(processor, 1))
    return steps


def make_batch_case(pictures: Pictures, size: Size, threads: int = 1, measures_memory: bool = False) -> ViewCase:
    """Many distinct files in one call."""
    paths = pictures.write_batch(size)
    steps = make_batch_steps(paths, threads)
    peers = {"path": ViewPeer(steps["path"], BEST)}
    targets = {BEST: 2.5}
    if threads == 1:
        peers["PIL image"] = ViewPeer(steps["PIL image"], USUAL)
    else:
        peers[ONE_THREAD] = ViewPeer(steps[ONE_THREAD])
        targets = {ONE_THREAD: 1.8}
    memory_of = tuple(name for name in (OURS, *peers) if name != ONE_THREAD) if measures_memory else ()
    name = f"batch of {len(paths)} × {size.name}"
    return ViewCase(name, {OURS: steps[OURS]}, peers, targets, threads, memory_of=memory_of, files=tuple(paths))


def make_large_batch_case(pictures: Pictures, threads: int) -> ViewCase:
    """The one whose memory is measured."""
    return make_batch_case(pictures, pictures.level.large, threads, pictures.level.measures_memory)


def make_family_case(pictures: Pictures, family: str) -> ViewCase:
    """Another family's frames of the large JPEG."""
    size = pictures.level.large
    path, processor = pictures.write(size), make_processor(*FAMILIES[family])
    ours = {OURS: partial(run_ours, [path], make_config(processor))}
    return ViewCase(f"{family}, {size.name} JPEG", ours, make_file_peers(processor, [path]), {BEST: 1.8})


def make_uint8_case(pictures: Pictures) -> ViewCase:
    """Raw bytes: ours leaves out the temporal copy."""
    size, processor = pictures.level.large, make_processor()
    path, config = pictures.write(size), make_config(processor, output="uint8")

    def repeat(pixels: Tensor) -> Tensor:
        side, times = config.patch_size, config.temporal_patch_size
        return pixels.view(len(pixels), 3, 1, side * side).expand(-1, -1, times, -1).reshape(len(pixels), -1)

    peers = make_file_peers(processor, [path], do_rescale=False, do_normalize=False)
    return ViewCase(
        f"{size.name} JPEG to uint8", {OURS: partial(run_ours, [path], config)}, peers, {BEST: 2.0}, expand=repeat
    )


def make_bfloat16_case(pictures: Pictures) -> ViewCase:
    """The dtype that models train in; a peer converts its float32."""
    size, processor = pictures.level.large, make_processor()
    path, config = pictures.write(size), make_config(processor, output="bfloat16")

    def convert(step: Step) -> Step:
        return lambda: {name: pixels.to(torch.bfloat16) for name, pixels in step().items()}

    peers = {
        name: dataclasses.replace(peer, step=convert(peer.step))
        for name, peer in make_file_peers(processor, [path]).items()
    }
    ours = {OURS: partial(run_ours, [path], config)}
    return ViewCase(
        f"{size.name} JPEG to bfloat16", ours, peers, {BEST: 2.0}, expand=lambda pixels: pixels.view(torch.bfloat16)
    )


def make_scaled_case(pictures: Pictures) -> ViewCase:
    """Decoded at a part of its size, which is not exact: the difference is told."""
    size, processor = pictures.level.large, make_processor()
    path = pictures.write(size)
    exact = partial(run_ours, [path], make_config(processor))
    peers = {name: dataclasses.replace(peer, exact=False) for name, peer in make_file_peers(processor, [path]).items()}
    peers["ours, exact"] = ViewPeer(exact, exact=False)
    scaled = partial(run_ours, [path], make_config(processor, scaled_decode=True))
    return ViewCase(f"{size.name} JPEG, scaled decode", {OURS: scaled}, peers)


CASES: dict[str, Callable[[Pictures], ViewCase]] = {
    "large": lambda p: make_file_case(
        f"{p.level.large.name} JPEG", p.write(p.level.large), {BEST: 2.0, USUAL: 3.0, "PIL backend": 4.0}
    ),
    "small": lambda p: make_file_case(
        f"{p.level.small.name} JPEG", p.write(p.level.small), {BEST: 1.6, USUAL: 2.0, "PIL backend": 4.4}
    ),
    "large-decoded": make_decoded_case,
    "large-crops": lambda p: make_crops_case(p, p.level.large),
    "small-crops": lambda p: make_crops_case(p, p.level.small),
    "large-sample": lambda p: make_sample_case(p, p.level.large),
    "small-sample": lambda p: make_sample_case(p, p.level.small),
    "large-batch": lambda p: make_large_batch_case(p, 1),
    "large-batch-2-threads": lambda p: make_large_batch_case(p, 2),
    "small-batch": lambda p: make_batch_case(p, p.level.small),
    **{family: partial(make_family_case, family=family) for family in FAMILIES},
    "uint8": make_uint8_case,
    "bfloat16": make_bfloat16_case,
    "png": lambda p: make_file_case(f"{p.level.small.name} PNG", p.write(p.level.small, "PNG"), {BEST: 1.1}),
    "webp": lambda p: make_file_case(f"{p.level.small.name} WebP", p.write(p.level.small, "WEBP"), {BEST: 1.1}),
    "large-regions": make_regions_case,
    "large-scaled": make_scaled_case,
}
