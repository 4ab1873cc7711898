"""Image features made once: the vision tower runs on an image once a step, and every forward that shows it takes them.

A forward asks its body's `get_image_features` for the features of its images. While `supply` is open, that method gives
what is known of them, and runs the tower on the rest: each image once, however many prompts of the forward show it.
What a frozen tower made for the rollout serves the student's and the teacher's forwards of the step as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from imagine_opd.adapters import ADAPTERS
from imagine_opd.models import get_base, is_tower_frozen, list_tower
from imagine_opd.pixel_inputs import PIXELS, join_view_pixels
from imagine_opd.types import Prompt, View

# I images, n features of an image, D hidden


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """What the tower made of one image: its features, and those of the layers that the text model takes directly.

    view: the image's own view, held so that no other image can come to lie in its place in memory.
    """

    view: View
    pooled: Tensor
    deepstack: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class OutputForm:
    """How a model's `get_image_features` gives its features, which differs by family and release of transformers.

    cls: of the output. pooled_joined, layers_joined: the features of all images are one tensor, else one an image.
    layers: how many the text model takes directly; `None`: the output knows no such thing.
    """

    cls: type
    pooled_joined: bool
    layers: int | None
    layers_joined: bool


Key = tuple[int, tuple[int, ...]]
"""An image by the place and shape of its pixels in memory: copies of a prompt, and both sides of a row, share them."""


class VisionFeatures:
    """The features of a step's images.

    is_frozen: the student's tower does not train, so what it made in the rollout holds for its forwards too.
    teacher_shares: the teacher's tower holds the same weights, so it holds for the teacher's too.
    """

    def __init__(self, is_frozen: bool, teacher_shares: bool) -> None:
        self.is_frozen = is_frozen
        self.teacher_shares = is_frozen and teacher_shares
        self.computed = 0
        """Images that a tower has run on, and below those that were asked for, since `start_step`."""
        self.asked = 0
        self._kept: dict[Key, ImageFeatures] = {}
        self._expected: set[Key] = set()
        self._forms: dict[type, OutputForm] = {}

    def start_step(self) -> None:
        """Forget the features of the last step: views are made anew, and a tower may have moved."""
        self.clear()
        self.computed = self.asked = 0

    def clear(self) -> None:
        """Let go of all that is kept."""
        self._kept.clear()
        self._expected.clear()

    def expect(self, prompts: Sequence[Prompt]) -> None:
        """These prompts will be shown to both sides: what is made of their images is kept for the other."""
        self._expected.update(_name_image(view, index) for view, index in _list_images(prompts))

    @contextmanager
    def supply(self, body: nn.Module, prompts: Sequence[Prompt], side: str) -> Iterator[None]:
        """Forwards of `body` inside show exactly the images of `prompts`, in order, with what `join_pixels` gives with
        `in_full=False`.

        side: `rollout`, whose features are kept where the tower is frozen, `student` or `teacher`, of which those of
        expected images are.
        """
        images = [(_name_image(view, index), view, index) for view, index in _list_images(prompts)]
        if not images:
            yield
            return
        shares = self.teacher_shares if side == "teacher" else self.is_frozen
        before = vars(body).get("get_image_features")
        original: Any = body.get_image_features
        made: dict[Key, ImageFeatures] = {}

        @wraps(original)  # `generate` reads its signature
        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            known = {**self._kept, **made} if shares else made
            missing = {key: cut_view(view, index) for key, view, index in images if key not in known}
            if missing:
                views = list(missing.values())
                inputs = join_view_pixels(prompts[0].family, views, _find_device(args, kwargs))
                rest = {name: value for name, value in kwargs.items() if name not in inputs and name != PIXELS}
                # Of a frozen tower no graph: hooks for activation checkpointing would hang one on its input.
                with torch.no_grad() if self.is_frozen else nullcontext():
                    output = original(**inputs, **rest)
                self._forms[type(body)] = read_form(output)
                made.update(zip(missing, split_features(output, views), strict=True))
            self.asked += len(images)
            self.computed += len(missing)
            known = {**known, **made}
            form = self._forms.get(type(body)) or next(iter(self._forms.values()))
            return join_features([known[key] for key, _, _ in images], form)

        vars(body)["get_image_features"] = get_image_features
        try:
            yield
        finally:
            if before is None:
                del vars(body)["get_image_features"]
            else:
                vars(body)["get_image_features"] = before
            if shares:
                kept = made if side == "rollout" else made.keys() & self._expected
                self._kept.update({key: made[key] for key in kept})


def supplying(
    features: VisionFeatures | None, body: nn.Module, prompts: Sequence[Prompt], side: str
) -> AbstractContextManager[None]:
    """`features.supply`, where there are features."""
    return nullcontext() if features is None else features.supply(body, prompts, side)


def cut_view(view: View, index: int) -> View:
    """The view of one of its images alone."""
    start = sum(view.frame_counts[:index])
    one = slice(index, index + 1)
    return View(
        pixel_values=view.pixel_values[start : start + view.frame_counts[index]],
        image_grid_thw=view.image_grid_thw[one],
        frame_counts=view.frame_counts[one],
        tile_grids=view.tile_grids[one],
        source_sizes=view.source_sizes[one],
        config=view.config,
    )


def split_features(output: Any, views: Sequence[View]) -> list[ImageFeatures]:
    """The output of `get_image_features` for views of one image each, image by image."""
    pooled: Any = output.pooler_output
    if isinstance(pooled, Tensor):  # frame after frame
        pooled = torch.split(pooled, [view.frame_counts[0] for view in views])
    deepstack = [
        torch.split(layer, [len(features) for features in pooled]) if isinstance(layer, Tensor) else layer
        for layer in getattr(output, "deepstack_features", None) or ()
    ]
    return [
        ImageFeatures(view, features, tuple(layer[index] for layer in deepstack))
        for index, (view, features) in enumerate(zip(views, pooled, strict=True))
    ]


def read_form(output: Any) -> OutputForm:
    """The form of an output of `get_image_features`."""
    pooled_joined = isinstance(output.pooler_output, Tensor)
    layers: Any = getattr(output, "deepstack_features", None)
    if layers is None:
        return OutputForm(type(output), pooled_joined, None, False)
    return OutputForm(type(output), pooled_joined, len(layers), any(isinstance(layer, Tensor) for layer in layers))


def join_features(images: Sequence[ImageFeatures], form: OutputForm) -> Any:
    """An output of `get_image_features` for these images, in order."""
    pooled = [image.pooled for image in images]
    joined: dict[str, Any] = {"pooler_output": torch.cat(pooled) if form.pooled_joined else pooled}
    if form.layers is not None:
        stacked = [[image.deepstack[layer] for image in images] for layer in range(form.layers)]
        joined["deepstack_features"] = [torch.cat(parts) for parts in stacked] if form.layers_joined else stacked
    return form.cls(**joined)


def make_vision_features(model: nn.Module, family: str, teacher_tower: Mapping[str, Tensor]) -> VisionFeatures | None:
    """The features of a run: `model` is the student as it trains, `teacher_tower` the teacher's `list_tower`.

    `None` where an image's features depend on what else its prompt shows, or no tower is found.
    """
    model = get_base(model)
    tower = list_tower(model)
    if not tower or not ADAPTERS[family].shares_features:
        return None
    is_frozen = is_tower_frozen(model)
    return VisionFeatures(is_frozen, is_frozen and has_same_weights(tower, teacher_tower))


def has_same_weights(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same tensors under the same names, in value and dtype."""
    if left.keys() != right.keys():
        return False
    return all(_is_same(left[name], right[name]) for name in left)


def _is_same(left: Tensor, right: Tensor) -> bool:
    if left.is_meta or right.is_meta or (left.dtype, left.shape) != (right.dtype, right.shape):
        return left is right
    is_one = left.device == right.device and left.data_ptr() == right.data_ptr()
    return is_one or torch.equal(left, right.to(left.device))


def _list_images(prompts: Sequence[Prompt]) -> list[tuple[View, int]]:
    return [(prompt.view, index) for prompt in prompts for index in range(len(prompt.view.frame_counts))]


def _name_image(view: View, index: int) -> Key:
    start = sum(view.frame_counts[:index])
    pixels = view.pixel_values[start : start + view.frame_counts[index]]
    return int(pixels.__array_interface__["data"][0]), pixels.shape


def _find_device(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
    """Of the stand-in for the pixels."""
    pixels: Tensor = args[0] if args else kwargs[PIXELS]
    return pixels.device
