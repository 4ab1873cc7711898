"""Rows with images of several sizes, their prompts, rollouts and logits for a tiny model of any family."""

from __future__ import annotations

from functools import cache

import torch
from model_families import Built, build_family
from pictures import draw_image, encode

from imagine_opd.config import build_config
from imagine_opd.models.access import read_token_ids
from imagine_opd.privilege import PrivilegeConfig, build_prompts
from imagine_opd.rollout import HFEngine, SamplingConfig
from imagine_opd.settings import make_view_config
from imagine_opd.types import Box, Row
from imagine_opd.views import make_views

TEMPLATE = "{question} Look."
# Images of the rows of a batch: one that is cut, several of different sizes, one that is a single frame.
SIZES = (((40, 24),), ((20, 52), (33, 31)), ((16, 16),), ((70, 22),))
FIELDS = {
    "student_prompt_template": TEMPLATE,
    "teacher_prompt_template": TEMPLATE + " Use the crop.",
    "box_margin": 0.0,
    "min_crop_px": 1,
}


@cache
def find_family(name: str) -> Built:
    return build_family(name)


def make_rows(sizes=SIZES) -> list[Row]:
    rows = []
    for seed, images in enumerate(sizes):
        data = tuple(encode(draw_image(*size, seed=10 * seed + place)) for place, size in enumerate(images))
        width, height = images[-1]
        box = Box(width // 3, height // 4, width // 3 + 9, height // 4 + 11, image=len(images) - 1)
        rows.append(Row(data, f"what digit is {seed} ?\n  here", (box,), answer=str(seed)))
    return rows


def make_pairs(family: Built, rows: list[Row], tmp_path):
    args = build_config(tmp_path, {**FIELDS, **family.options})
    views = make_views(rows, make_view_config(family.processor, args))
    config = PrivilegeConfig(TEMPLATE, FIELDS["teacher_prompt_template"])
    return [build_prompts(row, view, family.processor, config) for row, view in zip(rows, views, strict=True)]


def sample(family: Built, prompts, length=7, temperature=1.0, seed=3):
    engine = HFEngine(read_token_ids(family.model, family.processor))
    return engine.generate(family.model, prompts, SamplingConfig(length, temperature), seed=seed)


def project(head, hidden_ND):
    logits_NV = hidden_ND @ head.weight_VD.T
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V
    logits_NV = head.logit_scale * logits_NV
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)
