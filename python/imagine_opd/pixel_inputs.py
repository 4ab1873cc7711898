"""The pixels of a batch's prompts as inputs of the model, on its device; bytes travel, and are normalised there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from imagine_opd.adapters import join_views
from imagine_opd.compact import expand_pixels
from imagine_opd.devices import move_to
from imagine_opd.types import Prompt, View

PIXELS = "pixel_values"
GRID = "image_grid_thw"


def join_pixels(prompts: Sequence[Prompt], device: torch.device, in_full: bool = True) -> dict[str, torch.Tensor]:
    """The pixel inputs of all prompts, in order, as their family's model takes them.

    `in_full=False`: for a forward whose image features are supplied (`vision_features`), only what positions are made
    of and a mark that there are images.
    """
    views = [prompt.view for prompt in prompts]
    if in_full:
        return join_view_pixels(prompts[0].family, views, device)
    if not any(view.frame_counts for view in views):
        return {}
    grids = np.concatenate([view.image_grid_thw for view in views])
    inputs = {PIXELS: torch.zeros(1, device=device)}
    return {**inputs, GRID: move_to(torch.from_numpy(grids), device)} if len(grids) else inputs


def join_view_pixels(family: str, views: Sequence[View], device: torch.device) -> dict[str, torch.Tensor]:
    """The same of views."""
    arrays = join_views(family, views)
    config = views[0].config
    inputs = {
        name: move_to(torch.from_numpy(array), device)
        for name, array in arrays.items()
        if config is None or name != PIXELS
    }
    if config is not None and PIXELS in arrays:
        inputs[PIXELS] = expand_pixels(arrays[PIXELS], config, device=device)
    return inputs
